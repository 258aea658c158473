"""Files that are learnt and scored: the same, or copies of one another."""

import hashlib
import os
from collections.abc import Iterable

from tasks import files, seqio_tasks
from tasks.seqio_tasks import Found
from tasks.settings import DataSettings, FilterSettings

_BLOCK_BYTES = 1 << 16  # of the beginning and of the end


def described(found: Found, data: DataSettings, filters: FilterSettings) -> str:
    """Says which file is in the train and in the held-out split; "" if none is.

    Files are the same by their path, or by their size, first and last blocks. Nothing
    is said where DUPLICATES leaves such documents out.

    Args:
        found: the Tasks.
        data: names of the splits.
        filters: whether duplicates are left out.
    """
    if filters.duplicates != "keep":
        return ""
    train, held = (_files(found, s) for s in (data.train_split, data.heldout_split))
    pairs = list(_pairs(train, held))
    if not pairs:
        return ""
    learnt, scored = pairs[0]
    what = f"{learnt} is"
    if learnt != scored:
        what = f"{learnt} and {scored} are the same file or copies, and"
    more = f" (and {len(pairs) - 1:,} more)" if len(pairs) > 1 else ""
    in_splits = (
        f"in TRAIN_SPLIT {data.train_split!r} of task {train[learnt]!r} and in "
        f"HELDOUT_SPLIT {data.heldout_split!r} of task {held[scored]!r}{more}"
    )
    return (
        f"{what} {in_splits}, so that what is scored is also learnt: give the splits "
        "files of their own, or set DUPLICATES = 'exact'"
    )


def _files(found: Found, split: str) -> dict[str, str]:
    """The files of a split, and the Task that each is of.

    Splits of TFDS are often slices of the same files, and those are left to TFDS.
    """
    seqio = seqio_tasks.import_seqio()
    return {
        path: name
        for name, task in reversed(found.tasks.items())
        if not isinstance(task.source, seqio.TfdsDataSource)
        for path in seqio_tasks.source_files(task, split)
        if not files.is_local(path) or os.path.isfile(path)
    }


def _pairs(train: Iterable[str], held: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Each train file that is also held out, with the one that it is."""
    by_place = {_place(path): path for path in held}
    by_size: dict[int, list[str]] = {}
    for path in filter(files.is_local, held):
        by_size.setdefault(os.path.getsize(path), []).append(path)
    for path in train:
        if _place(path) in by_place:
            yield path, by_place[_place(path)]
        elif files.is_local(path) and (size := os.path.getsize(path)):
            for other in by_size.get(size, ()):
                if _digest(path, size) == _digest(other, size):
                    yield path, other
                    break


def _place(path: str) -> str:
    return os.path.realpath(path) if files.is_local(path) else path


def _digest(path: str, size: int) -> bytes:
    """Stands for the content of a file, of which it reads little."""
    with open(path, "rb") as file:
        hashed = hashlib.blake2b(file.read(_BLOCK_BYTES))
        file.seek(max(0, size - _BLOCK_BYTES))
        hashed.update(file.read(_BLOCK_BYTES))
    return hashed.digest()
