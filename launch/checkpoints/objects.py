"""Objects in a bucket: read and written in pieces, and compared with their digests."""

import collections
import contextlib
import functools
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorstore as ts

from launch.checkpoints.places import CheckpointError, DamagedError
from launch.checkpoints.writing import writing
from tasks import files

PIECE_BYTES = 64 * 2**20
_AT_ONCE = 8  # pieces in memory
_ATTEMPTS = 4  # to read what has another digest
_PATIENCE_SECONDS = 600.0

Piece = tuple[int, str]  # bytes, SHA-256
Listing = dict[str, list[Piece]]  # by the path of a file below its checkpoint


class Objects:
    """The objects below a folder of a bucket.

    Args:
        place: `gs://` or `s3://`, and a folder.
    """

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/")

    @functools.cached_property
    def _store(self) -> Any:
        with self._explained("open"):
            return ts.KvStore.open(dict(files.kvstore(self.place))).result()

    def read(self, key: str) -> tuple[bytes | None, bytes]:
        """Returns what an object holds, None if it is not there, and its generation.

        Raises:
            CheckpointError: it cannot be read.
        """
        return self._answer("read", key, self._store.read(key))

    def write(self, key: str, content: bytes, **condition: Any) -> bytes:
        """Writes an object.

        Args:
            key: its name.
            content: what it holds then.
            condition: `if_equal`, the generation that it has now.
        Returns:
            Its generation; b"" if the condition was not met.
        Raises:
            CheckpointError: it cannot be written.
        """
        with self._explained("write", key):
            future = self._store.write(key, content, **condition)
            return self._waited(key, future).generation

    def checked(self, key: str, digest: str, path: Path, future: Any = None) -> bytes:
        """Returns what an object holds, if it is what was written.

        Args:
            key: its name.
            digest: SHA-256 of what was written.
            path: the checkpoint that it is of.
            future: a read that has begun.
        Raises:
            DamagedError: it is missing or other, also when it is read again.
        """
        content = None
        for attempt in range(_ATTEMPTS):
            time.sleep(0.1 * attempt)
            reading = future if future and not attempt else self._store.read(key)
            content, _ = self._answer("read", key, reading)
            if content is not None and digest_of(content) == digest:
                return content
        what = "missing" if content is None else "not what was written"
        raise DamagedError(path, f"{self.place}/{key} is {what}")

    def contents(
        self, key: str, pieces: Sequence[Piece], path: Path
    ) -> Iterator[bytes]:
        """Yields the pieces of a file, several on their way at a time.

        Args:
            key: name of the file.
            pieces: what was written of it.
            path: the checkpoint that it is of.
        Raises:
            DamagedError: as `checked`.
        """
        keys = [f"{key}.{number}" for number in range(len(pieces))]
        ahead = collections.deque(self._store.read(one) for one in keys[:_AT_ONCE])
        for number, (one, (_, digest)) in enumerate(zip(keys, pieces, strict=True)):
            future = ahead.popleft()
            if number + _AT_ONCE < len(keys):
                ahead.append(self._store.read(keys[number + _AT_ONCE]))
            yield self.checked(one, digest, path, future)

    def upload(self, source: Path, folder: str, names: Sequence[str]) -> Listing:
        """Writes files in pieces, and makes sure that each is there at full length.

        Digests are compared when they are read.

        Args:
            source: folder of the files.
            folder: name of the folder that the objects go to.
            names: paths of the files, below `source`.
        Returns:
            Their pieces.
        Raises:
            CheckpointError: one cannot be read or written.
        """
        found: Listing = {name: [] for name in names}
        waiting = collections.deque[tuple[str, int, Any]]()
        written: list[tuple[str, int]] = []

        def settle() -> None:
            key, size, future = waiting.popleft()
            with self._explained("write", key):
                self._waited(key, future)
            written.append((key, size))

        for name in names:
            for number, piece in enumerate(_pieces(source / name)):
                key = f"{folder}/{name}.{number}"
                found[name].append((len(piece), digest_of(piece)))
                if len(waiting) == _AT_ONCE:
                    settle()
                waiting.append((key, len(piece), self._store.write(key, piece)))
        while waiting:
            settle()
        # The last byte of each is there if all before it is.
        asked = [
            self._store.read(key, byte_range=slice(size - 1, size))
            for key, size in written
        ]
        for (key, _), future in zip(written, asked, strict=True):
            if self._answer("read", key, future)[0] is None:
                raise CheckpointError(f"{self.place}/{key} is gone after its write")
        return found

    def folders(self) -> set[str]:
        """Returns the first part of every name."""
        with self._explained("list"):
            names = self._waited("", self._store.list())
        return {name.decode().partition("/")[0] for name in names}

    def delete(self, folder: str) -> None:
        """Deletes the objects of a folder; that it could not is said, and no error."""
        every = ts.KvStore.KeyRange(f"{folder}/", f"{folder}0")  # 0 comes after /
        try:
            with self._explained("delete", folder):
                self._waited(folder, self._store.delete_range(every))
        except CheckpointError as error:
            warn(str(error))

    def _answer(self, verb: str, key: str, future: Any) -> tuple[bytes | None, bytes]:
        with self._explained(verb, key):
            found = self._waited(key, future)
        there = found.state == "value"
        return bytes(found.value) if there else None, found.stamp.generation

    def _waited(self, key: str, future: Any) -> Any:
        return files.answer(future, f"{self.place}/{key}", _PATIENCE_SECONDS)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str = "") -> Iterator[None]:
        """Says in one line what keeps the bucket from doing something."""
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:  # as TensorStore raises
            where = f"{self.place}/{key}" if key else self.place
            raise CheckpointError(
                f"cannot {verb} {where}: {files.reason(error)}"
            ) from error


def digest_of(content: bytes) -> str:
    """Returns the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def other_files(listing: Listing, path: Path) -> list[str]:
    """Lists the files that a folder does not have as a listing has them."""
    return [name for name, pieces in listing.items() if not _is(path / name, pieces)]


def warn(what: str) -> None:
    """Says what went wrong, and ends nothing."""
    print(f"warning: {what}", file=sys.stderr, flush=True)


def _pieces(file: Path) -> Iterator[bytes]:
    with writing(file), file.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            yield piece


def _is(file: Path, pieces: Sequence[Piece]) -> bool:
    """Whether a file holds what its pieces did."""
    if not file.is_file() or file.stat().st_size != sum(size for size, _ in pieces):
        return False
    with file.open("rb") as opened:
        return all(digest_of(opened.read(size)) == digest for size, digest in pieces)
