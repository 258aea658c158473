"""The metrics of each step: fetched while the next one runs, written and shown."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from launch.records.write import MetricWriter, NoMetrics
from launch.terminal.training import TrainProgress

if TYPE_CHECKING:
    from launch.training.steps import Launched

Record = dict[str, Any]


class Log:
    """Fetches, writes and shows the metrics of each step while the next one runs."""

    def __init__(
        self,
        writer: MetricWriter | NoMetrics,
        progress: TrainProgress,
        data_facts: Callable[[int], Record],
        *,
        period_steps: int,
        last_step: int,
        tokens_per_step: int,
    ) -> None:
        self.skipped_in_a_row = 0
        self._steps = self._steps_again = 0
        self._writer = writer
        self._progress = progress
        self._data_facts = data_facts
        self._period = period_steps
        self._last_step = last_step
        self._tokens = tokens_per_step
        self._clock = time.perf_counter()

    def add(self, launched: "Launched", *, again: bool) -> None:
        """Waits for a step and deals with its metrics."""
        step = launched.step
        record = _record(step, launched.metrics)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._steps += 1
        self._steps_again += again
        record |= {
            "perf/steps_since_start": self._steps,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/data_wait_seconds": launched.waited_seconds,
            "perf/steps_taken_again": self._steps_again,
        }
        self.skipped_in_a_row = int(record["state/skipped_in_a_row"])
        self._progress.update(record)
        if step % self._period == 0 or step in (1, self._last_step):
            self._writer.write(record | self._data_facts(launched.index + 1))

    def score(self, step: int, metrics: Record) -> None:
        """Writes and shows held-out metrics."""
        record = {"step": step, "split": "heldout"} | metrics
        self._writer.write(record)
        self._progress.update(record)

    def pause(self) -> None:
        """Keeps what happened between two steps out of the next one's time."""
        self._clock = time.perf_counter()


def _record(step: int, metrics: Record) -> Record:
    """Brings metrics to the host: numbers, and lists where there are several."""
    fetched = jax.device_get(metrics)
    values = {
        # Counts of layers are added up here, where integers have no bounds.
        name: sum(np.asarray(value).tolist())
        if name.startswith("ledger/")
        else np.asarray(value).tolist()
        for name, value in fetched.items()
    }
    return {"step": step, "split": "train", **values}
