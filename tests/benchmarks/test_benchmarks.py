"""Every benchmark runs to its end, as a process of its own and as small as it goes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The words that make each small, and what it then prints.
SMALL = {
    "drawing": (
        ["--repeats=1", "--beams", "2", "--tokens=2", "--gin.NUM_LAYERS=2"],
        ["ms/token", "greedy", "2 beams"],
    ),
    "mixtral": (
        ["--steps=1", "--gin.NUM_LAYERS=1"],
        ["switchyard", "÷ theirs", "sparse layers", "attention", "clip and AdamW"],
    ),
    "moe_layer": (
        ["--repeats=1", "--case", "mixtral"],
        ["mixtral: 2,048 tokens", "dense", "all_to_all", "ragged", "ring"],
    ),
    "prepare": (
        ["--megabytes=5"],
        ["bytes, through SeqIO", "sentencepiece", "near duplicates", "random rows"],
    ),
    "profile_step": (
        ["--steps=1", "--gin.NUM_LAYERS=1"],
        ["tokens/s", "norm ", "softmax ", "thread ms"],
    ),
    "records": ([], ["show another", "a line", "resume", "report"]),
    "train_step": (
        ["--steps=1", "--gin.NUM_LAYERS=2", "--gin.BATCH_SIZE=4"],
        ["switch top-1", "glam top-2", "dense", "demo mesh", "one device"],
    ),
}


def test_no_benchmark_is_left_out():
    files = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    # Beside what is timed, what is compiled for slices that are not here.
    # And what takes minutes to say anything, or needs another library to compare with.
    others = {"__init__", "weak_scaling", "large_store", "convert"}
    assert files - others == SMALL.keys()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Compiled steps; two of the benchmarks have the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_to_its_end(name, cache):
    words, expected = SMALL[name]
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_"))
    }
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *words],
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for word in expected:
        assert word in done.stdout
    if name == "mixtral":
        said = "PyTorch's step is left out" in done.stdout
        assert said != bool(importlib.util.find_spec("transformers"))
