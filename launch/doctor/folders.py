"""The places a run writes to and reads from: space, speed, and locks."""

import contextlib
import fcntl
import functools
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.checkpoints.bucket import Bucket
from launch.checkpoints.places import CheckpointError
from launch.config.settings import Settings
from launch.doctor.line import Line, masked
from launch.terminal.lines import compact, waiting
from tasks import store
from tasks.errors import StoreError

WRITTEN_BYTES = 64 * 10**6
_PIECE_BYTES = 4 * 10**6
_LEAST_BYTES, _LITTLE_BYTES = 1 << 30, 10 << 30
_SLOW_BYTES_PER_SECOND = 10e6
_BUCKET_SECONDS = 60.0


def lines(settings: Settings, *, quiet: bool) -> list[Line]:
    """Returns what there is to say of MODEL_DIR, CHECKPOINT_DIR and STORE_DIR.

    Args:
        settings: those of the run.
        quiet: whether no progress is shown.
    """
    found = _written("MODEL_DIR", settings.loop.model_dir, quiet=quiet)
    if checkpoint_dir := settings.loop.checkpoint_dir:
        ask = functools.partial(_checkpoints, checkpoint_dir)
        found.append(_bucket("CHECKPOINT_DIR", checkpoint_dir, ask, quiet=quiet))
    store_dir = settings.data.store_dir
    if "://" in store_dir:
        ask = functools.partial(_store, store_dir)
        return [*found, _bucket("STORE_DIR", store_dir, ask, quiet=quiet)]
    same = nearest_folder(store_dir) == nearest_folder(settings.loop.model_dir)
    if same:
        where = nearest_folder(store_dir)
        return [*found, Line("folders", "STORE_DIR", f"{store_dir}, also in {where}")]
    if is_prepared(store_dir) and not os.access(store_dir, os.W_OK):
        advice = "rows are packed anew in each run, for they cannot be kept there"
        value = f"{store_dir}: can be read, not written"
        return [*found, Line("folders", "STORE_DIR", value, "note", advice)]
    return [*found, *_written("STORE_DIR", store_dir, quiet=quiet)]


def is_prepared(store_dir: str) -> bool:
    """Says whether a store can be seen at a place on this machine."""
    return "://" not in store_dir and Path(store_dir, store.MANIFEST).is_file()


def nearest_folder(path: str) -> Path:
    """Returns a folder, or of one that is still to be made the nearest above it."""
    folder = Path(path).absolute()
    while not folder.is_dir() and folder != folder.parent:
        if folder.is_file():
            break
        folder = folder.parent
    return folder


def _written(name: str, path: str, *, quiet: bool) -> list[Line]:
    """Space, speed and locks of a folder, by a file that has no name for long."""
    folder = nearest_folder(path)
    value = path if Path(path).is_dir() else f"{path}, to be made in {folder}"
    if folder.is_file():
        advice = f"{folder} is a file: choose another {name}"
        return [Line("folders", name, value, "problem", advice)]
    found = [_space(name, folder, value)]
    try:
        with _scratch(folder) as (first, second):
            found.append(_lock(name, first, second))
            message = f"writing {compact(WRITTEN_BYTES, 'B')} to {folder}"
            with waiting(masked(message), quiet=quiet):
                found.append(_speed(name, first))
    except OSError as error:
        advice = f"choose a {name} that this user may write to, and that has space"
        why = f"{folder}: {error.strerror or error}"
        found.append(Line("folders", f"{name} writes", why, "problem", advice))
    return found


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[tuple[int, int]]:
    """A file, opened twice, whose name is gone before anything is written."""
    with contextlib.ExitStack() as stack:
        first, path = tempfile.mkstemp(prefix=".switchyard-doctor-", dir=folder)
        stack.callback(os.close, first)
        try:
            second = os.open(path, os.O_RDWR)
            stack.callback(os.close, second)
        finally:
            os.unlink(path)
        yield first, second


def _space(name: str, folder: Path, value: str) -> Line:
    there = os.statvfs(folder)
    free, total = there.f_bavail * there.f_frsize, there.f_blocks * there.f_frsize
    if not total:  # as of a bucket that is mounted, or of what is no disk
        advice = "its size is not told: see that there is space"
        return Line("folders", name, value, "note", advice)
    value = f"{value}: {compact(free, 'B')} free of {compact(total, 'B')}"
    if free < _LEAST_BYTES:
        advice = f"free some space, or choose another {name}"
        return Line("folders", name, value, "problem", advice)
    if free < _LITTLE_BYTES:
        advice = "checkpoints and tokens of large runs need more"
        return Line("folders", name, value, "note", advice)
    return Line("folders", name, value)


def _lock(name: str, first: int, second: int) -> Line:
    """Whether a lock keeps out whoever opened the file for himself."""
    group, label = "folders", f"{name} locks"
    advice = (
        "two runs in one folder would not notice each other: mount it with locks "
        "(of NFS, version 4), or see to it yourself"
    )
    try:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Line(group, label, "work")
        return Line(group, label, "are given twice", "problem", advice)
    except OSError as error:
        why = f"are not to be had: {error.strerror or error}"
        return Line(group, label, why, "problem", advice)


def _speed(name: str, file: int) -> Line:
    """How fast a file is written, to the disk and not only to memory."""
    piece = memoryview(secrets.token_bytes(_PIECE_BYTES))  # which nothing compresses
    began = time.monotonic()
    for _ in range(WRITTEN_BYTES // _PIECE_BYTES):
        left = piece
        while left:
            left = left[os.write(file, left) :]
    os.fsync(file)
    speed = WRITTEN_BYTES / max(time.monotonic() - began, 1e-9)
    value = f"{compact(speed, 'B')}/s ({compact(WRITTEN_BYTES, 'B')} with fsync)"
    if speed < _SLOW_BYTES_PER_SECOND:
        advice = f"checkpoints of large models take long: choose a faster {name}"
        return Line("folders", f"{name} writes", value, "note", advice)
    return Line("folders", f"{name} writes", value)


def _store(store_dir: str) -> str:
    """What a bucket holds: only a manifest is asked for."""
    there = store.is_there(store_dir)
    return "holds a store" if there else "answers, holds no store yet"


def _checkpoints(checkpoint_dir: str) -> str:
    """What a bucket holds: only an index is asked for."""
    found = Bucket(checkpoint_dir)
    found.look()
    return f"answers, holds {len(found.entries):,} checkpoints"


def _bucket(name: str, place: str, ask: Callable[[], str], *, quiet: bool) -> Line:
    """Whether a bucket answers."""
    answer: list[str | Exception] = []

    def work() -> None:
        try:
            answer.append(ask())
        except (StoreError, CheckpointError) as error:
            answer.append(error)

    with waiting(masked(f"asking {place}"), quiet=quiet):
        asking = threading.Thread(target=work, name="bucket", daemon=True)
        asking.start()
        asking.join(_BUCKET_SECONDS)
    found = answer[0] if answer else f"no answer within {_BUCKET_SECONDS:.0f} s"
    if answer and isinstance(found, str):
        return Line("folders", name, f"{place}: {found}")
    advice = "check the name, the network, and the credentials of this machine"
    return Line("folders", name, str(found), "problem", advice)
