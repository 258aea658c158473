"""Every file of a token store, spoilt in every way: refused, or never missed."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from launch.errors import is_user_error
from tasks import batches
from tasks.settings import DataSettings, MixtureSettings
from tasks.store import open_store
from tests.support.memory_store import MemoryStore, on_disk, settings, text_store

Spoil = Callable[[Path, Path, random.Random], None]


def _flip(file: Path, other: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _truncate(file: Path, other: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def _empty(file: Path, other: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def _delete(file: Path, other: Path, rng: random.Random) -> None:
    file.unlink()


def _replace(file: Path, other: Path, rng: random.Random) -> None:
    shutil.copyfile(other, file)


WAYS: dict[str, Spoil] = {
    "a bit flipped": _flip,
    "truncated": _truncate,
    "emptied": _empty,
    "deleted": _delete,
    "replaced by another store's": _replace,
}


def spoilt(shared: Path, *, times: int, seed: int) -> Counter[tuple[str, str]]:
    """Spoils each file of a store in each way, and reads all that a run reads.

    Args:
        shared: folder for the stores.
        times: how often each file is spoilt in each way that draws at random.
        seed: seed for what is drawn.
    Returns:
        Number of cases by way and outcome. "refused" is one of our own errors; "made
        again" or "not needed" read the very tokens; "WRONG" read others, and "CRASHED"
        is any other error.
    """
    rng, found = random.Random(seed), Counter[tuple[str, str]]()
    store, other = shared / "store", shared / "other"
    data = settings(vocabulary="bytes", mixture_or_task_name="made_up", read_retries=0)
    for folder, made in ((store, text_store(a=50, b=9)), (other, _shifted())):
        shutil.rmtree(folder, ignore_errors=True)
        on_disk(made, folder)
        _read(folder, data)  # which makes the pack indices
    wanted = _read(store, data)
    for file in sorted(p for p in store.rglob("*") if p.is_file()):
        name = file.relative_to(store)
        for way, spoil in WAYS.items():
            if way.startswith("replaced") and (
                not (other / name).is_file()
                or (other / name).read_bytes() == file.read_bytes()
            ):
                continue
            for _ in range(times if way in ("a bit flipped", "truncated") else 1):
                copy = shared / "spoilt"
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(store, copy)
                spoil(copy / name, other / name, rng)
                found[way, _outcome(copy, data, wanted)] += 1
    return found


def _shifted() -> MemoryStore:
    """A store of the same names and sizes, with other tokens and lengths."""
    made = text_store(b=9, a=50)  # in another order, and so from other formulas
    return MemoryStore({"a": made.splits["a"], "b": made.splits["b"]})


def _outcome(copy: Path, data: DataSettings, wanted: bytes) -> str:
    try:
        read = _read(copy, data)
    except Exception as error:  # every kind is an outcome
        return "refused" if is_user_error(error) else f"CRASHED: {error!r}"
    return "not needed, or made again" if read == wanted else "WRONG"


def _read(folder: Path, data: DataSettings) -> bytes:
    """Every batch of an epoch, the held-out rows, and some text."""
    store = open_store(folder, data)
    feed = batches.training(store, data, MixtureSettings(), batch_size=8, seed=0)
    parts = [json.dumps(store.vocabulary.fingerprint).encode()]
    rows = max(task.num_rows for task in feed.tasks)
    for index in range(-(-rows // 8)):
        parts += [np.asarray(x).tobytes() for x in feed.read(index, 0, 8).values()]
    for task in store.tasks:
        held = batches.heldout(store, task, data, batch_size=8, seed=0)
        for index in range(held.num_eval_batches):
            parts += [np.asarray(x).tobytes() for x in held.read(index, 0, 8).values()]
            parts.append(held.documents(index, 0, 8).tobytes())
        parts.append(
            store.split(task, data.train_split).document("targets", 0).encode()
        )
    return b"".join(parts)
