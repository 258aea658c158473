"""`switchyard checkpoint average`."""

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands import Command, Options, kept_by_run, option
from launch.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageOptions(Options):
    """What `checkpoint average` accepts."""

    checkpoint: tuple[str, ...] = option(
        "folder of a step, such as runs/demo/checkpoints/200; given several times",
        (),
        metavar="DIR",
    )
    to: str = option("folder of the run that is made", ..., metavar="DIR")


def reads(options: AverageOptions) -> tuple[list[str], list[str]]:
    """The configuration of the run of the first."""
    import os

    if not options.checkpoint:
        raise UsageError(
            "nothing to average: give --checkpoint=DIR twice or more, such as "
            "--checkpoint=runs/demo/checkpoints/200"
        )
    folder = os.path.join(options.checkpoint[0], os.pardir, os.pardir)
    return kept_by_run(types.SimpleNamespace(model_dir=os.path.normpath(folder)))


def run(config: "ResolvedConfig", options: AverageOptions) -> int:
    """Writes the mean of the parameters of several checkpoints."""
    from launch.checkpoints import average
    from launch.checkpoints.provenance import code
    from launch.terminal.lines import waiting

    names = [Path(one).expanduser().absolute() for one in options.checkpoint]
    with (
        waiting(f"averaging {len(names)} checkpoints", quiet=options.quiet),
        contextlib.ExitStack() as held,
    ):
        paths = [_held(name, held) for name in names]
        print(average.average(paths, Path(options.to), code(), names))
    return EXIT_DONE


def _held(path: Path, held: contextlib.ExitStack) -> Path:
    """The folder of a step, read from a bucket if the run's checkpoints are there."""
    from launch.checkpoints.there import There

    if path.is_dir() or not path.name.isdecimal():
        return path
    there = There(path.parents[1])
    return held.enter_context(there.held(there.step(int(path.name))))[0]


COMMAND = Command(
    group="Use a model",
    summary="average the parameters of several checkpoints",
    description="""\
Makes a run folder whose parameters are the mean of those of several checkpoints, of one
run or of several of the same model and vocabulary. `evaluate` and `generate` take it.

  switchyard checkpoint average --checkpoint=runs/demo/checkpoints/150 \\
      --checkpoint=runs/demo/checkpoints/200 --to=runs/demo_mean
  switchyard evaluate --model_dir=runs/demo_mean

The mean is computed in float32, piece by piece, and kept in the type that parameters
have. What is read is compared with its digest. The step is the latest of those given;
the configuration is that of the first.
""",
    options=AverageOptions,
    reads=reads,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [options.to],
    run=run,
)
