"""Small files by their path: in a folder, or in a bucket (`gs://`, `s3://`).

TensorStore reads and writes them, as it does the arrays beside them, so that training
needs no other library to reach a bucket. A file appears whole or not at all.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from tasks.errors import StoreError

_AT_ONCE = 256  # files that are asked for before the first answer is waited for
_PASSWORD = re.compile(r"//[^/@\s]+@")  # of "https://name:word@host"
_BUCKETS = {"gs://": "gcs", "s3://": "s3"}
# Of a bucket that does not answer: seconds until something is said, again after twice
# as many, and until it is given up. TensorStore tries on for a quarter of an hour.
NOTICE_SECONDS, PATIENCE_SECONDS = 5.0, 120.0
_REFUSED = "http_response_code='40"  # 401, 403: also of an object that is not there
_KEYS = (
    "look at the credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
    "~/.aws/credentials for s3://, GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth "
    "application-default login` for gs://"
)


def join(folder: str | Path, *names: str) -> str:
    """Returns the path of something in a folder."""
    return "/".join([str(folder).rstrip("/"), *names])


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's file system."""
    return "://" not in str(path)


def kvstore(path: str | Path) -> Mapping[str, str]:
    """Returns TensorStore's description of a folder.

    A server of the S3 kind that is not Amazon's is the one that AWS_ENDPOINT_URL_S3 or
    AWS_ENDPOINT_URL in the environment names.

    Raises:
        StoreError: the path begins with something else than `gs://` or `s3://`.
    """
    path = str(path)
    if is_local(path):
        return {"driver": "file", "path": f"{Path(path).resolve()}/"}  # takes no ".."
    for prefix, driver in _BUCKETS.items():
        if path.startswith(prefix):
            bucket, _, inside = path.removeprefix(prefix).partition("/")
            inside = f"{inside.strip('/')}/" if inside.strip("/") else ""
            place = {"driver": driver, "bucket": bucket, "path": inside}
            return {**place, **(_s3_endpoint() if driver == "s3" else {})}
    raise StoreError(
        f"{path!r} is neither a local path nor one that begins with "
        f"{' or '.join(_BUCKETS)}"
    )


def _s3_endpoint() -> dict[str, str]:
    """Another server than Amazon's, by the variables that its own tools know."""
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if endpoint := os.environ.get(variable):
            region = os.environ.get("AWS_REGION") or os.environ.get(
                "AWS_DEFAULT_REGION", "us-east-1"
            )
            return {"endpoint": endpoint.rstrip("/"), "aws_region": region}
    return {}


def answer(future: Any, path: str | Path, patience_seconds: float | None = None) -> Any:
    """Waits for TensorStore: of a bucket neither in silence nor for ever.

    Args:
        future: what was asked.
        path: what it was asked of, for messages.
        patience_seconds: time until it is given up; None takes PATIENCE_SECONDS.
    Raises:
        TimeoutError: there was no answer.
        Exception: what TensorStore raises, of several kinds.
    """
    if is_local(path):
        return future.result()
    began, notice = time.monotonic(), NOTICE_SECONDS
    patience = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    while True:
        waited = time.monotonic() - began
        try:
            return future.result(timeout=max(0.0, min(notice, patience) - waited))
        except TimeoutError:
            if future.done():  # just now, or that is the answer
                return future.result()
        if notice >= patience:
            future.cancel()
            raise TimeoutError(
                f"no answer in {patience:g} s: look at the network, at the server, and "
                "at AWS_ENDPOINT_URL if one is set"
            )
        print(
            f"waiting for {_PASSWORD.sub('//…@', str(path))}: no answer for "
            f"{notice:g} s; trying on",
            file=sys.stderr,
            flush=True,
        )
        notice *= 2


def read(path: str | Path) -> bytes | None:
    """Returns what a file holds, or None if there is none.

    Raises:
        StoreError: it cannot be read.
    """
    folder, name = _parted(path)
    try:
        found = answer(_open(folder).read(name), path)
    except Exception as error:  # TensorStore raises several kinds
        raise StoreError(f"{path} cannot be read: {reason(error)}") from None
    return bytes(found.value) if found.state == "value" else None


def read_many(paths: Sequence[str]) -> Iterator[bytes | None]:
    """Yields what files hold, or None, in order; many are read at the same time.

    Raises:
        StoreError: one cannot be read.
    """
    folders: dict[str, ts.KvStore] = {}
    for first in range(0, len(paths), _AT_ONCE):
        some = paths[first : first + _AT_ONCE]
        waiting = []
        for path in some:
            folder, name = _parted(path)
            if folder not in folders:
                folders[folder] = _open(folder)
            waiting.append(folders[folder].read(name))
        for path, future in zip(some, waiting, strict=True):
            try:
                found = answer(future, path)
            except Exception as error:  # TensorStore raises several kinds
                raise StoreError(f"{path} cannot be read: {reason(error)}") from None
            yield bytes(found.value) if found.state == "value" else None


def write(path: str | Path, content: bytes) -> None:
    """Writes a file; folders on the way are made.

    Raises:
        StoreError: it cannot be written.
    """
    folder, name = _parted(path)
    try:
        answer(_open(folder).write(name, content), path)
    except Exception as error:  # TensorStore raises several kinds
        raise StoreError(
            f"{path} cannot be written: {reason(error)}. Free some space, or choose "
            "a place that this user may write to"
        ) from None


def names(folder: str | Path) -> list[str]:
    """Returns the paths, relative to a folder, of all files below it, sorted.

    Raises:
        StoreError: the folder cannot be read.
    """
    if is_local(folder) and not Path(folder).is_dir():
        return []
    try:
        found = answer(_open(str(folder)).list(), folder)
    except Exception as error:  # TensorStore raises several kinds
        raise StoreError(f"{folder} cannot be listed: {reason(error)}") from None
    return sorted(name.decode() for name in found if not name.endswith(b".__lock"))


def delete(path: str | Path) -> None:
    """Deletes a file, if it is there.

    Raises:
        StoreError: it cannot be deleted.
    """
    folder, name = _parted(path)
    try:
        only = ts.KvStore.KeyRange(name, f"{name}\0")
        answer(_open(folder).delete_range(only), path)
    except Exception as error:  # TensorStore raises several kinds
        raise StoreError(f"{path} cannot be deleted: {reason(error)}") from None


def delete_folder(folder: str | Path) -> None:
    """Deletes all in a folder, and itself unless it is a link or a disk.

    Raises:
        StoreError: something in it cannot be deleted.
    """
    try:
        if not is_local(folder):
            answer(_open(str(folder)).delete_range(ts.KvStore.KeyRange()), folder)
        elif Path(folder).exists():
            for entry in Path(folder).iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            with contextlib.suppress(OSError):  # where a disk is mounted, it stays
                Path(folder).rmdir()
    except Exception as error:  # TensorStore raises several kinds
        raise StoreError(f"{folder} cannot be deleted: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The cause in TensorStore's words, cut before its dump of the specification."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    refused = any(f"{_REFUSED}{digit}'" in line for digit in "13")
    for mark in ("tensorstore_spec", "source locations", "os_error_code", "x-amzn-"):
        line = line.split(f" [{mark}")[0]
    line = _PASSWORD.sub("//…@", line)[:200]
    return f"the server refuses it ({line}): {_KEYS}" if refused else line


def _parted(path: str | Path) -> tuple[str, str]:
    folder, slash, name = str(path).rpartition("/")
    return folder or slash or ".", name


def _open(folder: str) -> ts.KvStore:
    return ts.KvStore.open(dict(kvstore(folder))).result()
