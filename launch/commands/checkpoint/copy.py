"""`switchyard checkpoint copy`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, kept_by_run, option
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopyOptions(RunOptions):
    """What `checkpoint copy` accepts."""

    to: str = option("folder of the run that gets it", ..., metavar="DIR")


def run(config: "ResolvedConfig", options: CopyOptions) -> int:
    """Copies one checkpoint, and what it is used with."""
    from pathlib import Path

    from launch.checkpoints import copying
    from launch.checkpoints.there import There
    from launch.terminal.lines import waiting

    model_dir = Path(config.settings.loop.model_dir)
    there = There(model_dir)
    step = there.step(options.step)
    with (
        waiting(f"copying step {step}", quiet=options.quiet),
        there.held(step) as (path, _),
    ):
        print(copying.copy(model_dir, path, Path(options.to)))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="copy a checkpoint to another folder, verified",
    description="""\
Copies a checkpoint of a run to another folder, with the run's config.gin and vocabulary
unless they are there: `evaluate`, `generate` and `train` take that folder.

  switchyard checkpoint copy --model_dir=runs/demo --step=200 --to=/backup/demo

The copy is read back, and appears under its name when every digest is right; until then
it is STEP.orbax-checkpoint-tmp, and an error leaves nothing of it.
""",
    options=CopyOptions,
    reads=kept_by_run,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [config.settings.loop.model_dir, options.to],
    run=run,
)
