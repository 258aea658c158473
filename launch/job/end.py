"""How a job of several processes ends: all at once, and all knowing why.

When one process fails, it says so to all, and all end. A process that waits for another
inside a collective would otherwise wait for a heartbeat to time out, or for ever. None
of this goes through jax, whose coordinator dies with process 0.
"""

import contextlib
import faulthandler
import os
import re
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from launch.errors import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_STALLED,
    EXIT_USER_ERROR,
    is_user_error,
)
from launch.job.lines import Line

WEEK_MILLISECONDS = 7 * 24 * 3600 * 1000

_GRACE_SECONDS = 5.0  # that the others have to answer, or to leave
_NOTICE_SECONDS = 1.0  # until a closed connection has been heard of everywhere
_BEATS = 10  # in the time after which silence means death
_LONGEST_BEAT_SECONDS = 5.0
_AGAIN = "The same command, started again for all, goes on from the newest checkpoint"
# What a collective says when the process at its other end has gone.
_LOST = re.compile(
    "closed by peer|connection re(set|fused)|gloo|nccl|heartbeat|unavailable|"
    "deadline.exceeded|coordination|socket closed|broken pipe",
    re.IGNORECASE,
)

Outcome = dict[str, Any]  # "process" that ended, "code", "message"; "lost" if it died
_bell: list["Bell"] = []  # that of this process, in a job


def client() -> Any:
    """The connection to the coordinator."""
    from jax._src import distributed  # public nowhere, and stable since its beginning

    return distributed.global_state.client


class Bell:
    """Tells all processes how the job ends, and hears it from them.

    One thread reads and writes all connections, and it alone ends the process. Of
    several that fail at once, that counts of which process 0 hears first.

    Args:
        process: which of them this is.
        lines: open connections, to all others from process 0, and to it from each.
        say: shows a message to the user.
        heartbeat_seconds: silence after which a process counts as dead.
    """

    def __init__(
        self,
        process: int,
        lines: Mapping[int, socket.socket],
        say: Callable[[str], None],
        heartbeat_seconds: float,
    ) -> None:
        self._process = process
        self._lines = {other: Line(line) for other, line in lines.items()}
        self._say = say
        self._heartbeat = heartbeat_seconds
        self._beat = min(heartbeat_seconds / _BEATS, _LONGEST_BEAT_SECONDS)
        self._woken, self._waker = socket.socketpair()
        self._deciding = threading.Lock()
        self._mine: Outcome | None = None  # what this process wants to end with
        self._error: BaseException | None = None
        self._was_said = False
        self._asked_at: float | None = None  # process 0, to end with it
        self._done = self._told_done = False
        self._thread = threading.Thread(
            target=self._listen, name="how the job ends", daemon=True
        )
        _bell.append(self)
        self._thread.start()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and so all, because of an error in it."""
        self._error = error
        lost = not is_user_error(error) and bool(_LOST.search(str(error)))
        if isinstance(error, Exception) and not is_user_error(error):
            # What follows from the death of another is told by its connection.
            self._thread.join(_GRACE_SECONDS if lost else _NOTICE_SECONDS)
        self._end_with(_outcome(self._process, error, lost=lost))

    def stop(self, code: int, message: str) -> NoReturn:
        """Ends this process, and so all, because it was told to, and has said so."""
        self._was_said = True
        self._end_with({"process": self._process, "code": code, "message": message})

    def done(self) -> None:
        """Returns when all processes are done; from then on none ends another."""
        self._done = True
        self._wake()
        self._thread.join()
        _bell.clear()

    def _end_with(self, outcome: Outcome) -> NoReturn:
        with self._deciding:
            self._mine = self._mine or outcome
        self._wake()
        self._thread.join(3 * _GRACE_SECONDS)  # it ends the process
        leave(self._mine["code"])

    def _wake(self) -> None:
        self._waker.send(b"\0")

    # ------------------------------------------------------------ in the thread

    def _listen(self) -> None:
        try:
            outcome = self._await()
            if outcome is not None:
                self._end(outcome)
        except BaseException as error:  # nobody would watch any more
            traceback.print_exception(error)
            leave(EXIT_FAULT)

    def _await(self) -> Outcome | None:
        """Returns how the job ends; None once all processes are done."""
        beaten_at = looked_at = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for other, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, other)
            while not self._all_are_done():
                for key, _ in selector.select(self._beat):
                    if key.data is None:
                        self._woken.recv(1 << 10)
                    elif outcome := self._hear(key.data):
                        return outcome
                    elif key.data not in self._lines:
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - beaten_at >= self._beat:
                    beaten_at = now
                    self._say_to_all(None)
                outcome = self._silent(now, looked_at) or self._own(now)
                if outcome:
                    return outcome
                looked_at = now
        return None

    def _own(self, now: float) -> Outcome | None:
        """What this process wants to end with, once process 0 has had its say."""
        if self._mine is None:
            return None
        if self._asked_at is None:
            self._asked_at = now
            if self._process:
                self._say_to_all({"ended": self._mine})
        answered = self._process == 0 or now - self._asked_at > _GRACE_SECONDS
        return self._mine if answered else None

    def _all_are_done(self) -> bool:
        """Says that this process is done, and whether all are."""
        others = all(line.is_done for line in self._lines.values())
        if self._done and not self._told_done and (others or self._process):
            self._told_done = True
            self._say_to_all({"done": True})
        return self._told_done and others

    def _hear(self, other: int) -> Outcome | None:
        """Reads what another process says; returns how the job ends, if it does."""
        line = self._lines[other]
        said = line.read()
        if said is None:
            if not line.is_done:
                return _death(other, "")
            del self._lines[other]  # it is done, and has left
            return None
        for one in said:
            line.is_done |= "done" in one
            if "ended" in one:
                return one["ended"]
        return None

    def _silent(self, now: float, looked_at: float) -> Outcome | None:
        """Who has not been heard for too long, unless it is this one that was away."""
        if now - looked_at > self._heartbeat / 2:  # it was stopped itself
            for line in self._lines.values():
                line.heard = now
        for other, line in self._lines.items():
            if now - line.heard > self._heartbeat and not line.is_done:
                why = f": silent for HEARTBEAT_TIMEOUT = {self._heartbeat:g} s"
                return _death(other, why)
        return None

    def _say_to_all(self, said: Mapping[str, Any] | None) -> None:
        for line in self._lines.values():
            line.send(said)

    def _end(self, outcome: Outcome) -> None:
        """Tells the others, and the user, and ends this process."""
        # Whoever reads what this process says may not read on, and then it would hang.
        late = threading.Timer(2 * _GRACE_SECONDS, os._exit, (outcome["code"],))
        late.daemon = True
        late.start()
        if self._process == 0:
            self._say_to_all({"ended": outcome})
        self._show(outcome)
        if self._process == 0:  # jax's coordinator is in here, and leaves last
            lost = outcome["process"] if outcome.get("lost") else 0
            self._wait_until_gone({*self._lines} - {lost})
        leave(outcome["code"])

    def _show(self, outcome: Outcome) -> None:
        message, error = outcome["message"], self._error
        if outcome.get("lost"):
            self._say(message)
        elif outcome["process"] == self._process:
            if outcome["code"] == EXIT_FAULT and error is not None:
                traceback.print_exception(error)  # it ends with the message
            elif not self._was_said:
                self._say(message)
        elif error is None or _outcome(0, error, lost=False)["message"] != message:
            self._say(f"process {outcome['process']} ended: {message}")
            if outcome["code"] == EXIT_STALLED:
                show_stacks()  # the fault may lie here, where nothing was noticed

    def _wait_until_gone(self, others: set[int]) -> None:
        deadline = time.monotonic() + _GRACE_SECONDS
        with selectors.DefaultSelector() as selector:
            for other in others:
                selector.register(self._lines[other], selectors.EVENT_READ, other)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(0.1):
                    if self._lines[key.data].read() is None:
                        selector.unregister(key.fileobj)


def _death(process: int, why: str) -> Outcome:
    message = f"process {process} was lost{why}. {_AGAIN}"
    code = EXIT_LOST_PROCESS
    return {"process": process, "code": code, "message": message, "lost": True}


def _outcome(process: int, error: BaseException, *, lost: bool) -> Outcome:
    """What the others are told of an error."""
    first, *_ = [*str(error).strip().splitlines(), ""]
    if isinstance(error, KeyboardInterrupt):
        return {"process": process, "code": EXIT_INTERRUPTED, "message": "interrupted"}
    if is_user_error(error):
        message = f"{type(error).__name__}: {error}"
        return {"process": process, "code": EXIT_USER_ERROR, "message": message}
    if lost:
        message = f"another process was lost ({first[:200]}). {_AGAIN}"
        return {"process": process, "code": EXIT_LOST_PROCESS, "message": message}
    message = f"{type(error).__name__}: {first[:500]}"
    return {"process": process, "code": EXIT_FAULT, "message": message}


def in_job() -> bool:
    """Says whether this process has met others, and is not done."""
    return bool(_bell)


def leave_all(code: int, message: str) -> NoReturn:
    """Ends this process at once, and the others of its job, which are told why."""
    for bell in _bell:
        bell.stop(code, message)
    leave(code)


def show_stacks() -> None:
    """Writes where every thread is, to the standard error stream of the process."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)


def leave(code: int) -> NoReturn:
    """Ends the process at once: an orderly end would wait for the others."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a live display hides the cursor
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
