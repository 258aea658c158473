"""Prepares into, and reads from, a server of the S3 kind on this machine."""

import http.server
import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from corpus import settings
from memory_store import on_disk, text_store

from tasks import files
from tasks.store import StoreError, open_store

SUPPORT = Path(__file__).parents[1] / "support"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Bucket(http.server.BaseHTTPRequestHandler):
    """Keeps objects in memory; asks nobody who they are."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def _answer(self, status, content=b"", **headers):
        fault = next(self.server.faults, "")
        if fault == "busy":
            status, content = 503, b""
        elif fault == "late":
            time.sleep(0.3)
        elif fault == "dropped":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut off" and content:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    def _key(self):
        path, _, query = self.path.partition("?")
        key = urllib.parse.unquote(path).removeprefix("/bucket").removeprefix("/")
        return key, urllib.parse.parse_qs(query)

    def do_GET(self):
        key, query = self._key()
        objects = self.server.objects
        if not key:
            prefix = query.get("prefix", [""])[0]
            found = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(objects[name])}</Size></Contents>"
                for name in sorted(objects)
                if name.startswith(prefix)
            )
            xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}"
            self._answer(200, f"{xml}</ListBucketResult>".encode())
        elif key not in objects:
            self._answer(404)
        else:
            content, status, more = objects[key], 200, {}
            etag = f'"{hash(content)}"'
            if wanted := re.fullmatch(
                r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")
            ):
                size = len(content)
                first, last = wanted.groups()
                start = int(first) if first else size - int(last)
                stop = min(int(last) + 1, size) if first and last else size
                more["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
                content, status = content[start:stop], 206
            self._answer(status, content, ETag=etag, **more)

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self._key()[0]] = content
        self._answer(200, ETag=f'"{hash(content)}"')

    def do_DELETE(self):
        self.server.objects.pop(self._key()[0], None)
        self._answer(204)


@pytest.fixture
def server(monkeypatch):
    """A server with one bucket, which answers as it should unless told otherwise."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        server.objects, server.daemon_threads = {}, True
        server.faults = iter(())
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        yield server
        server.shutdown()
        thread.join()


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
    kinds = [*[""] * 6, "busy", *[""] * 6, "late", *[""] * 6, "dropped", *[""] * 6]
    kinds.append("cut off")
    told = []

    def faults():
        for kind in itertools.cycle(kinds):
            told.append(kind)
            yield kind

    server.faults = faults()
    assert run("s3://bucket/store", READS).stdout == wanted
    assert min(map(told.count, kinds)) >= 1, "each kind happened"


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
