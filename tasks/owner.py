"""One process at a time in a folder, also on file systems that know no locks.

Where `flock` is not to be had, as on some network file systems, a file says who owns
the folder: its machine, its process, and a number that it raises every few seconds. An
owner that has ended is taken over, and so is one whose number stands still for a
minute. Clocks that differ or jump change nothing.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a beat, after which an owner is taken for dead
_LOOK_SECONDS = 0.5
_LENGTH = 512  # bytes of the file, so that it is written in place
_ATTEMPTS = 5  # of several who find a dead owner, one is first
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}


class TakenError(Exception):
    """Somebody else owns it; the message says who."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """A process, wherever it is.

    Attributes:
        pid: its number.
        host: name of its machine.
        system: what tells machines of one name, and spaces of process numbers, apart.
        started: when it did, in the ticks of its machine; "" where nobody knows.
        since: when it came, for people.
        token: a random word that no other has.
    """

    pid: int
    host: str
    system: str
    started: str
    since: str
    token: str

    def __str__(self) -> str:
        """Such as "process 123 on node7, since 2026-05-01 12:00:00"."""
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_alive(self) -> bool | None:
        """Whether it still runs; None of one on another machine."""
        if (self.host, self.system) != (socket.gethostname(), _system()):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _started(self.pid) == self.started


def myself() -> Owner:
    """Returns this process."""
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    host = socket.gethostname()
    return Owner(pid, host, _system(), _started(pid), since, secrets.token_hex(8))


def locked(file: IO[bytes]) -> bool:
    """Locks an open file until it is closed; False where there are no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


@contextlib.contextmanager
def owned(
    path: Path,
    *,
    say: Callable[[str], None],
    lost: Callable[[str], None],
    beat_seconds: float = BEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[Callable[[], None]]:
    """Owns what a file stands for.

    Args:
        path: the file, which is there while somebody owns it.
        say: shows a message.
        lost: called, in a thread, when somebody has taken it over all the same, as from
            a process that was stopped for long.
        beat_seconds: between two signs of life.
        stale_seconds: without one, after which an owner is taken for dead.
    Returns:
        A function that calls `lost` at once if that has happened.
    Raises:
        TakenError: another process owns it.
        OSError: it cannot be written.
    """
    me = myself()
    left, beating = threading.Event(), threading.Lock()
    file = _created(path, me, say, stale_seconds)
    _write(file, me, 0)

    def check() -> None:
        with contextlib.suppress(OSError):  # a server that is away for a moment
            if (found := _read(path)) is None or found[0] != me:
                lost(f"{path} was taken over by {found[0] if found else 'somebody'}")

    def live() -> None:
        number = 0
        while not left.wait(beat_seconds):
            with beating:
                check()
                number += 1
                with contextlib.suppress(OSError):
                    if not left.is_set():
                        _write(file, me, number)

    threading.Thread(target=live, name=f"owner of {path}", daemon=True).start()
    try:
        yield check
    finally:
        left.set()
        with beating, file, contextlib.suppress(OSError):
            found = _read(path)
            if found is not None and found[0] == me:
                path.unlink()


def _created(
    path: Path, me: Owner, say: Callable[[str], None], stale_seconds: float
) -> IO[bytes]:
    """The file, made by this process."""
    for _ in range(_ATTEMPTS):
        try:
            return path.open("xb", buffering=0)
        except FileExistsError:
            _make_way(path, me, say, stale_seconds)
    raise TakenError("several others, which come and go")


def _make_way(
    path: Path, me: Owner, say: Callable[[str], None], stale_seconds: float
) -> None:
    """Moves the file of a dead owner away."""
    found = _read(path)
    if found is None:
        return
    owner = found[0] or "somebody who has not written who"
    alive = found[0].is_alive() if found[0] else None
    if alive is None:
        say(f"{path} is of {owner}: waiting {stale_seconds:g} s for a sign of life")
        deadline = time.monotonic() + stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(_LOOK_SECONDS, stale_seconds))
            if (now := _read(path)) != found:
                if now is None:
                    return
                raise TakenError(str(now[0] or owner))
    elif alive:
        raise TakenError(str(owner))
    aside = path.with_name(f"{path.name}.{me.token}")
    try:
        path.rename(aside)
    except FileNotFoundError:  # another was faster
        return
    try:
        if (moved := _read(aside)) != found:  # that of another who was faster
            with contextlib.suppress(OSError):
                os.link(aside, path)
            raise TakenError(str((moved and moved[0]) or owner))
    finally:
        aside.unlink()
    why = (
        "has ended"
        if alive is False
        else f"gave no sign of life in {stale_seconds:g} s"
    )
    say(f"took {path.parent} over from {owner}, which {why}")


def _read(path: Path) -> tuple[Owner | None, int] | None:
    """Who owns it and its last beat; None if there is no file."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        said = json.loads(text)
        return Owner(**said["owner"]), int(said["beat"])
    except (ValueError, TypeError, KeyError):  # half written
        return None, 0


def _write(file: IO[bytes], me: Owner, number: int) -> None:
    """Writes in place: a file that another has put there is another file."""
    said = {"owner": dataclasses.asdict(me), "beat": number}
    os.pwrite(file.fileno(), json.dumps(said).encode().ljust(_LENGTH - 1) + b"\n", 0)
    os.fsync(file.fileno())  # other machines are to see it


def _system() -> str:
    """The boot of this machine, and the numbering of processes that we are in."""
    words = []
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id")
        words.append(boot.read_text(encoding="ascii").strip())
    with contextlib.suppress(OSError):
        words.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(words)


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot: numbers are used again.

    "" if it has ended, and only its parent has not looked yet.
    """
    with contextlib.suppress(OSError, IndexError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        state, *numbers = stat.rpartition(")")[2].split()
        return "" if state in "ZX" else numbers[18]
    return ""
