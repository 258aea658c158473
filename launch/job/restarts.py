"""`--restarts`: a run in a child process, which is started again when it dies.

Nothing of jax is in this process, so what kills the child leaves it alone. In a job
each process has its own child; all end together, and so they come back together.
"""

import contextlib
import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from launch.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_PREEMPTED,
    EXIT_STALLED,
)

_RESTARTED = frozenset({EXIT_FAULT, EXIT_STALLED, EXIT_LOST_PROCESS})
_ASKED = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED}
_CHILD_OF = "SWITCHYARD_CHILD_OF"  # holds the number of the supervisor's process
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_BARREN = 2  # deaths in a row after which nothing new had been saved
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Deaths:
    """What to do after each death of a run.

    Attributes:
        restarts: how often it may be started again.
    """

    restarts: int
    started_again: int = 0
    _newest: int | None = None
    _is_first: bool = True
    _barren: int = 0
    _pause: float = _FIRST_PAUSE_SECONDS

    def pause_seconds(self, newest: int | None) -> float | None:
        """Returns how long to wait before the next start; None to give up.

        Args:
            newest: step of the newest checkpoint; None if there is none.
        """
        if not self._is_first:
            is_new = newest != self._newest
            self._barren = 0 if is_new else self._barren + 1
            longer = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            self._pause = _FIRST_PAUSE_SECONDS if is_new else longer
        self._newest, self._is_first = newest, False
        if self.gave_up or self.started_again == self.restarts:
            return None
        self.started_again += 1
        return self._pause

    @property
    def gave_up(self) -> bool:
        """Whether it dies again and again without getting on."""
        return self._barren == _BARREN


class Supervisor:
    """Runs a command in a child process, again and again.

    Args:
        command: words of the child's command line.
        model_dir: folder of its run.
        restarts: how often it may be started again.
    """

    def __init__(self, command: Sequence[str], model_dir: Path, restarts: int) -> None:
        self._command = list(command)
        self._checkpoints = model_dir / "checkpoints"
        self._deaths = Deaths(restarts)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None  # the last signal that came

    def run(self) -> int:
        """Returns the exit code of the last child, as a shell would say it."""
        with self._passing_on():
            while True:
                code = self._run_child()
                if self._asked is not None:  # it may have been too young to hear it
                    return code if code >= 0 else _ASKED[signal.Signals(self._asked)]
                if not _may_be_restarted(code):
                    return code if code >= 0 else 128 - code
                newest = self._newest()
                pause = self._deaths.pause_seconds(newest)
                self._say(code, newest, pause)
                if pause is None:
                    return code if code >= 0 else 128 - code
                time.sleep(pause)
                if self._asked is not None:
                    return _ASKED[signal.Signals(self._asked)]

    def _run_child(self) -> int:
        # A group of its own: the terminal's Ctrl-C reaches it once, through us.
        self._child = subprocess.Popen(
            self._command,
            env=os.environ | {_CHILD_OF: str(os.getpid())},
            process_group=0,
        )
        if self._asked is not None:  # it came while the child was made
            self._child.send_signal(self._asked)
        return self._child.wait()

    @contextlib.contextmanager
    def _passing_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            del frame
            self._asked = number
            if self._child is not None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in _ASKED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _newest(self) -> int | None:
        """The newest checkpoint: those that are whole have a number for a name."""
        with contextlib.suppress(OSError):
            names = os.listdir(self._checkpoints)
            return max((int(name) for name in names if name.isdecimal()), default=None)
        return None

    def _say(self, code: int, newest: int | None, pause: float | None) -> None:
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {_name(-code)}"
        kept = "no checkpoint" if newest is None else f"the checkpoint of step {newest}"
        deaths = self._deaths
        if pause is not None:
            then = f"start {deaths.started_again} of {deaths.restarts} more "
            then += f"follows in {pause:g} s, from {kept}"
        elif deaths.gave_up:
            then = f"given up: {_BARREN} starts in a row came no further than {kept}"
        else:
            then = f"given up after --restarts={deaths.restarts}, with {kept}"
        print(f"switchyard: the run {how}; {then}", file=sys.stderr, flush=True)


def command_line(words: Sequence[str] | None) -> list[str]:
    """Returns the words that start this command again.

    Args:
        words: what it was called with; None: the process's own.
    """
    if words is None:
        return [sys.executable, *sys.orig_argv[1:]]
    return [sys.executable, "-m", "launch", *words]


def is_child() -> bool:
    """Says whether this process is the child of a supervisor.

    Such a one is asked to stop when its supervisor dies.
    """
    if os.environ.get(_CHILD_OF) != str(os.getppid()):
        return False
    with contextlib.suppress(AttributeError):  # of Linux alone
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    return True


def _may_be_restarted(code: int) -> bool:
    return code in _RESTARTED or (code < 0 and -code not in _ASKED)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of those without a name
        return f"signal {number}"
