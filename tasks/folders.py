"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from tasks.errors import StoreError
from tasks.manifest import MANIFEST

_WRITER = "writer"  # names the machine whose process is writing


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, which takes the name `target` at the end.

    Until then it is called `<target>.incomplete-<process>`; whatever goes wrong it is
    removed, and if the process is killed the next one removes it. A store that was
    at `target` stays until the new one is whole.

    Raises:
        StoreError: the folder cannot be made, or `target` holds something that is no
            store.
    """
    _refuse_what_is_no_store(target)
    unfinished = target.with_name(f"{target.name}.incomplete-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        unfinished.mkdir()
        (unfinished / _WRITER).write_text(socket.gethostname())
    except OSError as error:
        raise StoreError(
            f"STORE_DIR = {str(target)!r} cannot be made: {error.strerror} "
            f"({error.filename}). Choose a folder that this user may write to."
        ) from None
    try:
        yield unfinished
        (unfinished / _WRITER).unlink()
        _put_in_place(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _refuse_what_is_no_store(target: Path) -> None:
    """Nothing but a store is ever replaced."""
    if target.exists() and not target.is_dir():
        raise StoreError(f"STORE_DIR = {str(target)!r} is a file: choose another name")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise StoreError(
            f"STORE_DIR = {str(target)!r} holds files but no {MANIFEST}, so it is no "
            "store and is left alone: choose another folder, or empty this one"
        )


def _remove_leftovers(target: Path) -> None:
    """Removes what killed processes of this machine left behind."""
    for leftover in target.parent.glob(f"{target.name}.incomplete-*"):
        process = leftover.name.rpartition("-")[2]
        with contextlib.suppress(OSError):
            here = (leftover / _WRITER).read_text() == socket.gethostname()
            if here and process.isdecimal() and not _is_alive(int(process)):
                shutil.rmtree(leftover)


def _is_alive(process: int) -> bool:
    if process == os.getpid():  # an earlier process that had this one's number
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(unfinished: Path, target: Path) -> None:
    """Gives the finished folder its name; an older store leaves first."""
    replaced = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        target.rename(replaced)
    try:
        unfinished.rename(target)
    except OSError as error:
        raise StoreError(
            f"STORE_DIR = {str(target)!r} cannot take its name: {error.strerror}. Is "
            "another process preparing the same store?"
        ) from None
    shutil.rmtree(replaced, ignore_errors=True)
