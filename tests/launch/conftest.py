"""What the tests of this folder share: one trained run, and leaves of gin."""

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import PLANTED, Done, Place, Trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny run of 20 steps on one device, which prepared its own store.

    Workers of one session share it: whoever comes first makes it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    place, kept = Place(shared), shared / "trained.json"
    with open(shared / "trained.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            knobs = place.knobs(shared / "trained", SAMPLE_PROMPT="def ")
            done = place.run("train", *knobs, **PLANTED)
            assert done.code == 0, done.err
            kept.write_text(json.dumps(dataclasses.asdict(done)))
    return Trained(shared, Done(**json.loads(kept.read_text())))


@pytest.fixture
def leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a leaf that includes the tiny run, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def write(
        *lines: str, name: str = "mine.gin", include: str = "runs/tiny.gin"
    ) -> str:
        head = [f'include "{include}"'] if include else []
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        return name

    return write
