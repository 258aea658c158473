"""Connections between the processes of a job, on which they show that they live.

Process 0 has one to each of the others, and they to it. Each side says something a
few times within HEARTBEAT_TIMEOUT, from a thread that does nothing else: a process that
dies closes its connections at once, and one that is stopped falls silent.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

_SEND_SECONDS = 1.0  # that a full connection may hold up whoever writes to it


class Line:
    """One of them, read and written by one thread.

    Args:
        connection: open to the other process.

    Attributes:
        heard: when something came last, in seconds of `time.monotonic`.
        is_done: whether the other process has said that it is done.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(_SEND_SECONDS)
        self._connection = connection
        self._begun = b""  # of a message that has not come whole
        self.heard = time.monotonic()
        self.is_done = False

    def fileno(self) -> int:
        """The number by which the system knows it."""
        return self._connection.fileno()

    def read(self) -> list[dict[str, Any]] | None:
        """Returns what has come; None when the other end has closed."""
        try:
            piece = self._connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:  # reset, by a machine that went down
            return None
        if not piece:
            return None
        self.heard = time.monotonic()
        *whole, self._begun = (self._begun + piece).split(b"\n")
        return [json.loads(text) for text in whole if text]

    def send(self, said: Mapping[str, Any] | None = None) -> None:
        """Says something, or only that this process lives."""
        text = b"" if said is None else json.dumps(said).encode()
        with contextlib.suppress(OSError):  # whoever has gone hears nothing
            self._connection.sendall(text + b"\n")
