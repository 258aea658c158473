"""`switchyard train`."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from launch.commands import (
    Command,
    Options,
    allow_module,
    allowed_modules,
    devices_in_words,
    option,
)
from launch.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_NON_FINITE,
    EXIT_PREEMPTED,
    EXIT_STALLED,
    EXIT_USER_ERROR,
    UsageError,
)

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """What `train` accepts."""

    dry_run: bool = option(
        "say what the run would do, on any hardware, and stop before it does anything",
        False,
    )
    self_check: Literal["on", "off"] | None = option(
        "compare the sparse layer with the oracle on these devices, and the CPU's "
        "compiler with NumPy, before training; sets SELF_CHECK",
        macro="SELF_CHECK",
    )
    restarts: int = option(
        "run in a child process, and start it again, at most so often, when it dies of "
        "a fault, a lost process, a step that hangs or a signal that nobody sent it "
        "through here",
        0,
        metavar="N",
    )
    allow_module: bool = allow_module()
    allow_changes: bool = option(
        "go on from a checkpoint of another model, or of other data, as far as the "
        "arrays fit",
        False,
    )


def devices(config: "ResolvedConfig", options: TrainOptions) -> "ResolvedConfig":
    """Those of the run; of a dry run the CPU, whatever the run is for.

    Devices of a CPU that a job would have together are simulated in one process.
    """
    if not options.dry_run:
        return config
    platform = config.settings.platform
    alone = dataclasses.replace(
        platform,
        num_processes=1,
        simulated_devices=platform.simulated_devices * max(platform.num_processes, 1),
        coordinator_address="",
        process_id=-1,
    )
    if platform.name in ("tpu", "cuda"):  # flags of their compilers are not for it
        alone = dataclasses.replace(
            alone,
            name="cpu",
            xla_flags=(),
            libtpu_init_args=(),
            compilation_cache_dir="",
        )
    settings = dataclasses.replace(config.settings, platform=alone)
    return dataclasses.replace(config, settings=settings)


def restarts(options: TrainOptions) -> int:
    """How often a run that dies is started again.

    Raises:
        UsageError: a negative number.
    """
    if options.restarts < 0:
        raise UsageError(f"--restarts={options.restarts} cannot be negative")
    return 0 if options.dry_run else options.restarts


def about(config: "ResolvedConfig", options: TrainOptions) -> list[str]:
    """Devices of the run, and its folder."""
    words = devices_in_words(config)
    dry = f"dry run for {words}" if options.dry_run else words
    return [dry, config.settings.loop.model_dir]


def run(config: "ResolvedConfig", options: TrainOptions) -> int:
    """Trains, or says what training would do."""
    from launch.run import user_code

    config = user_code.admitted(config, allowed=options.allow_module)
    if options.dry_run:
        from launch.planning.hardware import described
        from launch.run import dry_run

        if config.settings.loop.start_from:
            from launch.checkpoints import beginning  # with all that restores

            allowed = options.allow_changes
            print("\n".join(beginning.described(config, allow_changes=allowed)))
        return dry_run.show(config, *described.devices(config))
    from launch.training import start

    return start.train(
        config,
        quiet=options.quiet,
        allowed_modules=allowed_modules(config, options),
        allow_changes=options.allow_changes,
    )


COMMAND = Command(
    group="Train",
    summary="train a model, or resume its training",
    description="""\
Trains a model. Prepares the tokens first, if they are not there yet.

Gin files give values to knobs: upper-case macros such as NUM_EXPERTS. configs/base.gin
lists them all, with default, unit and paper. Files are read in their order, then the
knobs of the command line; what is later wins:

  switchyard train --gin_file=configs/runs/demo.gin --gin.TRAIN_STEPS=50
  switchyard train --gin_file=configs/runs/demo.gin \\
      --gin_file=configs/models/demo_glam.gin --gin.MODEL_DIR=runs/demo_glam
  switchyard train --gin_file=mine.gin --gin.LEARNING_RATE=3e-4 --gin.DTYPE=float32

Text needs no quotes there; a tuple or dict needs those of the shell:
--gin.TASK_FEATURE_LENGTHS="{'targets': 512}". A gin file is sought in the working
directory, then among those of Switchyard; an include beside its file first. A file in a
folder models/ or hardware/ says all of its kind, and leaves nothing of one before it.
""",
    ending="""\
MODEL_DIR holds, while the run goes on: config.gin (every knob, its value, and the line
that set it; configs/ has that of each start), the vocabulary, checkpoints, metrics, and
a report.

Resuming: the same command again continues from the newest checkpoint in MODEL_DIR, as
if it had never stopped. It may run on another mesh. What has changed since is said; a
change to another model, or other data, is refused without --allow_changes. Take another
MODEL_DIR to start afresh. --restarts=5 does that by itself, up to five times, and gives
up when two starts in a row save nothing new.

START_FROM begins a new run with parameters of another run: all, or those that
START_PATTERNS match. What becomes of each array is printed: loaded, new or ignored.
""",
    exit_codes=dict.fromkeys(
        (
            EXIT_DONE,
            EXIT_USER_ERROR,
            EXIT_NON_FINITE,
            EXIT_PREEMPTED,
            EXIT_FAULT,
            EXIT_STALLED,
            EXIT_INTERRUPTED,
            EXIT_LOST_PROCESS,
        ),
        "",
    ),
    options=TrainOptions,
    devices=devices,
    restarts=restarts,
    about=about,
    run=run,
)
