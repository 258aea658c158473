"""Ends a run whose step hangs, and shows where every thread of it is.

A lost connection between devices, a driver that waits for ever, a read that never
returns: the processes are there and answer, and nothing goes on.
"""

import contextlib
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from launch.errors import EXIT_STALLED
from launch.job import end

T = TypeVar("T")

NEVER = -1  # as a timeout
_MEDIANS = 50  # that a step may take, where nothing else is set,
_LEAST_SECONDS = 1800.0  # but at least so long, and so long before a median is known
_STEPS_OF_MEDIAN = 100
_TICK_SECONDS = 1.0
_DEBUGGERS = frozenset({"pdb", "bdb", "ipdb", "pudb", "pydevd", "debugpy"})


class Patience:
    """How long the step under way has taken, and how long one may.

    Args:
        timeout_seconds: time that it may; 0 takes 50 times the median of the last
            hundred, and at least half an hour.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._taken = deque[float](maxlen=_STEPS_OF_MEDIAN)
        self.waited_seconds = 0.0

    @property
    def limit_seconds(self) -> float:
        """Seconds that a step may take."""
        if self._timeout:
            return self._timeout
        median = statistics.median(self._taken) if self._taken else 0.0
        return max(_LEAST_SECONDS, _MEDIANS * median)

    def wait(self, seconds: float) -> bool:
        """Adds to the time of the step; whether that is too long."""
        self.waited_seconds += seconds
        return self.waited_seconds > self.limit_seconds

    def step_is_done(self) -> None:
        """Begins with the next step."""
        self._taken.append(self.waited_seconds)
        self.waited_seconds = 0.0


class Watchdog:
    """Ends the process when a step takes too long; a context manager.

    Time counts in small pieces by a clock that nobody sets: neither a process that was
    stopped for an hour nor a machine that slept has taken that hour for its step.

    Args:
        timeout_seconds: as of `Patience`, or `NEVER`.
        tick_seconds: between two looks at the clock.
    """

    def __init__(
        self, timeout_seconds: float, tick_seconds: float = _TICK_SECONDS
    ) -> None:
        self._patience = Patience(timeout_seconds)
        self._never = timeout_seconds == NEVER
        self._tick = tick_seconds
        self._pauses = 0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog")
        self._thread.daemon = True

    def __enter__(self) -> "Watchdog":
        """Begins to count."""
        if not self._never:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends nothing any more."""
        self._left.set()

    def step_is_done(self) -> None:
        """Counts from 0 again."""
        self._patience.step_is_done()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count meanwhile: what is done takes as long as it takes."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def not_counting(self, work: Callable[[], T]) -> Callable[[], T]:
        """Returns a function that does the same, and whose time does not count."""

        def uncounted() -> T:
            with self.paused():
                return work()

        return uncounted

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._left.wait(self._tick):
            now = time.monotonic()
            counted, before = min(now - before, 2 * self._tick), now
            if self._pauses or is_debugged():
                continue
            if self._patience.wait(counted) and not self._left.is_set():
                self._end()
                return

    def _end(self) -> None:
        message = (
            f"a step has taken more than {self._patience.limit_seconds:,.0f} s "
            "(STEP_TIMEOUT); the same command goes on from the newest checkpoint"
        )
        print(f"{message}. This is where every thread is:", file=sys.stderr, flush=True)
        end.show_stacks()
        end.leave_all(EXIT_STALLED, message)


def is_debugged() -> bool:
    """Whether a debugger holds this process: one of the system, or one of Python."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # Linux alone says so
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if int(status.split("TracerPid:")[1].split()[0]):
            return True
    for frame in sys._current_frames().values():
        found = frame
        while found is not None:
            if found.f_globals.get("__name__", "").partition(".")[0] in _DEBUGGERS:
                return True
            found = found.f_back  # type: ignore[assignment]
    return False
