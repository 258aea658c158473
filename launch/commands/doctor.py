"""`switchyard doctor`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, Options, devices_in_words, option
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig

# Only their folders and devices matter: a run of no size, on what this machine has.
_ANY = ["runs/tiny.gin", "hardware/here.gin"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions(Options):
    """What `doctor` accepts."""

    json: str | None = option("write all that was found there", metavar="FILE")


def reads(options: DoctorOptions) -> tuple[list[str], list[str]]:
    """Returns a configuration for whoever asks about the machine alone."""
    return ([] if options.gin_file else _ANY), []


def about(config: "ResolvedConfig", options: DoctorOptions) -> list[str]:
    """Devices and folders that are asked about."""
    if not options.gin_file:
        return ["this machine, for no run of its own"]
    loop, data = config.settings.loop, config.settings.data
    return [devices_in_words(config), loop.model_dir, data.store_dir]


def run(config: "ResolvedConfig", options: DoctorOptions) -> int:
    """Looks at this machine, and shows what was found."""
    from launch.doctor.examine import examine

    return examine(
        config,
        has_config=bool(options.gin_file),
        json_file=options.json,
        quiet=options.quiet,
    )


COMMAND = Command(
    group="Before paying for a pod",
    summary="say whether this machine can run it, and what to change",
    description="""\
Says whether this machine is fit to run Switchyard, and if not, what to change.

  switchyard doctor
  switchyard doctor --gin_file=mine.gin --json=doctor.json
  switchyard doctor --gin_file=mine.gin --gin.NUM_PROCESSES=0

Looks at versions, devices, flags of compilers, memory, folders (64 MB are written there
and removed), locks, what preparing needs, and encodings; with a gin file at those of
that run. Started as a job of several processes, as `train` is, it compares their clocks
and measures the network between them. Of the environment it shows what is on a list,
and no password. Nothing stays behind. docs/doctor.md explains the lines.
""",
    exit_codes={
        EXIT_DONE: "fit, perhaps with notes",
        EXIT_USER_ERROR: "there is a problem, and what to change",
        EXIT_FAULT: "",
    },
    options=DoctorOptions,
    about=about,
    keeps_nothing=True,
    run=run,
    reads=reads,
)
