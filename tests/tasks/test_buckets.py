"""Prepares into, and reads from, a server of the S3 kind on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import bucket_server
import numpy as np
import pytest
from corpus import settings
from memory_store import on_disk, text_store

from tasks import files
from tasks.store import StoreError, open_store

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def server(monkeypatch):
    """A server with one bucket, which answers as it should unless told otherwise."""
    with bucket_server.serving() as server:
        for name, value in bucket_server.environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def objects(server):
    """What is in the bucket, by its name."""
    return server.objects


PREPARES = """
import sys
from corpus import MODULE, settings
from tasks.prepare import prepare
print(prepare(settings(sys.argv[1]), allowed_modules=(MODULE,)).fingerprint)
"""


READS = """
import hashlib, sys
from memory_store import settings
from tasks import batches
from tasks.settings import MixtureSettings
from tasks.store import open_store

data = settings(mixture_or_task_name="made_up", vocabulary="bytes")
store = open_store(sys.argv[1], data)
feed = batches.training(store, data, MixtureSettings(), batch_size=4, seed=0)
found = hashlib.sha256()
for index in range(12):
    for name, values in sorted(feed.read(index, 0, 4).items()):
        found.update(values.tobytes())
print(found.hexdigest())
"""


def run(store_dir, program=PREPARES) -> subprocess.CompletedProcess:
    """Works in a process of its own: the driver keeps what its variables were."""
    return subprocess.run(
        [sys.executable, "-c", program, str(store_dir)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
    )


def test_a_bucket_that_fails_now_and_then_is_read_all_the_same(server, tmp_path):
    on_disk(text_store(a=40, b=9), tmp_path / "store")
    wanted = run(tmp_path / "store", READS).stdout
    for path in tmp_path.rglob("*"):
        if path.is_file():
            server.objects[str(path.relative_to(tmp_path))] = path.read_bytes()
    told = []
    server.faults = bucket_server.now_and_then(told)
    assert run("s3://bucket/store", READS).stdout == wanted
    assert set(told) == {"", *bucket_server.FAULTS}, "each kind happened"


@pytest.mark.slow
def test_a_store_in_a_bucket_is_the_one_on_disk(objects, tmp_path):
    run(tmp_path / "store")
    run("s3://bucket/a/store")
    local = {
        str(path.relative_to(tmp_path)): path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert {name.removeprefix("a/"): content for name, content in objects.items()} == (
        local
    )
    assert files.names("s3://bucket/a")[0] == "store/made_up/train/targets/offsets/c/0"

    from tasks import batches
    from tasks.settings import MixtureSettings

    read = [
        batches.training(
            open_store(path, settings(path)),
            settings(path),
            MixtureSettings(),
            batch_size=4,
            seed=0,
        ).read(0, 0, 4)["decoder_target_tokens"]
        for path in ("s3://bucket/a/store", str(tmp_path / "store"))
    ]
    np.testing.assert_array_equal(*read)
    assert any("pack-" in name for name in objects)

    (name,) = [n for n in objects if n.endswith("train/targets/tokens/c/0")]
    damaged = bytearray(objects[name])
    damaged[len(damaged) // 2] ^= 1
    objects[name] = bytes(damaged)
    part = open_store("s3://bucket/a/store").split("made_up", "train")
    with pytest.raises(StoreError, match=r"s3://bucket/.*tokens/c/0 cannot be read or"):
        part.read("targets", [0], [part.num_tokens()])
    del objects[name]
    with pytest.raises(StoreError, match=r"lacks its file s3://bucket/a/"):
        open_store("s3://bucket/a/store")
