"""The folders of a preparation: its own, and that of the store it makes."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tasks import files, owner
from tasks.errors import StoreError
from tasks.manifest import MANIFEST
from tasks.preparation.plan import PLAN
from tasks.store import is_there, split_path

_OWNER = "owner"  # of a preparation where the file system has no locks
_LOCK = ".__lock"  # what TensorStore names it
_OF_VOCABULARIES = {"vocabulary.json", "vocabulary.model", "tokenizer.json"}
_OF_STORES = {MANIFEST, "quality.png", *_OF_VOCABULARIES}
_OF_PREPARATIONS = {
    PLAN,
    "lock",
    _OWNER,
    "parts",
    "assembly",
    "signatures",
    "duplicates",
}
_OF_PREPARATIONS |= {"classifier", "quality.json", "quality.png", *_OF_VOCABULARIES}


def refuse_what_is_no_store(store_dir: str, work: str) -> None:
    """Nothing but a store, or one that we had begun, is ever replaced.

    Raises:
        StoreError: something else is there.
    """
    if files.is_local(store_dir) and Path(store_dir).is_file():
        raise StoreError(f"STORE_DIR = {store_dir!r} is a file: choose another name")
    if files.kvstore(store_dir)["path"] == "":
        raise StoreError(
            f"STORE_DIR = {store_dir!r} is a whole bucket: name a folder in it"
        )
    _refuse_others(work, _entries(work) - _OF_PREPARATIONS)
    there = _entries(store_dir)
    if there and not is_there(store_dir):
        if _was_begun(work):
            return
        raise StoreError(
            f"STORE_DIR = {store_dir!r} holds files but no {MANIFEST}, so it is no "
            "store and is left alone: choose another folder, or empty this one"
        )
    _refuse_others(store_dir, there - _OF_STORES - _folders_of(store_dir))


def _refuse_others(folder: str, others: set[str]) -> None:
    if others:
        named = ", ".join(map(repr, sorted(others)[:5]))
        raise StoreError(
            f"{folder} holds what is not of a store ({named}), and would be deleted: "
            "move that away, or set another STORE_DIR"
        )


def _entries(folder: str) -> set[str]:
    """What lies directly in a folder.

    Of a writer that was killed TensorStore's lock is left beside a file, and goes by
    the file's name here; whoever writes the file next takes it.
    """
    if not files.is_local(folder):
        return {name.partition("/")[0] for name in files.names(folder)}
    path = Path(folder)
    names = (entry.name for entry in path.iterdir()) if path.is_dir() else ()
    return {name.removesuffix(_LOCK) for name in names}


def _folders_of(store_dir: str) -> set[str]:
    """The folders that a store's own manifest names, of any version."""
    try:
        manifest = json.loads(files.read(files.join(store_dir, MANIFEST)) or b"{}")
        named = [*manifest.get("tasks", ()), *manifest.get("splits", ())]
    except (ValueError, AttributeError, TypeError):
        return set()
    return {split_path("", name, "").strip("/") for name in map(str, named)}


@contextlib.contextmanager
def alone(work: str) -> Iterator[None]:
    """Keeps a second preparation of this machine out of the folder."""
    if not files.is_local(work):
        yield
        return
    with contextlib.ExitStack() as held:
        lock, has_locks = _locked(Path(work))
        held.enter_context(lock)
        if not has_locks:
            _own(Path(work), held)
        try:
            yield
        finally:
            held.close()
            _leave(Path(work))


def _own(work: Path, held: contextlib.ExitStack) -> None:
    """Owns the folder where the file system has no locks, until `held` is left."""
    try:
        held.enter_context(owner.owned(work / _OWNER, say=_say, lost=_lost))
    except owner.TakenError as taken:
        raise _taken(work, f" ({taken})") from None
    except OSError as error:
        raise _unwritable(str(work).removesuffix(".preparing"), error) from None


def _say(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def _lost(why: str) -> None:
    """Ends a preparation from which another has taken its folder."""
    _say(f"{why}: this preparation writes no more")
    os._exit(1)


def _taken(work: Path, who: str) -> StoreError:
    return StoreError(
        f"another process is preparing {str(work).removesuffix('.preparing')}{who}: "
        "wait until it is done, or set another STORE_DIR"
    )


def _locked(work: Path) -> tuple[BinaryIO, bool]:
    """Returns the lock of the folder, held until it is closed.

    And whether it locks anything: not all file systems have locks.
    """
    store_dir = str(work).removesuffix(".preparing")
    path = work / "lock"
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(store_dir, error) from None
        try:
            lock = open(path, "wb")  # noqa: SIM115
        except FileNotFoundError:  # whoever was here removed the folder in between
            continue
        except OSError as error:
            raise _unwritable(store_dir, error) from None
        try:
            has_locks = owner.locked(lock)
            # A lock that was removed since it was opened keeps nobody out.
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock, has_locks
        except BlockingIOError:
            lock.close()
            raise _taken(work, "") from None
        except FileNotFoundError:
            pass
        lock.close()


def _unwritable(store_dir: str, error: OSError) -> StoreError:
    return StoreError(
        f"STORE_DIR = {store_dir!r} cannot be made: {error.strerror} "
        f"({error.filename}). Choose a folder that this user may write to."
    )


def _leave(work: Path) -> None:
    """Removes the folder if there is nothing in it but the lock."""
    with contextlib.suppress(OSError):  # somebody else came, and waits for nothing
        if [entry.name for entry in work.iterdir()] == ["lock"]:
            Path(work, "lock").unlink()
            work.rmdir()


def begin_store(work: str, store_dir: str) -> None:
    """Makes room for a store where one was, unless that was done before."""
    if files.read(_started_path(work)) is not None:
        return
    files.write(_replacing_path(work), b"")
    files.delete(files.join(store_dir, MANIFEST))  # half a store is none
    files.delete_folder(store_dir)
    files.write(_started_path(work), b"")


def abandon(work: str, store_dir: str) -> None:
    """Deletes all of a preparation, and of a store that it began and did not finish."""
    if _was_begun(work) and not is_there(store_dir):
        files.delete_folder(store_dir)
    forget(work)


def forget(work: str) -> None:
    """Deletes all of a preparation but its lock.

    The plan goes first, and what has no plan does not count: a deletion that is
    interrupted leaves nothing that would be taken up.
    """
    files.delete(files.join(work, PLAN))
    if not files.is_local(work):
        files.delete_folder(work)
        return
    for entry in Path(work).iterdir():
        if entry.is_dir():
            files.delete_folder(str(entry))
        elif entry.name not in ("lock", _OWNER):
            entry.unlink()


def _was_begun(work: str) -> bool:
    """Whether the files at the place of the store are of this preparation."""
    paths = (_replacing_path(work), _started_path(work))
    return any(files.read(path) is not None for path in paths)


def _replacing_path(work: str) -> str:
    """The file that says that whatever is at the place of the store may go."""
    return files.join(work, "assembly", "replacing")


def _started_path(work: str) -> str:
    """The file that says that it is gone, and that what is there is new."""
    return files.join(work, "assembly", "started")
