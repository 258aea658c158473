"""`switchyard report`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, Options, kept_by_run, option
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """What `report` accepts."""

    model_dir: str = option("folder of the run", ..., metavar="DIR")


def run(config: "ResolvedConfig", options: ReportOptions) -> int:
    """Makes the page from the metrics that there are, while a run goes on or after."""
    from launch.report.about import load
    from launch.report.run import write_report
    from launch.terminal.lines import waiting

    model_dir = config.settings.loop.model_dir
    about = load(model_dir)
    with waiting("writing the report", quiet=options.quiet):
        print(write_report(model_dir, about))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="make the page of a run again, also while it goes on",
    description="""\
Makes MODEL_DIR/report.html from the metrics of a run: during it, or after it.

  switchyard report --model_dir=runs/demo
""",
    options=ReportOptions,
    reads=kept_by_run,
    devices=None,
    about=lambda config, options: [config.settings.loop.model_dir],
    run=run,
)
