"""What a large store costs before anything is learnt: memory, and time.

    python -m benchmarks.large_store [--documents=50000000] [--parts=20000]

A made-up store of so many documents of 20 tokens is written as arrays, and opened as a
run opens it, by one process after the other; then the descriptions of so many parts of
a made-up preparation are gathered as `prepare` gathers them. Memory is what Linux says
of a process that has read random rows: its own, and of files that it maps, which the
processes of a machine share.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tasks import files, vocabularies
from tasks.arrays import SHARD, ShardedArray
from tasks.manifest import Manifest, SplitManifest, TaskManifest, write_manifest
from tasks.rows import TaskRows
from tasks.settings import DataSettings
from tasks.store import open_store, split_path

_DOCUMENT_TOKENS = 20
_LENGTH = 1024
_ROWS = 200_000  # that are read at random
_ROWS_AT_ONCE = 256


def main() -> None:
    """Prints the memory of each kind of packing, and the time of gathering."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=50_000_000)
    parser.add_argument("--parts", type=int, default=20_000)
    parser.add_argument("--read", nargs=3, metavar=("STORE", "PACKING", "ROWS"))
    given = parser.parse_args()
    if given.read:
        _read(given.read[0], given.read[1], int(given.read[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_store(folder, given.documents)
        print(f"{given.documents:,} documents of {_DOCUMENT_TOKENS} tokens")
        for packing in ("next_fit", "stream"):
            for time_of in ("first", "second"):
                command = [sys.executable, "-m", "benchmarks.large_store", "--read"]
                command += [folder, packing, str(_ROWS)]
                said = subprocess.run(command, check=True, capture_output=True)
                print(f"{packing:10} {time_of:7} {said.stdout.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        _gather(folder, given.parts)


def _write_store(folder: str, documents: int) -> None:
    vocabulary = vocabularies.ByteVocabulary()
    for name, content in vocabularies.to_files(vocabulary).items():
        files.write(files.join(folder, name), content)
    splits = {}
    for split, number in (("train", documents), ("validation", 10)):
        path = files.join(split_path(folder, "made_up", split), "targets")
        tokens = number * _DOCUMENT_TOKENS
        _write(files.join(path, "tokens"), tokens, np.uint8, lambda n: n % 200)
        offsets = files.join(path, "offsets")
        _write(offsets, number + 1, np.int64, lambda n: n * _DOCUMENT_TOKENS)
        splits[split] = SplitManifest(
            number, {"targets": tokens}, tokens, f"made-up {number}"
        )
    manifest = Manifest(
        name="made_up",
        vocabulary="bytes",
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        extra_ids=0,
        train_split="train",
        heldout_split="validation",
        tasks={"made_up": TaskManifest(splits, 1.0, {})},
        filters={},
    )
    write_manifest(manifest, folder)


def _write(path, size, dtype, value) -> None:  # type: ignore[no-untyped-def]
    array = ShardedArray(path, np.dtype(dtype), size)
    for shard in range(-(-size // SHARD)):
        start, stop = array.bounds(shard)
        array.write(shard, value(np.arange(start, stop)).astype(dtype))


def _read(store_dir: str, packing: str, number: int) -> None:
    """Opens a store, reads random rows and prints what that took."""
    data = DataSettings(
        mixture_or_task_name="made_up",
        mixture_or_task_module="",
        task_feature_lengths={"targets": _LENGTH},
        store_dir=store_dir,
        vocabulary="bytes",
        packing=packing,  # type: ignore[arg-type]
    )
    before = _memory()
    started = time.monotonic()
    rows = TaskRows("made_up", open_store(store_dir).split("made_up", "train"), data)
    _ = rows.index
    opened = time.monotonic() - started
    most, ready = _peak(), _memory()
    chosen = np.random.default_rng(0).integers(0, rows.num_rows, number)
    started = time.monotonic()
    for first in range(0, number, _ROWS_AT_ONCE):
        some = chosen[first : first + _ROWS_AT_ONCE]
        rows.read(some, np.zeros_like(some), 0)
    took = time.monotonic() - started
    own, _ = _grown(before, ready)
    last, shared = _grown(before, _memory())
    print(
        f"opened in {opened:.1f} s with +{own} MiB of its own, at most "
        f"+{(most - sum(before)) >> 20} MiB on the way; after random rows +{last} MiB "
        f"of its own and +{shared} MiB mapped; "
        f"{number * _LENGTH / took / 1e6:.1f} M tokens/s"
    )


def _grown(before: tuple[int, int], now: tuple[int, int]) -> tuple[int, int]:
    """MiB that each kind of memory has grown by."""
    return (now[0] - before[0]) >> 20, (now[1] - before[1]) >> 20


def _memory() -> tuple[int, int]:
    """Bytes of this process alone, and of files that it maps."""
    said = dict(
        line.split(":", 1)
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    own, mapped = (int(said[key].split()[0]) << 10 for key in ("RssAnon", "RssFile"))
    return own, mapped


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux says it")


def _gather(folder: str, number: int) -> None:
    """Writes the descriptions of parts, gathers them, and loads them as a job does."""
    from tasks.preparation import gathering, parts
    from tasks.preparation.plan import Plan, Unit
    from tasks.settings import FilterSettings

    shards = -(-number // 4)
    for place in range(number):
        unit = Unit("made_up", "train", place // 4)
        last = place % 4 == 3 or place == number - 1
        part = parts.Part(
            unit, place % 4, 1000, last, 1000, {"targets": 8_000_000}, 16 << 20,
            "0" * 64, {"": (1000, 8_000_000, 16 << 20)}, 0, {"empty": 1},
        )  # fmt: skip
        path = parts._path(folder, unit, part.number)
        text = json.dumps(dataclasses.asdict(part))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.json").write_text(text)
    data = DataSettings("made_up", "", {"targets": 8}, folder)
    plan = Plan(
        data, FilterSettings(), (), {"made_up": {"train": ("",) * shards}}, {},
        {"made_up": ("targets",)}, {},
    )  # fmt: skip
    started = time.monotonic()
    gathering.gather(folder, plan, "made_up", "train")
    print(f"{number:,} parts are gathered in {time.monotonic() - started:.2f} s")
    for job in ("first", "second"):
        started = time.monotonic()
        for name in ("targets.starts", "places"):
            gathering.kept(folder, "made_up", "train", name)
        took = 1e3 * (time.monotonic() - started)
        print(f"the {job} job of a process finds its parts in {took:.2f} ms")


if __name__ == "__main__":
    main()
