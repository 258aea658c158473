"""One trained run that the tests of this folder share."""

import dataclasses
import fcntl
import json
import os

import pytest
from commands import Done, Place, Trained


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
            done = place.run("train", *knobs)
            assert done.code == 0, done.err
            kept.write_text(json.dumps(dataclasses.asdict(done)))
    return Trained(shared, Done(**json.loads(kept.read_text())))
