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
        self._makers: dict[str, Callable[[], Any]] = {
            TRAIN_STEP: run.compile_train_step,
            EVALUATION: run.compile_eval_step,
            ROUNDS: functools.partial(run.compile_train_step, rounds=True),
        }
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

    def begin(self) -> None:
        """Begins with the train step and, if the settings say so, all others."""
        self._begin(TRAIN_STEP)
        if self._run.settings.loop.compile_ahead == "all":
            self._begin(EVALUATION)
            if self._run.may_exceed_budget:
                self._begin(ROUNDS)

    def wait(self) -> None:
        """Waits for all that was begun; what cannot be compiled raises here."""
        for name in tuple(self._begun):
            self._get(name)

    def train_step(self) -> Any:
        """Returns the step."""
        return self._get(TRAIN_STEP)

    def evaluation(self) -> Any:
        """Returns the scoring of one batch."""
        return self._get(EVALUATION)

    def rounds(self) -> Any:
        """Returns the step that finds room for all rows."""
        return self._get(ROUNDS)

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
