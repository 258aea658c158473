"""Memory and speed of preparing a corpus that is larger than what may be held of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SUPPORT = Path(__file__).parents[1] / "support"
CORPUS_BYTES = int(os.environ.get("SWITCHYARD_MEMORY_TEST_BYTES", 2 << 30))
BLOCK_BYTES = 32 << 20
MOST_MORE_BYTES = 600_000_000

PREPARES = """
import json, sys, time
from tasks import seqio_tasks
from tasks.prepare import prepare
from tasks.settings import DataSettings

def peak_bytes():
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

data = DataSettings("lines", "corpus_of_files", {"targets": 64}, sys.argv[1],
                    vocabulary="bytes")
seqio_tasks.find(data, ("corpus_of_files",))
from tasks.quality import classifier, duplicates
before, start = peak_bytes(), time.monotonic()
manifest = prepare(data, allowed_modules=("corpus_of_files",))
seconds = time.monotonic() - start
counts = manifest.split("lines", "train")
print(json.dumps([before, peak_bytes(), seconds, counts.documents, counts.text_bytes]))
"""


def write_corpus(folder: Path) -> tuple[int, int]:
    """Writes lines of about 2 kB of words; returns how many, and the bytes of them."""
    rng = np.random.default_rng(0)
    words = [
        bytes(rng.integers(97, 123, n).tolist()) for n in rng.integers(1, 12, 9999)
    ]
    lines, size = [], 0
    while size < BLOCK_BYTES:
        chosen = rng.integers(0, len(words), rng.integers(50, 600))
        lines.append(b" ".join(words[place] for place in chosen))
        size += len(lines[-1]) + 1
    block = b"\n".join(lines) + b"\n"
    repeats = CORPUS_BYTES // len(block) + 1
    with open(folder / "train-0.txt", "wb") as file:
        for _ in range(repeats):
            file.write(block)
    (folder / "validation.txt").write_bytes(block[: 1 << 20].rpartition(b"\n")[0])
    return repeats * len(lines), repeats * (len(block) - len(lines))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert free > 5 * CORPUS_BYTES, f"this needs {5 * CORPUS_BYTES:,} bytes of disk"
    folder = tmp_path / "corpus"
    folder.mkdir()
    documents, text_bytes = write_corpus(folder)
    done = subprocess.run(
        [sys.executable, "-c", PREPARES, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "CORPUS": str(folder),
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]),
        },
    )
    assert done.returncode == 0, done.stderr
    before, after, seconds, stored, stored_bytes = map(
        float, done.stdout.strip().strip("[]").split(",")
    )
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep for three runs
    print(
        f"{(after - before) / 1e6:.0f} MB above the {before / 1e6:.0f} MB of imports; "
        f"{stored_bytes / seconds / 1e6:.1f} MB/s"
    )
    assert (stored, stored_bytes) == (documents, text_bytes)
    assert after - before <= MOST_MORE_BYTES
