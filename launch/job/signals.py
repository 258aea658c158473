"""SIGTERM and Ctrl-C, heard at any moment.

Where nothing would be lost, before the first step and once the last one is saved, a
signal ends the process as it is, be it inside the compiler, and with it the others of
its job. From the first step on it is noted, and whoever takes steps or scores asks for
it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from launch.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED
from launch.job import end, together

GOES_ON = "stopped; the same command goes on from what is kept"

_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED}


class Stopped(Exception):  # noqa: N818, it is no error
    """A run was asked to stop while it did what can be done again.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(GOES_ON)
        self.code = code


class Signals:
    """Which signal asked the run to stop, if any.

    Args:
        said: what is said where a signal ends the process.
        quiet: whether it is said to the other processes of a job alone.
        of_jax: what jax does at a SIGTERM: it tells the other processes of a job, and
            asks all to stop at the same moment. None in a process alone.

    Attributes:
        kept: says what is kept, where something is.
        begin_to_stop: called once, when the run is to stop.
    """

    def __init__(
        self, said: str, quiet: bool, of_jax: "ctypes.Array[ctypes.c_char] | None"
    ) -> None:
        self._said = said
        self._quiet = quiet
        self._of_jax = of_jax
        self._received: int | None = None
        self._heard_at: float | None = None
        self._is_stopping = False
        self._asks = 0
        self.kept: Callable[[], str] = str
        self.begin_to_stop: Callable[[], None] = lambda: None
        self._nothing_to_lose = True
        self._deciding = threading.Lock()

    def asked(self) -> int:
        """The exit code to stop with now; EXIT_DONE if nobody asked for it.

        In a job of several processes it is the same in all, each of which asks as
        often as the others: after every step, and before every batch that is scored.
        """
        stop = self._received  # read once: it may come at any moment
        if self._of_jax is not None:
            self._asks += 1
            stop = together.asked_to_stop(self._asks)
        if stop is None:
            return EXIT_DONE
        if not self._is_stopping:
            self._is_stopping = True
            self._heard_at = self._heard_at or time.monotonic()
            self.begin_to_stop()
        return _CODES[signal.Signals(stop)]

    def seconds_since(self) -> float:
        """Seconds since the first signal came; 0 if none did."""
        return 0.0 if self._heard_at is None else time.monotonic() - self._heard_at

    def check(self) -> None:
        """Asks, where scores are made or nothing has been learnt yet.

        Raises:
            Stopped: the run is to stop.
        """
        if code := self.asked():
            raise Stopped(code)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Here a signal ends nothing by itself: something is to be saved first."""
        with self._deciding:
            self._nothing_to_lose = False
        try:
            if self._of_jax is None:
                yield
            else:
                with _lent(self._of_jax), _caught(_pass_on, signal.SIGINT):
                    yield
        finally:
            with self._deciding:
                self._nothing_to_lose = True

    def note(self, number: int) -> None:
        """Takes a signal in the main thread."""
        self._received = number

    def hear(self, number: int) -> None:
        """Takes a signal, whatever the main thread does."""
        with self._deciding:
            again = self._heard_at is not None
            self._received = number if self._received is None else self._received
            self._heard_at = self._heard_at or time.monotonic()
            if self._nothing_to_lose:
                if not self._quiet:
                    print(self._said, file=sys.stderr)
                end.leave_all(_CODES[signal.Signals(number)], self._said)
            elif again and number == signal.SIGINT:
                message = " · ".join(filter(None, ["ended at once", self.kept()]))
                print(message, file=sys.stderr)
                end.leave_all(EXIT_INTERRUPTED, message)


@contextlib.contextmanager
def listening(said: str, *, quiet: bool) -> Iterator[Signals]:
    """Hears SIGINT and SIGTERM instead of dying.

    Args:
        said: what is said where one of them ends the process.
        quiet: whether it is said to the other processes of a job alone.
    """
    of_jax = _action() if end.in_job() else None
    signals = Signals(said, quiet, of_jax)
    # Handlers of Python wait until the main thread leaves the compiler; a number that
    # the system writes into a socket does not.
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        listener = threading.Thread(
            target=_listen, args=(reader, signals), name="signals", daemon=True
        )
        listener.start()
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            with _caught(signals.note, *_CODES):
                yield signals
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            listener.join()
            if of_jax is not None:
                _set_action(of_jax)


def _listen(reader: socket.socket, signals: Signals) -> None:
    while number := reader.recv(1):
        if number[0] in _CODES:
            signals.hear(number[0])


@contextlib.contextmanager
def _caught(take: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Takes the first of these signals; those after it are for the listener alone."""
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        for other in before:
            signal.signal(other, _left_to_listener)
        take(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _left_to_listener(number: int, frame: FrameType | None) -> None:
    """Does nothing: that Python handles a signal has it written to the listener."""


@contextlib.contextmanager
def _lent(of_jax: "ctypes.Array[ctypes.c_char]") -> Iterator[None]:
    """Lets jax take SIGTERM meanwhile."""
    mine = signal.getsignal(signal.SIGTERM)
    _set_action(of_jax)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, mine)


# jax sets what happens at a SIGTERM below Python, which could not set it again.


def _action() -> "ctypes.Array[ctypes.c_char]":
    """What happens at a SIGTERM, as C has it."""
    kept = ctypes.create_string_buffer(1024)  # more than any `struct sigaction`
    ctypes.CDLL(None).sigaction(signal.SIGTERM, None, kept)
    return kept


def _set_action(kept: "ctypes.Array[ctypes.c_char]") -> None:
    ctypes.CDLL(None).sigaction(signal.SIGTERM, kept, None)


def _pass_on(number: int) -> None:
    """Makes of Ctrl-C the signal that jax tells the other processes of."""
    del number
    os.kill(os.getpid(), signal.SIGTERM)
