"""A server on this machine that answers as S3 and as Google's storage do.

It keeps objects in memory, honours conditions of writes (If-Match, If-None-Match,
ifGenerationMatch), asks nobody who they are, and fails when it is told to.
"""

import contextlib
import hashlib
import http.server
import itertools
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

# What fails, and when: "busy", "dropped" and "cut off" after the request was carried
# out, as where an answer is lost; "refused" before.
FAULTS = ("busy", "refused", "late", "dropped", "cut off")
# What lets TensorStore in, wherever nobody asks.
KEYS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one connection; objects and faults are the server's."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *unused):
        pass

    def do_GET(self):
        if self._is_refused():
            return
        key, query = self._key()
        objects = self.server.objects
        if not key:
            self._list(query)
        elif (content := objects.get(key)) is None:
            self._answer(404)
        else:
            generation = str(self.server.generations.get(key, 1))
            more = {"ETag": _etag(content), "x_goog_generation": generation}
            status = 200
            if wanted := _RANGE.fullmatch(self.headers.get("Range", "")):
                size = len(content)
                first, last = wanted.groups()
                start = int(first) if first else size - int(last)
                if start >= size:
                    self._answer(416)
                    return
                stop = min(int(last) + 1, size) if first and last else size
                more["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
                content, status = content[start:stop], 206
            self._answer(status, content, **more)

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        key, query = self._key()
        if query.get("name"):
            key = query["name"][0]
        self.server.before_write(key)
        if self._is_refused():
            return
        with self.server.lock:
            now = self.server.objects.get(key)
            etag = None if now is None else _etag(now)
            generation = self.server.generations.get(key, 1) if now is not None else 0
            met = (
                not (self.headers.get("If-None-Match") == "*" and now is not None)
                and self.headers.get("If-Match", etag) == etag
                and int(query.get("ifGenerationMatch", [generation])[0]) == generation
            )
            if met:
                self.server.objects[key] = content
                self.server.generations[key] = next(self.server.numbers)
        if not met:
            self._answer(412)
            return
        told = {"name": key, "generation": str(self.server.generations[key])}
        google = json.dumps(told).encode() if query.get("name") else b""
        self._answer(200, google, ETag=_etag(content))

    do_POST = do_PUT

    def do_DELETE(self):
        if not self._is_refused():
            self.server.objects.pop(self._key()[0], None)
            self._answer(204)

    def _list(self, query):
        """Names, with the prefix that is asked for."""
        objects, prefix = self.server.objects, query.get("prefix", [""])[0]
        first = query.get("startOffset", [""])[0]
        end = query.get("endOffset", ["\U0010ffff"])[0]
        names = sorted(
            name
            for name in list(objects)
            if name.startswith(prefix) and first <= name < end
        )
        if self.path.startswith("/storage/"):
            items = [{"name": name, "size": str(len(objects[name]))} for name in names]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        found = "".join(
            f"<Contents><Key>{name}</Key><Size>{len(objects[name])}</Size></Contents>"
            for name in names
        )
        xml = f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}"
        self._answer(200, f"{xml}</ListBucketResult>".encode())

    def _key(self):
        """Name of the object, "" of the bucket itself; and what is asked besides."""
        path, _, query = self.path.partition("?")
        for prefix in ("/upload/storage/v1/b/bucket/o", "/storage/v1/b/bucket/o"):
            path = path.removeprefix(prefix)
        key = urllib.parse.unquote(path).removeprefix("/bucket").removeprefix("/")
        return key, urllib.parse.parse_qs(query)

    def _is_refused(self):
        self.fault = next(self.server.faults, "")
        if self.fault == "refused":
            self._send(503, b"", {})
        return self.fault == "refused"

    def _answer(self, status, content=b"", **headers):
        if self.fault == "busy":
            status, content = 503, b""
        elif self.fault == "late":
            time.sleep(0.3)
        elif self.fault == "dropped":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._send(status, content, headers)

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":  # more would be taken for the next answer
            return
        if self.fault == "cut off" and content:
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextlib.contextmanager
def serving() -> Iterator[http.server.ThreadingHTTPServer]:
    """Runs a server with one bucket, "bucket", which fails nobody until it is told to.

    Its attributes: `objects`, what the bucket holds by name; `faults`, an iterator of
    what becomes of each request; `before_write`, called with the name of each object.
    """
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.objects, server.generations = {}, {}
        server.numbers, server.lock = itertools.count(2), threading.Lock()
        server.faults, server.before_write = iter(()), lambda key: None
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def environment(server: http.server.ThreadingHTTPServer) -> dict[str, str]:
    """What a process must have in its environment to find the server."""
    address = f"http://127.0.0.1:{server.server_port}"
    return {**KEYS, "AWS_ENDPOINT_URL": address, "TENSORSTORE_GCS_HTTP_URL": address}


def now_and_then(
    told: list[str], faults: tuple[str, ...] = FAULTS, every: int = 7
) -> Iterator[str]:
    """Faults in turn, one of so many requests; those that happened are in `told`."""
    for number in itertools.count(1):
        fault = "" if number % every else faults[number // every % len(faults)]
        told.append(fault)
        yield fault
