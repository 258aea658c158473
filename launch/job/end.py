"""How a job of several processes ends: all at once, and all knowing why.

When one process fails, it says so to all, and all end. A process that waits for another
inside a collective would otherwise wait for a heartbeat to time out, or for ever.
"""

import contextlib
import json
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
    EXIT_USER_ERROR,
    is_user_error,
)

WEEK_MILLISECONDS = 7 * 24 * 3600 * 1000

_ENDED = "switchyard/ended"  # holds how the job ended, once it has
_HEARD = "switchyard/heard"
_ALL_DONE = -1
_GRACE_SECONDS = 5.0  # that the others have to hear how it ended
_AGAIN = "The same command, started again for all, goes on from the newest checkpoint"
# What a collective says when the process at its other end has gone.
_LOST = re.compile(
    "closed by peer|connection re(set|fused)|gloo|nccl|heartbeat|unavailable|"
    "deadline.exceeded|coordination|socket closed|broken pipe",
    re.IGNORECASE,
)

_bell: list["Bell"] = []  # that of this process, in a job


def client() -> Any:
    """The connection to the coordinator."""
    from jax._src import distributed  # public nowhere, and stable since its beginning

    return distributed.global_state.client


class Bell:
    """Tells all processes how the job ends, and hears it from them.

    Args:
        process: which of them this is.
        number: how many there are.
        lines: open connections, to all others from process 0, and to it from each.
        say: shows a message to the user.
    """

    def __init__(
        self,
        process: int,
        number: int,
        lines: Mapping[int, socket.socket],
        say: Callable[[str], None],
    ) -> None:
        self._process = process
        self._number = number
        self._say = say
        self._ending = threading.Lock()  # whoever has it ends the process
        self._listener = threading.Thread(
            target=self._listen, name="how the job ends", daemon=True
        )
        self._listener.start()
        self._done = False
        self._lines = lines
        _bell.append(self)
        threading.Thread(target=self._watch, name="who is alive", daemon=True).start()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and so all, because of an error in it."""
        self._ending.acquire()
        lost = not is_user_error(error) and bool(_LOST.search(str(error)))
        before = self._told(_GRACE_SECONDS if lost else 0.0)
        if before is None:
            before = self._tell(_outcome(self._process, error, lost=lost))
        if before["process"] == self._process:
            if before["code"] == EXIT_FAULT:
                traceback.print_exception(error)  # it ends with the message
            else:
                self._say(before["message"])
            if self._process == 0:
                self._wait_until_heard(self._number - 1)
        elif before["message"] != _outcome(0, error, lost=lost)["message"]:
            self._say(f"process {before['process']} ended: {before['message']}")
        leave(before["code"])

    def stop(self, code: int, message: str) -> NoReturn:
        """Ends this process, and so all, because it was told to."""
        self._ending.acquire()
        told = self._tell({"process": self._process, "code": code, "message": message})
        if self._process == 0:
            self._wait_until_heard(self._number - 1)
        leave(told["code"])

    def done(self) -> None:
        """Says that all processes are done, and stops listening."""
        if self._process == 0:
            self._tell({"process": _ALL_DONE, "code": 0, "message": ""})
        self._listener.join()
        self._done = True
        _bell.clear()
        client().wait_at_barrier("all have heard", WEEK_MILLISECONDS)

    def _listen(self) -> None:
        """Waits for how it ends; ends this process when another one failed."""
        while True:
            try:
                text = client().blocking_key_value_get(_ENDED, WEEK_MILLISECONDS)
            # Process 0 has gone without a word: jax, or the collective that this
            # process is in, says so.
            except Exception as error:  # jax has no narrower class for it here
                if not _LOST.search(str(error)):
                    traceback.print_exception(error)
                return
            outcome = json.loads(text)
            if outcome["process"] in (_ALL_DONE, self._process):
                return
            with contextlib.suppress(Exception):  # only to let process 0 go sooner
                client().key_value_set(f"{_HEARD}/{self._process}", "1")
            self._ending.acquire()
            self._say(f"process {outcome['process']} ended: {outcome['message']}")
            leave(outcome["code"])

    def _watch(self) -> None:
        """Ends this process when another one has gone without a word."""
        with selectors.DefaultSelector() as selector:
            for process, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, process)
            (key, _), *_ = selector.select()  # nothing is ever sent: it has closed
        if self._done:
            return
        # If it had a reason it has said so, and process 0 left last.
        told = self._told(_GRACE_SECONDS / 5) if self._process == 0 else None
        self._ending.acquire()
        if told is None:
            message = f"process {key.data} was lost. {_AGAIN}"
            told = {"process": key.data, "code": EXIT_LOST_PROCESS, "message": message}
            if self._process == 0:
                told = self._tell(told)
            self._say(told["message"])
        else:
            self._say(f"process {told['process']} ended: {told['message']}")
        if self._process == 0:
            self._wait_until_heard(self._number - 2)
        leave(told["code"])

    def _told(self, seconds: float) -> dict[str, Any] | None:
        """How the job ended by the word of another process, if it has said so."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return json.loads(client().key_value_try_get(_ENDED))
            except Exception as error:  # not there, or the coordinator has gone
                if "NOT_FOUND" not in str(error) or time.monotonic() >= deadline:
                    return None
            time.sleep(0.1)

    def _tell(self, outcome: dict[str, Any]) -> dict[str, Any]:
        """Says how the job ends; returns what the first to say so has said."""
        try:
            client().key_value_set(_ENDED, json.dumps(outcome))
        except Exception as error:  # somebody was faster, or the coordinator has gone
            return (self._told(0.0) if "EXISTS" in str(error) else None) or outcome
        return outcome

    def _wait_until_heard(self, number: int) -> None:
        """Process 0 leaves last: what the others ask, they ask it."""
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            heard = client().key_value_dir_get(f"{_HEARD}/")
            if len(heard) >= number:
                return
            time.sleep(0.05)


def _outcome(process: int, error: BaseException, *, lost: bool) -> dict[str, Any]:
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


def leave(code: int) -> NoReturn:
    """Ends the process at once: an orderly end would wait for the others."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a live display hides the cursor
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
