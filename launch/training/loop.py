"""The loop around the train step: what happens between two steps, and when.

The next step is launched before the numbers of the last are fetched, so devices never
wait for the host.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from launch.checkpoints import replicas
from launch.checkpoints.names import named_arrays
from launch.checkpoints.store import Checkpoints
from launch.checkpoints.times import Times
from launch.config.settings import LoopSettings
from launch.errors import EXIT_DONE, EXIT_NON_FINITE, is_user_error
from launch.job.signals import Signals, Stopped
from launch.job.watchdog import Watchdog
from launch.run.assemble import Run
from launch.run.feed import Feed
from launch.training.books import Books
from launch.training.log import Log
from launch.training.steps import Launched, Record, Step, Steps
from launch.training.watch import Watch
from moe.training.train_state import TrainState
from tasks.batches import Batches


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
        go_back: returns the state of the newest checkpoint and what it kept for
            `Watch`; of none the state that the run began with.
        provenance: what a checkpoint says of its origin.
        still_ours: ends the process if another run has taken its folder.
        prepare: compiles what batches of so many rows need, unless that is done.
    """

    train_step: Step
    in_rounds: Callable[[], Step]
    score: Callable[[Any, int], Record]
    measure: Callable[[Any, int], Record] | None
    data_facts: Callable[[int], Record]
    go_back: Callable[[], tuple[TrainState, Mapping[str, Any] | None]]
    provenance: Record
    still_ours: Callable[[], None] = lambda: None
    prepare: Callable[[int], None] = lambda rows: None


def train(
    run: Run,
    state: TrainState,
    batches: Batches,
    hooks: Hooks,
    checkpoints: Checkpoints,
    books: Books,
    signals: Signals,
    *,
    kept: Mapping[str, Any] | None,
    was_scored: bool,
) -> tuple[TrainState, int]:
    """Takes steps until the last one, a signal, or too many non-finite steps.

    A run that is asked to stop saves first, and so does one that cannot read on. One
    that learns nothing any more goes back to its newest checkpoint and passes over the
    data since; one that has done so too often gives up, and does not save.

    Args:
        run: the assembled run.
        state: state to go on from.
        batches: what is learnt from.
        hooks: what is called between steps.
        checkpoints: where states are saved.
        books: what else is kept.
        signals: says when to stop.
        kept: what the checkpoint of the state kept for `Watch`; None if there is none.
        was_scored: whether held-out metrics of the first state are kept already, or
            it is of step 0. Otherwise they are made first, if they are due: who saved
            it may have ended before.
    Returns:
        The last state and the exit code.
    Raises:
        StoreError: the data cannot be read on.
    """
    loop = run.settings.loop
    hashed = run.settings.layers.hashed
    watch = Watch(loop, books.events, books.progress.say, kept, hashed)
    watchdog = Watchdog(loop.step_timeout_seconds)
    log = Log(
        books.writer,
        books.progress,
        hooks.data_facts,
        period_steps=loop.log_period_steps,
        last_step=run.settings.train.train_steps,
        tokens_of=lambda index: batches.sizes.of(index) * run.settings.data.length,
    )
    times = Times(loop.checkpoint_minutes)
    between = _Between(
        *(run, hooks, checkpoints, books, log, watch, times, int(state.step)),
        batches.sizes.of(int(state.data_index)),
    )
    with signals.noted(), watchdog:
        while True:
            steps = Steps(
                state,
                hooks.train_step,
                watchdog.not_counting(hooks.in_rounds),  # it may compile
                log,
                watch,
                replay_period_steps=loop.replay_period_steps,
            )
            code, fault = _walk(
                run, steps, batches, between, signals, watchdog, was_scored=was_scored
            )
            if not watch.going_back or code != EXIT_NON_FINITE:
                break
            if watch.rollbacks >= loop.max_rollbacks:
                _give_up(books, watch, loop)
                break
            with watchdog.paused():
                state = _gone_back(steps, hooks, checkpoints, books, between)
            was_scored = True
        with (
            watchdog.paused(),
            books.progress.waiting("finishing the checkpoint"),
            books.clock.of("save"),
        ):
            if fault and not watch.skipped_in_a_row:
                between.save(steps, int(steps.state.step))
            checkpoints.wait()
    if fault:
        raise fault
    return steps.state, code


def _walk(
    run: Run,
    steps: Steps,
    batches: Batches,
    between: "_Between",
    signals: Signals,
    watchdog: Watchdog,
    *,
    was_scored: bool,
) -> tuple[int, Exception | None]:
    """Takes steps as long as nothing is in the way.

    Returns:
        The exit code, and what is wrong with the data. EXIT_NON_FINITE where the run
        must go back.
    """
    step, data_index = int(steps.state.step), int(steps.state.data_index)
    last, loop = run.settings.train.train_steps, run.settings.loop
    clock, watch, times = between.books.clock, between.watch, between.times
    feed = Feed(
        batches.read,
        start=data_index,
        stop=data_index + last - step,
        shape=(run.settings.train.batch_size, run.settings.data.length),
        sharding=run.batch_sharding,
        rows=batches.sizes.of,
    )
    code, fault = EXIT_DONE, None
    with feed:
        try:
            if not was_scored:
                with watchdog.paused():
                    between(steps, step, _due(step, loop, last) - {"save"})
            for index in range(data_index, data_index + last - step):
                with clock.of("data_wait"):
                    batch, fault = _next(feed)
                if batch is None:
                    steps.settle()
                    break
                step += 1
                if (rows := batches.sizes.of(index)) != between.rows:
                    steps.settle()
                    with watchdog.paused():
                        between.grow(step, rows)
                due = times.due(_due(step, loop, last), step)
                clock.steps += 1
                with clock.of("step"):
                    steps.take(Launched(step, index, batch, feed.wait_seconds))
                    watchdog.step_is_done()
                    code = signals.asked()
                    if due or code:
                        steps.settle()
                if watch.going_back:
                    return EXIT_NON_FINITE, None
                due = times.unless_stalled(due, step < last and watch.skipped_in_a_row)
                # Whoever asked to stop may not wait for scores.
                with watchdog.paused():
                    between(steps, step, {"save"} if code else due)
                if code:
                    break
        except Stopped as stopped:
            code = stopped.code
            with watchdog.paused():
                between.save(steps, step)
    return code, fault


def _gone_back(
    steps: Steps,
    hooks: Hooks,
    checkpoints: Checkpoints,
    books: Books,
    between: "_Between",
) -> TrainState:
    """The state of the newest checkpoint, which goes on with later data."""
    watch, most = between.watch, between.run.settings.loop.max_rollbacks
    why, watch.rollbacks = watch.going_back, watch.rollbacks + 1
    with books.clock.of("restore"):
        checkpoints.wait()
        reached = int(steps.state.step)
        state, kept = hooks.go_back()
    step, passed = int(state.step), watch.resume_index - int(state.data_index)
    books.clock.lose(reached - step)
    books.events.note("rollback", step, why=why, passed_over_batches=passed)
    books.progress.say(
        f"{why}: goes back to step {step:,}, and passes over {passed:,} batches "
        f"(rollback {watch.rollbacks} of MAX_ROLLBACKS = {most})"
    )
    books.writer.rewind(step)
    watch.restore(kept)
    between.saved_step = step
    number = jax.device_put(state.data_index + passed, state.data_index.sharding)
    return dataclasses.replace(state, data_index=number)


def _give_up(books: Books, watch: Watch, loop: LoopSettings) -> None:
    """Says why the run ends, if going back did not help."""
    message = watch.going_back
    if loop.max_rollbacks:
        message += f", and MAX_ROLLBACKS = {loop.max_rollbacks} rollbacks did not help"
    books.events.note("fault", message=message)
    books.progress.say(message)


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

    run: Run
    hooks: Hooks
    checkpoints: Checkpoints
    books: Books
    log: Log
    watch: Watch
    times: Times
    saved_step: int
    rows: int

    def __call__(self, steps: Steps, step: int, due: set[str]) -> None:
        """Does what is due; saves first: scores can be made again from what is saved.

        Raises:
            Stopped: the run was asked to stop while it scored.
        """
        if "save" in due:
            self.save(steps, step)
        params, scores = steps.state.params, Record()
        with self.books.clock.of("score"):
            if "score" in due:
                batches = self.run.settings.loop.eval_batches
                scores |= self.hooks.score(params, batches)
            if "measure" in due and self.hooks.measure is not None:
                scores |= self.hooks.measure(params, step)
        if scores:  # of one split and step there is one record
            self.log.score(step, scores)
            self.books.events.note("scored", step)
            self.checkpoints.scored(step, scores)
        if due:
            self.log.pause()

    def grow(self, step: int, rows: int) -> None:
        """Makes ready for batches of another size, which are another program."""
        self.rows = rows
        self.books.events.note("grown", step, rows=rows)
        self.books.progress.say(f"from step {step:,} on, batches of {rows:,} rows")
        self.hooks.prepare(rows)
        self.log.pause()

    def save(self, steps: Steps, step: int) -> None:
        """Saves the state, and what was written of it, unless it is saved already."""
        if self.saved_step == step:
            return
        self.hooks.still_ours()
        if self.run.settings.loop.compare_replicas == "on":
            self._compare_replicas(steps.state, step)
        if not self.watch.skipped_in_a_row:
            self.watch.rollbacks = 0  # it has learnt since
        kept = {"watch": self.watch.kept()}
        with self.books.clock.of("save"):
            self.books.writer.flush()
            provenance = self.hooks.provenance | kept
            self.checkpoints.save(steps.state, self.run, provenance)
        self.saved_step = step
        self.times.saved()
        self.books.note("saved", step)

    def _compare_replicas(self, state: TrainState, step: int) -> None:
        """Refuses to save what devices do not hold alike."""
        with self.books.clock.of("check"):
            found = replicas.differing(named_arrays(state))
        if found:
            self.watch.failed(
                step,
                f"at step {step:,} devices that hold the same piece of an array hold "
                f"other bits: {'; '.join(found[:5])}{' ...' if found[5:] else ''}. "
                "Nothing of it is saved; take that machine out, and start the same "
                "command again",
            )
