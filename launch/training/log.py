"""The metrics of steps: fetched while the next one runs, shown, merged and written."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from launch.records.merge import Merged
from launch.records.write import MetricWriter, NoMetrics
from launch.terminal.training import TrainProgress

if TYPE_CHECKING:
    from launch.training.steps import Launched

Record = dict[str, Any]


class Log:
    """Fetches and shows the metrics of each step, and writes what several amount to.

    A record stands for all steps since the one before. One is written every so many
    steps, of the first and the last, and before the writer is flushed, so that what a
    checkpoint has learnt from is recorded when it commits.

    Args:
        writer: keeps the records.
        progress: shows each step.
        data_facts: what is known of the data before a batch index.
        period_steps: between records.
        last_step: number of the run's last step.
        tokens_of: positions in a batch by its index, by which the speed is told.

    Attributes:
        skipped_in_a_row: non-finite steps up to the last.
    """

    def __init__(
        self,
        writer: MetricWriter | NoMetrics,
        progress: TrainProgress,
        data_facts: Callable[[int], Record],
        *,
        period_steps: int,
        last_step: int,
        tokens_of: Callable[[int], int],
    ) -> None:
        self.skipped_in_a_row = 0
        self._steps = self._steps_again = 0
        self._writer = writer
        self._progress = progress
        self._data_facts = data_facts
        self._period = period_steps
        self._last_step = last_step
        self._tokens_of = tokens_of
        self._clock = time.perf_counter()
        self._last: tuple[int, int] | None = None
        self._begin()
        writer.before_flush = self.write

    def add(self, launched: "Launched", *, again: bool) -> None:
        """Waits for a step and deals with its metrics."""
        metrics = jax.device_get(launched.metrics)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._steps += 1
        self._steps_again += again
        self._merged.add(metrics)
        if self._steps == 2:  # the first of a start is slower, and counts alone only
            self._timed, self._tokens, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._timed += 1
        tokens = self._tokens_of(launched.index)
        self._tokens += tokens
        self._seconds += seconds
        self._waited += launched.waited_seconds
        self._last = launched.step, launched.index
        self.skipped_in_a_row = int(metrics["state/skipped_in_a_row"])
        shown = {n: np.asarray(v) for n, v in metrics.items() if "ledger/" not in n}
        self._progress.update(
            {"step": launched.step, "split": "train"}
            | {name: v.item() if v.ndim == 0 else v for name, v in shown.items()}
            | self._perf(1, tokens, seconds, launched.waited_seconds)
        )
        if launched.step % self._period == 0 or launched.step in (1, self._last_step):
            self.write()

    def write(self) -> None:
        """Writes what the steps since the last record amount to, if there are any."""
        if self._last is None:
            return
        step, index = self._last
        self._writer.write(
            {"step": step, "split": "train"}
            | self._merged.record()
            | self._perf(self._timed, self._tokens, self._seconds, self._waited)
            | self._data_facts(index + 1)
        )
        self._begin()

    def score(self, step: int, metrics: Record) -> None:
        """Writes and shows held-out metrics."""
        record = {"step": step, "split": "heldout"} | metrics
        self._writer.write(record)
        self._progress.update(record)

    def pause(self) -> None:
        """Keeps what happened between two steps out of the next one's time."""
        self._clock = time.perf_counter()

    def _begin(self) -> None:
        """Begins the next record."""
        self._merged = Merged()
        self._timed, self._tokens, self._seconds, self._waited = 0, 0, 0.0, 0.0
        self._last = None

    def _perf(self, steps: int, tokens: int, seconds: float, waited: float) -> Record:
        """Speed over some steps."""
        return {
            "perf/steps_since_start": self._steps,
            "perf/step_seconds": seconds / steps,
            "perf/tokens_per_second": tokens / seconds,
            "perf/data_wait_seconds": waited / steps,
            "perf/steps_taken_again": self._steps_again,
        }
