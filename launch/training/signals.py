"""SIGTERM and Ctrl-C, heard at any moment of a run.

Where nothing would be lost, before the first step and once the last one is saved, a
signal ends the process as it is, be it inside the compiler. From the first step on it
is noted, and whoever takes steps or scores asks for it.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax

from launch.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED
from launch.job import together
from launch.job.end import leave

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
        quiet: whether nothing is said at the end.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._received: int | None = None
        self._asks = 0
        self._nothing_to_lose = True
        self._deciding = threading.Lock()

    def asked(self) -> int:
        """The exit code to stop with now; EXIT_DONE if nobody asked for it.

        In a job of several processes it is the same in all, each of which asks as
        often as the others: after every step, and before every batch that is scored.
        """
        stop = self._received  # read once: it may come at any moment
        if jax.process_count() > 1:
            self._asks += 1
            stop = together.asked_to_stop(self._asks)
        return EXIT_DONE if stop is None else _CODES[signal.Signals(stop)]

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
            # jax tells the other processes of a job of a SIGTERM, and of no Ctrl-C.
            several = jax.process_count() > 1
            with _caught(_pass_on, *([signal.SIGINT] if several else [])):
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
            self._received = number
            if self._nothing_to_lose:
                if not self._quiet:
                    print(GOES_ON, file=sys.stderr)
                leave(_CODES[signal.Signals(number)])


@contextlib.contextmanager
def listening(*, quiet: bool) -> Iterator[Signals]:
    """Hears SIGINT and SIGTERM instead of dying; the second one is not caught.

    In a job of several processes jax notes SIGTERM, and tells the others; Ctrl-C ends
    all at once where nothing is lost (`launch.job.end`).
    """
    signals = Signals(quiet=quiet)
    if jax.process_count() > 1:
        yield signals
        return
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


def _listen(reader: socket.socket, signals: Signals) -> None:
    while number := reader.recv(1):
        if number[0] in _CODES:
            signals.hear(number[0])


@contextlib.contextmanager
def _caught(take: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Takes the first of these signals; whoever had them before has them again then."""
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        restore()
        take(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


def _pass_on(number: int) -> None:
    """Makes of Ctrl-C the signal that jax tells the other processes of."""
    del number
    os.kill(os.getpid(), signal.SIGTERM)
