"""`switchyard checkpoint diff`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, kept_by_run, option
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffOptions(RunOptions):
    """What `checkpoint diff` accepts."""

    with_dir: str | None = option(
        "folder of the other run; default: the same run", metavar="DIR"
    )
    with_step: int | None = option(
        "checkpoint of the other; default: its newest", metavar="N"
    )


def run(config: "ResolvedConfig", options: DiffOptions) -> int:
    """Prints in what two checkpoints differ."""
    from launch.checkpoints import difference, listing
    from launch.checkpoints.there import There
    from launch.terminal.lines import waiting

    first = There(config.settings.loop.model_dir)
    second = first if options.with_dir is None else There(options.with_dir)
    step, with_step = first.step(options.step), second.step(options.with_step)
    with (
        waiting("comparing", quiet=options.quiet),
        first.held(step) as (one, _),
        second.held(with_step) as (other, _),
    ):
        found = difference.between(one, other)
    print(f"{first.name(step)}\n{second.name(with_step)}")
    for kind, lines in (("knob", found.knobs), ("fact", found.facts)):
        print(*(f"{kind}  {line}" for line in lines), sep="\n", end="\n" * bool(lines))
    if found.rows:
        head = ("array", "largest difference", "relative", "")
        rows = [
            (row.name, f"{row.absolute:.3e}", f"{row.relative:.3e}", row.what)
            for row in found.rows
        ]
        print(*listing.columns([head, *rows], right=(1, 2)), sep="\n")
    print(f"{found.num_equal:,} arrays are equal, {len(found.rows):,} are not")
    return EXIT_DONE if found.is_none else EXIT_USER_ERROR


COMMAND = Command(
    group="Use a model",
    summary="say in what two checkpoints differ, array by array",
    description="""\
Compares two checkpoints, of one run or of two: knobs, data, and every array. Of one
that differs, the largest difference of two elements is said, and that over the largest
magnitude in the first.

  switchyard checkpoint diff --model_dir=runs/demo --step=100 --with_step=200
  switchyard checkpoint diff --model_dir=runs/demo --with_dir=runs/other

Arrays whose digests agree are equal, and are not read.
""",
    exit_codes={
        EXIT_DONE: "arrays, configuration, step and data are the same",
        EXIT_USER_ERROR: "something differs, or cannot be read",
        EXIT_FAULT: "",
    },
    options=DiffOptions,
    reads=kept_by_run,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [config.settings.loop.model_dir],
    run=run,
)
