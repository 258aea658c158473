"""`switchyard checkpoint inspect`."""

from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, kept_by_run
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


def run(config: "ResolvedConfig", options: RunOptions) -> int:
    """Lists the checkpoints of a run, or all about one of them."""
    from launch.checkpoints import listing
    from launch.checkpoints.there import There

    model_dir = config.settings.loop.model_dir
    if options.step is None:
        print("\n".join(listing.of_run(model_dir)))
        return EXIT_DONE
    there = There(model_dir)
    print("\n".join(listing.of_step(there, there.step(options.step))))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="list the checkpoints of a run, or the arrays of one",
    description="""\
Lists the checkpoints of a run: step, bytes, time, held-out loss, code. With --step, all
that one says of itself: code, command, libraries, machines, parents, arrays.

  switchyard checkpoint inspect --model_dir=runs/demo
  switchyard checkpoint inspect --model_dir=runs/demo --step=200

The arrays are not read, and the hardware that they were made on is not needed.
""",
    options=RunOptions,
    reads=kept_by_run,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [config.settings.loop.model_dir],
    run=run,
)
