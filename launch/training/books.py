"""What is kept of a run beside its checkpoints: metrics, events, its use of time."""

import contextlib
import dataclasses
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from launch.config.diff import Change
from launch.job import together
from launch.records.events import EventLog
from launch.records.goodput import Clock
from launch.records.lines import last_step
from launch.records.write import MetricWriter, NoMetrics
from launch.terminal.training import TrainProgress
from launch.training.finish import Life, writer_of


@dataclasses.dataclass(frozen=True)
class Books:
    """What is kept of a run beside its checkpoints.

    Attributes:
        writer: metrics.
        events: what happened, and when.
        clock: where the time goes.
        progress: what the user watches.
    """

    writer: MetricWriter | NoMetrics
    events: EventLog
    clock: Clock
    progress: TrainProgress

    def note(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Notes an event, and where the time of this life has gone so far."""
        clock = self.clock
        self.events.note(
            event, step, steps=clock.steps, seconds=clock.seconds(), **facts
        )

    def waiting(
        self, part: str
    ) -> Callable[[str], contextlib.AbstractContextManager[None]]:
        """Returns what shows a message, and counts the time for a part."""

        @contextlib.contextmanager
        def during(message: str) -> Iterator[None]:
            with self.clock.of(part), self.progress.waiting(message):
                yield

        return during


@contextlib.contextmanager
def opened(
    life: Life,
    found: int | None,
    last: int,
    clock: Clock,
    changed: Sequence[Change],
) -> Iterator[Books]:
    """Opens the books of a run, and notes that a life begins.

    Args:
        life: what the run is.
        found: step that it goes on from; None if it starts afresh.
        last: last step.
        clock: clock of this life, which may have begun before.
        changed: knobs that are not as they were.
    """
    began, folder = found or 0, life.model_dir
    lost = max((last_step(folder) or began) - began, 0)  # metrics tell of them alone
    with (
        writer_of(life, resume_step=began) as writer,
        contextlib.closing(EventLog(folder if together.is_first() else None)) as log,
        TrainProgress(last, start_step=began, quiet=life.quiet) as progress,
    ):
        log.note(
            "start",
            command=" ".join(["switchyard", *sys.argv[1:]]),
            version=importlib.metadata.version("switchyard"),
            jax=jax.__version__,
            processes=jax.process_count(),
            devices=f"{jax.device_count()} {jax.devices()[0].device_kind}",
        )
        if found is not None:
            log.note("resume", found, lost_steps=lost)
        if changed:
            log.note("changes", found, knobs=[str(change) for change in changed])
        yield Books(writer, log, clock, progress)
