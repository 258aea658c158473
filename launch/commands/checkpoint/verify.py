"""`switchyard checkpoint verify`."""

from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, kept_by_run
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


def run(config: "ResolvedConfig", options: RunOptions) -> int:
    """Reads checkpoints whole, and says of each what is damaged."""
    from launch.checkpoints.there import There
    from launch.terminal.lines import waiting

    there = There(config.settings.loop.model_dir)
    newest = there.step(options.step)
    steps = there.steps if options.step is None else [newest]
    damaged = 0
    for step in steps:
        with waiting(f"reading step {step}", quiet=options.quiet):
            verdict = there.verdict(step)
        damaged += bool(verdict.faults)
        size = f"{verdict.num_arrays:,} arrays, {verdict.num_bytes:,} bytes"
        print(f"step {step:,}: {size}: {'damaged' if verdict.faults else 'whole'}")
        for fault in verdict.faults:
            print(f"  {fault}")
    if damaged:
        print(f"{damaged:,} of {len(steps):,} damaged")
    return EXIT_USER_ERROR if damaged else EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="read checkpoints whole, and say what is damaged",
    description="""\
Reads every array of a checkpoint, or of all of a run, and compares it with the digest
that was taken on the devices before it was saved.

  switchyard checkpoint verify --model_dir=runs/demo
  switchyard checkpoint verify --model_dir=runs/demo --step=200

Each damaged file and array is named. It needs memory for a few pieces of an array,
and no devices: a checkpoint of a pod can be verified on a laptop.
""",
    exit_codes={
        EXIT_DONE: "all are whole",
        EXIT_USER_ERROR: "one is damaged, or cannot be read",
        EXIT_FAULT: "",
    },
    options=RunOptions,
    reads=kept_by_run,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [config.settings.loop.model_dir],
    run=run,
)
