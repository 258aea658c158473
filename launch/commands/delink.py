"""`switchyard delink`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, kept_by_run, option
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DelinkOptions(RunOptions):
    """What `delink` accepts."""

    to: str = option("folder of the run that is made", ..., metavar="DIR")


def run(config: "ResolvedConfig", options: DelinkOptions) -> int:
    """Gives each layer of a checkpoint a copy of what the layers shared."""
    from pathlib import Path

    from launch.checkpoints import delinking
    from launch.checkpoints.provenance import code
    from launch.checkpoints.there import There
    from launch.terminal.lines import waiting

    model_dir, to = Path(config.settings.loop.model_dir), Path(options.to).expanduser()
    there = There(model_dir)
    step = there.step(options.step)
    with (
        waiting(f"delinking step {step}", quiet=options.quiet),
        there.held(step) as (path, _),
    ):
        print(delinking.delink(model_dir, path, to, config.settings.layers, code()))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="give layers that shared parameters their own",
    description="""\
Makes a run folder of a checkpoint that was trained with LAYER_SHARING = "all". Each
layer gets a copy of the parameters that the layers shared, and of the optimizer's
state, so that the model computes what it did. Step and place in the data stay. Training
then goes on, and the layers become different:

  switchyard delink --model_dir=runs/shared --to=runs/own
  switchyard train --gin_file=runs/own/config.gin --gin.TRAIN_STEPS=2000

The config.gin that is written is that of the checkpoint, with LAYER_SHARING = "none"
and the new folder. What is read is compared with its digest.
""",
    options=DelinkOptions,
    reads=kept_by_run,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [config.settings.loop.model_dir, options.to],
    run=run,
)
