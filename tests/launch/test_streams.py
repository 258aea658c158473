"""The global batches are the same for any number of real processes, killed or not.

Each process is one of a `jax.distributed` job over loopback, and feeds its own devices
from its own rows. It writes down the digest of every row that it put on a device, and
that of the global batch, which only all processes together can compute.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.config.platform import CPU_FLAG
from tasks import batches, files
from tasks.arrays import write_array
from tasks.manifest import Manifest, SplitManifest, TaskManifest, write_manifest
from tasks.settings import DataSettings, MixtureSettings
from tasks.store import open_store, split_path
from tasks.vocabularies import ByteVocabulary, to_files

BATCH, LENGTH, LAST = 16, 24, 40
RATES = {"first": 0.6, "second": 0.3, "third": 0.1}

WORKER = Path(__file__).parents[1] / "support" / "stream_worker.py"


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory) -> str:
    """Three Tasks of 40 to 200 documents, written without SeqIO."""
    folder = str(tmp_path_factory.mktemp("streams") / "store")
    vocabulary = ByteVocabulary()
    for name, content in to_files(vocabulary).items():
        files.write(files.join(folder, name), content)
    rng = np.random.default_rng(0)
    tasks = {}
    for task, number in zip(RATES, (200, 90, 40), strict=True):
        splits = {}
        for split in ("train", "validation"):
            lengths = rng.integers(2, 60, number)
            path = files.join(split_path(folder, task, split), "targets")
            tokens = rng.integers(3, 259, lengths.sum()).astype(np.uint16)
            write_array(files.join(path, "tokens"), tokens)
            write_array(files.join(path, "offsets"), np.cumsum([0, *lengths]))
            splits[split] = SplitManifest(
                number, {"targets": len(tokens)}, len(tokens), f"{task} {split}"
            )
        tasks[task] = TaskManifest(splits, 1.0, {})
    manifest = Manifest(
        name="made_up",
        vocabulary="bytes",
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        extra_ids=0,
        train_split="train",
        heldout_split="validation",
        tasks=tasks,
        filters={},
    )
    write_manifest(manifest, folder)
    return folder


def wanted_rows(store_dir: str) -> dict[int, dict[int, str]]:
    """The digests of the rows of every batch, read by this process alone."""
    data = DataSettings("made_up", "none", {"targets": LENGTH}, store_dir)
    read = batches.training(
        open_store(store_dir),
        data,
        MixtureSettings(rates=RATES),
        batch_size=BATCH,
        seed=5,
    ).read
    return {
        index: {
            place: hashlib.sha256(row.tobytes()).hexdigest()[:16]
            for place, row in enumerate(read(index, 0, BATCH)["decoder_target_tokens"])
        }
        for index in range(LAST)
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(store_dir, folder, number, first, seconds=0.0) -> list[subprocess.Popen]:
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                json.dumps(
                    [
                        store_dir,
                        RATES,
                        (BATCH, LENGTH),
                        (port, number, process),
                        (first, LAST),
                        seconds,
                        str(folder / f"{first}-{number}-{process}.jsonl"),
                    ]
                ),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"XLA_FLAGS": CPU_FLAG},
        )
        for process in range(number)
    ]


def seen(folder: Path) -> dict[int, tuple[set[int], dict[int, set[str]]]]:
    """By batch: the digests of the whole, and those of each row, of all processes."""
    found: dict[int, tuple[set[int], dict[int, set[str]]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                index, whole, rows = json.loads(line)
            except ValueError:  # the process was killed while it wrote
                continue
            wholes, by_row = found.setdefault(index, (set(), {}))
            wholes.add(whole)
            for row, digest in rows.items():
                by_row.setdefault(int(row), set()).add(digest)
    return found


def check(folder: Path, wanted: dict[int, dict[int, str]]) -> None:
    found = seen(folder)
    assert sorted(found) == list(range(LAST))
    for index, (wholes, by_row) in found.items():
        assert len(wholes) == 1, index
        assert by_row == {row: {digest} for row, digest in wanted[index].items()}


def finish(processes) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]


def kill_at(processes, logs: list[Path], number_of_lines: int) -> int:
    """Kills them all once the first has come so far; returns how far all had come."""
    deadline = time.monotonic() + 60
    while not logs[0].exists() or len(logs[0].read_text().splitlines()) < (
        number_of_lines
    ):
        assert time.monotonic() < deadline, "it never got so far"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in reversed(processes):
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    return min(log.read_text().count("\n") if log.exists() else 0 for log in logs)


def logs_of(folder: Path, first: int, number: int) -> list[Path]:
    return [folder / f"{first}-{number}-{process}.jsonl" for process in range(number)]


def test_two_processes_killed_and_four_that_go_on_see_one_stream(store_dir, tmp_path):
    first = start(store_dir, tmp_path, 2, 0, seconds=0.05)
    done = kill_at(first, logs_of(tmp_path, 0, 2), 7)
    assert 5 <= done < LAST
    finish(start(store_dir, tmp_path, 4, done))
    check(tmp_path, wanted_rows(store_dir))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_any_number_of_processes_sees_the_same_batches(store_dir, tmp_path, number):
    finish(start(store_dir, tmp_path, number, 0))
    check(tmp_path, wanted_rows(store_dir))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 4])
def test_killed_at_random_steps_the_stream_is_the_same(store_dir, tmp_path, number):
    rng = np.random.default_rng(number)
    done = 0
    for _ in range(3):
        processes = start(store_dir, tmp_path, number, done, seconds=0.03)
        logs = logs_of(tmp_path, done, number)
        done += kill_at(processes, logs, int(rng.integers(2, 9)))
    finish(start(store_dir, tmp_path, number, done))
    check(tmp_path, wanted_rows(store_dir))
