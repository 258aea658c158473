"""The loop around the train step: what happens between two steps, and when.

The next step is launched before the numbers of the last are fetched, so devices never
wait for the host.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch.checkpoints.store import Checkpoints
from launch.checkpoints.times import Times
from launch.config.settings import LoopSettings
from launch.errors import EXIT_DONE, EXIT_NON_FINITE, is_user_error
from launch.job.signals import Signals, Stopped
from launch.records.write import MetricWriter, NoMetrics
from launch.run.assemble import Run
from launch.run.feed import Feed
from launch.terminal.training import TrainProgress
from moe.training.train_state import TrainState
from tasks.batches import Batches

Record = dict[str, Any]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, Record]]


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls between steps.

    Attributes:
        train_step: compiled; donates its state.
        in_rounds: returns the compiled step that always fits the row budget.
        score: held-out metrics of parameters, on some or on all (0) batches.
        measure: the Tasks' own metrics of parameters, at a step; None where none are
            asked for.
        data_facts: what is known of the data before a batch index.
        provenance: what a checkpoint says of its origin.
    """

    train_step: Step
    in_rounds: Callable[[], Step]
    score: Callable[[Any, int], Record]
    measure: Callable[[Any, int], Record] | None
    data_facts: Callable[[int], Record]
    provenance: Record


def train(
    run: Run,
    state: TrainState,
    batches: Batches,
    hooks: Hooks,
    checkpoints: Checkpoints,
    writer: MetricWriter | NoMetrics,
    progress: TrainProgress,
    signals: Signals,
    *,
    was_scored: bool,
) -> tuple[TrainState, int]:
    """Takes steps until the last one, a signal, or too many non-finite steps.

    A run that is asked to stop saves first, and so does one that cannot read on; one
    that gives up does not.

    Args:
        run: the assembled run.
        state: state to go on from.
        batches: what is learnt from.
        hooks: what is called between steps.
        checkpoints: where states are saved.
        writer: keeps metrics.
        progress: shows them.
        signals: says when to stop.
        was_scored: whether held-out metrics of the first state are kept already, or
            it is of step 0. Otherwise they are made first, if they are due: who saved
            it may have ended before.
    Returns:
        The last state and the exit code.
    Raises:
        StoreError: the data cannot be read on.
    """
    settings, loop = run.settings, run.settings.loop
    step, data_index = int(state.step), int(state.data_index)
    last = settings.train.train_steps
    shape = (settings.train.batch_size, settings.data.length)
    feed = Feed(
        batches.read,
        start=data_index,
        stop=data_index + last - step,
        shape=shape,
        sharding=run.batch_sharding,
    )
    log = _Log(
        writer,
        progress,
        hooks.data_facts,
        period_steps=loop.log_period_steps,
        last_step=last,
        tokens_per_step=math.prod(shape),
    )
    steps = Steps(state, hooks, log)
    times = Times(loop.checkpoint_minutes)
    between = _Between(steps, run, hooks, checkpoints, writer, log, times, step)
    code, fault = EXIT_DONE, None
    with signals.noted(), feed:
        try:
            if not was_scored:
                between(step, _due(step, loop, last) - {"save"})
            for index in range(data_index, data_index + last - step):
                batch, fault = _next(feed)
                if batch is None:
                    steps.settle()
                    break
                step += 1
                steps.take(Launched(step, index, batch, feed.wait_seconds))
                code = signals.asked()
                due = times.due(_due(step, loop, last), step)
                if due or code:
                    steps.settle()
                if log.skipped_in_a_row >= loop.max_skipped_steps:
                    code = EXIT_NON_FINITE
                    break
                due = times.unless_stalled(due, step < last and log.skipped_in_a_row)
                # Whoever asked to stop may not wait for scores.
                between(step, {"save"} if code else due)
                if code:
                    break
        except Stopped as stopped:
            code = stopped.code
            between.save(step)
        if fault and not log.skipped_in_a_row:
            between.save(step)
        with progress.waiting("finishing the checkpoint"):
            checkpoints.wait()
    if fault:
        raise fault
    return steps.state, code


def _next(feed: Feed) -> tuple[Any, Exception | None]:
    """The next batch; or None, and what is wrong with the data.

    A process alone can save what it has learnt before it says so. Of several, the
    others already wait for it in their next step.
    """
    try:
        return next(feed), None
    except Exception as error:
        if not is_user_error(error) or jax.process_count() > 1:
            raise
        return None, error


def _due(step: int, loop: LoopSettings, last: int) -> set[str]:
    """What is to be done after a step."""
    periods = {
        "score": loop.eval_period_steps,
        "measure": loop.task_metrics_period_steps,
        "save": loop.checkpoint_period_steps,
    }
    due = {what for what, period in periods.items() if period and step % period == 0}
    # After the last step all is scored, and always saved.
    return due if step < last else {"save"}


@dataclasses.dataclass
class _Between:
    """What is done after a step, before the next one."""

    steps: "Steps"
    run: Run
    hooks: Hooks
    checkpoints: Checkpoints
    writer: MetricWriter | NoMetrics
    log: "_Log"
    times: Times
    saved_step: int

    def __call__(self, step: int, due: set[str]) -> None:
        """Does what is due; saves first: scores can be made again from what is saved.

        Raises:
            Stopped: the run was asked to stop while it scored.
        """
        if "save" in due:
            self.save(step)
        params, scores = self.steps.state.params, Record()
        if "score" in due:
            scores |= self.hooks.score(params, self.run.settings.loop.eval_batches)
        if "measure" in due and self.hooks.measure is not None:
            scores |= self.hooks.measure(params, step)
        if scores:  # of one split and step there is one record
            self.log.score(step, scores)
            self.checkpoints.scored(step, scores)
        if due:
            self.log.pause()

    def save(self, step: int) -> None:
        """Saves the state, and what was written of it, unless it is saved already."""
        if self.saved_step == step:
            return
        self.writer.flush()
        self.checkpoints.save(self.steps.state, self.run, self.hooks.provenance)
        self.saved_step = step
        self.times.saved()


@dataclasses.dataclass
class Launched:
    """A step on its way: its number, its batch, and in the end its metrics."""

    step: int
    index: int
    batch: Any
    waited_seconds: float
    metrics: Record = dataclasses.field(default_factory=dict)


class Steps:
    """Launches each step before the one before has been looked at.

    A step that found no room for its rows left the state as it was, and so did the one
    launched after it: the first is taken again in rounds, then the second.
    """

    def __init__(self, state: TrainState, hooks: Hooks, log: "_Log") -> None:
        self.state = state
        self._hooks = hooks
        self._log = log
        self._pending: Launched | None = None

    def take(self, launched: Launched) -> None:
        """Launches a step, and settles the one before."""
        before, self._pending = self._pending, launched
        self._launch(launched, self._hooks.train_step)
        if before is not None and not self._settled(before):
            self._launch(launched, self._hooks.train_step)

    def settle(self) -> None:
        """Waits for the step that was launched last."""
        if self._pending is not None:
            launched, self._pending = self._pending, None
            self._settled(launched)

    def _launch(self, launched: Launched, step: Step) -> None:
        index = np.int32(launched.index)
        self.state, launched.metrics = step(self.state, launched.batch, index)

    def _settled(self, launched: Launched) -> bool:
        """Logs a step that is done; False if it had to be taken again."""
        fitted = bool(launched.metrics["state/taken"])
        if not fitted:
            too_many = launched.metrics["router/over_budget_rows"]
            self._launch(launched, self._hooks.in_rounds())
            assert launched.metrics["state/taken"], "rounds make room for everything"
            launched.metrics["router/over_budget_rows"] = too_many
        self._log.add(launched, again=not fitted)
        return fitted


class _Log:
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

    def add(self, launched: Launched, *, again: bool) -> None:
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
