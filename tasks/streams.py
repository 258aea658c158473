"""Files of sources as streams of bytes: here or in a bucket, compressed or not."""

import contextlib
import functools
import io
import os
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from tasks.errors import StoreError
from tasks.quiet import quiet_stderr

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES = 1 << 20
_GZIP = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
# The marks of UTF-32 begin as one of UTF-16 does, so they come first.
_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32 (little-endian)",
    b"\x00\x00\xfe\xff": "UTF-32 (big-endian)",
    b"\xff\xfe": "UTF-16 (little-endian)",
    b"\xfe\xff": "UTF-16 (big-endian)",
}


@contextlib.contextmanager
def opened(path: str, *, decompress: bool = True) -> Iterator[BinaryIO]:
    """Opens a file to be read as a stream; `.gz` and `.zst` give what they hold.

    Raises:
        StoreError: it cannot be read, or its compressed content is damaged, cut short
            or followed by something else.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: io.RawIOBase = (
                _RemoteFile(path) if is_remote(path) else io.FileIO(path)
            )
            raw: BinaryIO = stack.enter_context(_buffered(file))
            kind = COMPRESSIONS.get(os.path.splitext(path)[1]) if decompress else None
            if kind == "gzip":
                raw = stack.enter_context(_buffered(_GzipFile(path, raw)))
            elif kind == "zstd":
                raw = stack.enter_context(_buffered(_ZstdFile(path, raw)))
            yield raw
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def text_begins(file: BinaryIO, path: str) -> int:
    """Returns the byte at which the text of a file begins: behind a mark of UTF-8.

    The file is at its beginning before, and at that byte after.

    Raises:
        StoreError: the file says that it is of another encoding.
    """
    first = file.peek(4)[:4]  # type: ignore[attr-defined]
    for mark, encoding in _OTHER_MARKS.items():
        if first.startswith(mark):
            raise StoreError(
                f"{path} is {encoding}, as the byte-order mark at its beginning says, "
                "and text has to be UTF-8: convert it, as `iconv -f UTF-16 -t UTF-8` "
                "does"
            )
    return len(file.read(3)) if first.startswith(_UTF8_MARK) else 0


def is_remote(path: str) -> bool:
    """Whether a path is one of a bucket."""
    return "://" in path


def size_of(path: str) -> int:
    """Returns how many bytes a file has."""
    if is_remote(path):
        return remotely(path, lambda gfile: gfile.stat(path).length)
    return os.path.getsize(path)


def remotely(path: str, ask: Any) -> Any:
    """Returns what TensorFlow's file systems answer.

    Raises:
        StoreError: they cannot.
    """
    tf = tensorflow()
    try:
        return ask(tf.io.gfile)
    except tf.errors.OpError as error:
        reason = str(error).partition("\n")[0][:200]
        raise StoreError(f"{path} cannot be read: {reason}") from None


def tensorflow() -> Any:
    """Returns TensorFlow, imported without a word."""
    with contextlib.nullcontext() if "tensorflow" in sys.modules else quiet_stderr():
        import tensorflow as tf
    return tf


def _buffered(file: io.RawIOBase) -> BinaryIO:
    return io.BufferedReader(file, _BUFFER_BYTES)


@functools.cache  # a file is read several times, and one note is enough
def note(message: str) -> None:
    """Tells the user of something odd that is no fault, once in a process."""
    print(f"note: {message}", file=sys.stderr, flush=True)


class _GzipFile(io.RawIOBase):
    """What the members of a gzip file hold, one after the other.

    Zeros may follow the last one, as where a tape or a disk fills up a block: gzip
    passes over them too.
    """

    def __init__(self, path: str, raw: BinaryIO):
        super().__init__()
        self._path, self._raw = path, raw
        self._member: Any = None
        self._waiting = b""
        self._consumed = 0  # bytes of the file before those that wait

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        parts, room = [], len(buffer)
        while room and len(buffer) - room < 4:  # `text_begins` looks at so many
            part = self._part(room)
            if not part:
                break
            parts.append(part)
            room -= len(part)
        found = b"".join(parts)
        buffer[: len(found)] = found
        return len(found)

    def _part(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end."""
        while self._member is not None or self._next_member():
            self._waiting = self._waiting or self._raw.read(_BUFFER_BYTES)
            if not self._waiting:
                raise self._fault(
                    f"its gzip data are cut short at byte {self._consumed:,}, where "
                    "the file ends: copy it again from where it is whole"
                )
            try:
                part = self._member.decompress(self._waiting, most)
            except zlib.error as error:
                raise self._fault(
                    f"its gzip data are damaged behind byte {self._consumed:,} "
                    f"({error}): copy it again from where it is whole"
                ) from None
            if self._member.eof:
                self._keep(self._member.unused_data)
                self._member = None
            else:
                self._keep(self._member.unconsumed_tail)
            if part:
                return part
        return b""

    def _next_member(self) -> bool:
        """Goes to where another member begins, if there is one."""
        at_start, zeros = self._consumed == 0, 0
        while True:
            self._waiting = self._waiting or self._raw.read(_BUFFER_BYTES)
            rest = self._waiting if at_start else self._waiting.lstrip(b"\0")
            if rest or not self._waiting:
                break
            zeros += len(self._waiting)
            self._keep(b"")
        zeros += len(self._waiting) - len(rest)
        self._keep(rest)
        if len(rest) == 1:  # half of what a member begins with
            self._waiting = rest + self._raw.read(_BUFFER_BYTES)
        if self._waiting.startswith(_GZIP):
            self._member = zlib.decompressobj(wbits=31)
            return True
        if self._waiting:
            begins = f"which begins with {bytes(self._waiting[:8])!r}"
            raise self._fault(
                f"it is no gzip data, {begins}: take the ending .gz off if it is not "
                "compressed"
                if at_start
                else f"what follows its gzip data from byte {self._consumed:,} on, "
                f"{begins}, is none: cut the file off there if that is not part of it"
            )
        if zeros:
            note(f"{self._path}: {zeros:,} zeros behind its gzip data are passed over")
        return False

    def _keep(self, rest: bytes) -> None:
        """Only the rest of what waited still waits."""
        self._consumed += len(self._waiting) - len(rest)
        self._waiting = rest

    def _fault(self, what: str) -> StoreError:
        return StoreError(f"{self._path} cannot be read: {what}")


class _ZstdFile(io.RawIOBase):
    """What a Zstandard file holds; says where reading it failed."""

    def __init__(self, path: str, raw: BinaryIO):
        super().__init__()
        import pyarrow as pa  # also notices what is cut short

        self._path, self._raw = path, raw
        self._stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part = self._stream.read(len(buffer))
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be read: {error}, up to byte "
                f"{self._raw.tell():,} of the file: copy it again from where it is "
                "whole"
            ) from None
        buffer[: len(part)] = part
        return len(part)


class _RemoteFile(io.RawIOBase):
    """A file of a bucket, for `io.BufferedReader`."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._file = remotely(path, lambda gfile: gfile.GFile(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = remotely(self._path, lambda _: self._file.read(len(buffer)))
        buffer[: len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += size_of(self._path)
        elif whence == io.SEEK_CUR:
            offset += self.tell()
        self._file.seek(offset)
        return offset

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
