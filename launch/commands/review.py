"""`switchyard review`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import (
    Command,
    Options,
    allow_module,
    allowed_modules,
    option,
    store_of,
)
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviewOptions(Options):
    """What `review` accepts."""

    output: str = option("where the ranking goes", ..., metavar="FILE.jsonl")
    split: str | None = option("split to look at; default: TRAIN_SPLIT")
    limit: int | None = option("examples to write; default: all", metavar="N")
    allow_module: bool = allow_module()


def run(config: "ResolvedConfig", options: ReviewOptions) -> int:
    """Ranks the labelled examples of a Task and writes them for review."""
    from launch.data import labels

    labels.review(
        config.settings.data,
        options.output,
        split=options.split or config.settings.data.train_split,
        limit=options.limit or 0,
        seed=config.settings.train.seed,
        allowed_modules=allowed_modules(config, options),
        quiet=options.quiet,
    )
    return EXIT_DONE


COMMAND = Command(
    group="Data",
    summary="rank labelled examples by how likely their label is wrong",
    description="""\
Ranks the labelled examples of a Task by how likely their label is wrong, for review.

  switchyard review --gin_file=mine.gin --allow_module --output=review.jsonl

A classifier of hashed words is cross-validated, and confident learning finds labels
that disagree with it (arXiv:1911.00068). docs/quality.md says what the numbers mean.
""",
    options=ReviewOptions,
    devices=None,
    about=store_of,
    run=run,
)
