"""The programs of a run, compiled before the first step or when first needed."""

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax

from launch.run.assemble import Run
from launch.terminal.lines import waiting

TRAIN_STEP, EVALUATION, ROUNDS = "the train step", "evaluation", "the step in rounds"


class Programs:
    """Compiles in the background, each program once and one after the other.

    Args:
        run: the assembled run.

    Attributes:
        during: shows a message while something is waited for.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sizes = run.settings.batch_sizes
        self._makers: dict[str, Callable[[], Any]] = {EVALUATION: run.compile_eval_step}
        for rows in self._sizes.each:
            make = run.of_batches(rows).compile_train_step
            self._makers[self._named(TRAIN_STEP, rows)] = make
            rounds = functools.partial(make, rounds=True)
            self._makers[self._named(ROUNDS, rows)] = rounds
        self._begun: dict[str, Future[Any]] = {}
        # Of one thread, so that all processes of a job compile in the same order.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compile")
        self.during: Callable[[str], contextlib.AbstractContextManager] = waiting

    def __enter__(self) -> "Programs":
        """Compiles nothing yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Begins no other program."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, index: int = 0) -> None:
        """Begins with the train step and, if the settings say so, all others.

        Args:
            index: batch that comes first; sizes before its own are not needed.
        """
        now = self._sizes.of(index)
        self._begin(self._named(TRAIN_STEP, now))
        if self._run.settings.loop.compile_ahead == "all":
            self._begin(EVALUATION)
            for rows in self._sizes.each[self._sizes.each.index(now) :]:
                self._begin(self._named(TRAIN_STEP, rows))
                if self._run.of_batches(rows).may_exceed_budget:
                    self._begin(self._named(ROUNDS, rows))

    def wait(self) -> None:
        """Waits for all that was begun; what cannot be compiled raises here."""
        for name in tuple(self._begun):
            self._get(name)

    def prepare(self, rows: int) -> None:
        """Compiles the step of batches of so many rows, unless that is done."""
        self._get(self._named(TRAIN_STEP, rows))

    def train_step(self) -> Any:
        """Returns the step, of batches of any of the run's sizes."""
        return self._by_size(TRAIN_STEP)

    def evaluation(self) -> Any:
        """Returns the scoring of one batch."""
        return self._get(EVALUATION)

    def rounds(self) -> Any:
        """Returns the step that finds room for all rows."""
        return self._by_size(ROUNDS)

    def _by_size(self, name: str) -> Any:
        """A program for batches of every size; of one size it is compiled at once."""
        if len(self._sizes.each) == 1:
            return self._get(name)

        def step(state: Any, batch: Any, *others: Any) -> Any:
            rows = len(next(iter(batch.values())))
            return self._get(self._named(name, rows))(state, batch, *others)

        return step

    def _named(self, name: str, rows: int) -> str:
        """What a program is called, of batches of so many rows."""
        alone = len(self._sizes.each) == 1
        return name if alone else f"{name} for batches of {rows} rows"

    def _begin(self, name: str) -> Future[Any]:
        if name not in self._begun:
            self._begun[name] = self._pool.submit(self._under_mesh, name)
        return self._begun[name]

    def _under_mesh(self, name: str) -> Any:
        with jax.set_mesh(self._run.mesh):  # which belongs to a thread
            return self._makers[name]()

    def _get(self, name: str) -> Any:
        future = self._begin(name)
        if not future.done():
            with self.during(f"compiling {name}"):
                future.exception()
        return future.result()
