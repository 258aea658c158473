"""The loop around the train step: what happens between two steps, and when.

The next step is launched before the numbers of the last are fetched, so devices never
wait for the host.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np

from launch.assemble import Run
from launch.checkpoints import Checkpoints
from launch.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_NON_FINITE, EXIT_PREEMPTED
from launch.feed import Feed
from launch.progress import TrainProgress
from launch.writers import MetricWriter
from moe.training.state import TrainState
from tasks.batches import Batches

Record = dict[str, Any]
_STATE_METRICS = "state/skipped_in_a_row"


@dataclasses.dataclass
class Signals:
    """Which signal asked the run to stop, if any."""

    received: int | None = None


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls between steps.

    Attributes:
        train_step: compiled; donates its state.
        score: held-out metrics of parameters, on some or on all (0) batches.
        provenance: what a checkpoint says of its origin.
    """

    train_step: Callable[[TrainState, Any], tuple[TrainState, Record]]
    score: Callable[[Any, int], Record]
    provenance: Record


def train(
    run: Run,
    state: TrainState,
    batches: Batches,
    hooks: Hooks,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    progress: TrainProgress,
) -> tuple[TrainState, int]:
    """Takes steps until the last one, a signal, or too many non-finite steps.

    However it ends, the state is saved first, unless it is the one already saved.

    Returns:
        The last state and the exit code.
    """
    settings, loop = run.settings, run.settings.loop
    step, data_index = int(state.step), int(state.data_index)
    last, saved_step = settings.train.train_steps, step
    tokens = settings.train.batch_size * settings.data.length
    feed = Feed(
        batches.read,
        start=data_index,
        stop=data_index + last - step,
        shape=(settings.train.batch_size, settings.data.length),
        sharding=run.batch_sharding,
    )
    pending: tuple[int, Record, float] | None = None
    clock = _StepClock(tokens)

    def take(pending: tuple[int, Record, float]) -> int:
        """Fetches, shows and writes the metrics of a step; returns skips in a row."""
        number, metrics, waited = pending
        record = _record(number, metrics) | clock.tick(waited)
        progress.update(record)
        if number % loop.log_period_steps == 0 or number in (1, last):
            writer.write(record)
        return int(record[_STATE_METRICS])

    def save() -> None:
        writer.flush()
        checkpoints.save(state, run, hooks.provenance)

    code = EXIT_DONE
    with listening() as signals, feed:
        for batch in feed:
            state, metrics = hooks.train_step(state, batch)
            step += 1
            due_eval = step % loop.eval_period_steps == 0 and step < last
            due_save = step % loop.checkpoint_period_steps == 0
            previous, pending = pending, (step, metrics, feed.wait_seconds)
            skipped = take(previous) if previous else 0
            if due_eval or due_save or signals.received or step == last:
                skipped, pending = take(pending), None
            if skipped >= loop.max_skipped_steps:
                code = EXIT_NON_FINITE
                break
            if due_eval:
                record = hooks.score(state.params, loop.eval_batches)
                record = {"step": step, "split": "heldout"} | record
                writer.write(record)
                progress.update(record)
                clock.pause()
            if due_save:
                save()
                saved_step = step
                clock.pause()
            if signals.received and step < last:
                interrupted = signals.received == signal.SIGINT
                code = EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED
                break
        if pending is not None:
            take(pending)
        if step != saved_step and code != EXIT_NON_FINITE:
            save()
        with progress.waiting("finishing the checkpoint"):
            checkpoints.wait()
    return state, code


class _StepClock:
    """Times steps; what happens between them is left out."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens = tokens_per_step
        self._last = time.perf_counter()

    def tick(self, waited: float) -> Record:
        """Ends a step and returns its pace."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return {
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": self._tokens / seconds,
            "perf/data_wait_seconds": waited,
        }

    def pause(self) -> None:
        """Starts timing afresh after something that is not a step."""
        self._last = time.perf_counter()


def _record(step: int, metrics: Record) -> Record:
    """Brings metrics to the host: numbers, and lists where there are several."""
    fetched = jax.device_get(metrics)
    values = {name: np.asarray(value).tolist() for name, value in fetched.items()}
    return {"step": step, "split": "train", **values}


@contextmanager
def listening() -> Iterator[Signals]:
    """Notes SIGINT and SIGTERM instead of dying; the second one is not caught."""
    signals = Signals()
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signals.received = number
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
