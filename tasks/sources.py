"""Reads documents from files of plain text, without TensorFlow.

The files that a pattern names, sorted, are cut into shards; each shard is read on its
own, as a stream, and all shards in their order give exactly the documents of the files
in their order. Big files are cut where documents end. Bytes pass through as they are:
whether they are UTF-8 is looked at where they become tokens. `tasks.records` reads
files that hold records with fields.
"""

import contextlib
import dataclasses
import glob
import io
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from tasks.errors import StoreError
from tasks.quiet import quiet_stderr

RANGE_BYTES = 64 << 20
_FILES_PER_SHARD = 256  # of files that are one document each
_BUFFER_BYTES = 1 << 20
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

Pattern = str | os.PathLike | Sequence[str | os.PathLike]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        features: text of each: "targets", and "inputs" if something is given.
        name: says where it comes from: a file, `file@byte` or `file:record`.
        language: that it is in; "" if the source does not say.
        label: that it bears; "" if it has none.
    """

    features: Mapping[str, bytes]
    name: str
    language: str = ""
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one worker reads in one go: some files, or a range of bytes of one.

    Attributes:
        paths: locations of the files, in order.
        start: a document belongs to the shard if it begins at this byte or later.
        stop: and before this one; None is the end of the file.
    """

    paths: tuple[str, ...]
    start: int = 0
    stop: int | None = None

    def __str__(self) -> str:
        if len(self.paths) > 1:
            return f"{self.paths[0]} .. {self.paths[-1]}"
        if self.start or self.stop is not None:
            return f"{self.paths[0]}[{self.start}:{self.stop or ''}]"
        return self.paths[0]


def paths(pattern: Pattern) -> tuple[str, ...]:
    """Returns the files that a pattern names, sorted.

    Args:
        pattern: a path, local or `gs://`, that may hold `*`, `?`, `[...]`, and locally
            `**` for folders of any depth; or several, in the order given.
    Raises:
        StoreError: no file has such a name.
    """
    if not isinstance(pattern, str | os.PathLike):
        return tuple(dict.fromkeys(path for each in pattern for path in paths(each)))
    given = os.fspath(pattern)
    if _is_remote(given):
        found = sorted(_remotely(given, lambda gfile: gfile.glob(given)))
    else:
        given = os.path.expanduser(given)
        if os.path.isfile(given):
            return (given,)
        names = glob.glob(given, recursive=True)
        found = sorted(name for name in names if os.path.isfile(name))
    if not found:
        hint = f": it is a folder, write {given}/*" * os.path.isdir(given)
        raise StoreError(f"no file matches {given!r}{hint}")
    return tuple(found)


def groups_of_files(
    pattern: Pattern, most_files: int = _FILES_PER_SHARD, most_bytes: int = RANGE_BYTES
) -> tuple[Shard, ...]:
    """Returns shards of whole files, so many or of so many bytes at the most.

    Files in a bucket are counted alone: asking for the size of each takes long.
    """
    groups: list[list[str]] = []
    room = 0
    for path in paths(pattern):
        size = 0 if _is_remote(path) else _size(path)
        if not groups or size > room or len(groups[-1]) == most_files:
            groups.append([])
            room = most_bytes
        groups[-1].append(path)
        room -= size
    return tuple(Shard(tuple(group)) for group in groups)


def byte_ranges(pattern: Pattern, range_bytes: int = RANGE_BYTES) -> tuple[Shard, ...]:
    """Returns shards of one file, or of part of one that is larger.

    A compressed file is read from its beginning, so it stays whole.
    """
    shards = []
    for path in paths(pattern):
        cuts = [0]
        if not path.endswith(tuple(_COMPRESSIONS)):
            cuts = [*range(0, max(1, _size(path)), range_bytes)]
        for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
            shards.append(Shard((path,), start, stop))
    return tuple(shards)


def read_files(shard: Shard, language: str = "") -> Iterator[Document]:
    """Yields each file as one document."""
    for path in shard.paths:
        with opened(path) as file:
            yield Document({"targets": file.read()}, path, language)


def read_lines(shard: Shard, language: str = "") -> Iterator[Document]:
    """Yields each line as one document, without its end (LF or CR LF)."""
    for path, begin, line in lines(shard):
        yield Document({"targets": line}, f"{path}@{begin}", language)


def read_blocks(shard: Shard, language: str = "") -> Iterator[Document]:
    """Yields what stands between lines that are empty or hold white space alone.

    Line ends within a document stay as they are; the last one is left out.
    """
    for path in shard.paths:
        with opened(path) as file:
            yield from _blocks(file, path, shard, language)


def lines(shard: Shard) -> Iterator[tuple[str, int, bytes]]:
    """Yields the path, the first byte and the content of each line of a shard."""
    stop = sys.maxsize if shard.stop is None else shard.stop
    for path in shard.paths:
        with opened(path) as file:
            begin = _next_line(file, shard.start)
            for line in file:
                if begin >= stop:
                    break
                if line.endswith(b"\r\n"):
                    yield path, begin, line[:-2]
                elif line.endswith(b"\n"):
                    yield path, begin, line[:-1]
                else:  # the last of a file
                    yield path, begin, line
                begin += len(line)


@contextlib.contextmanager
def opened(path: str, *, decompress: bool = True) -> Iterator[BinaryIO]:
    """Opens a file to be read as a stream; `.gz` and `.zst` give what they hold.

    Raises:
        StoreError: it cannot be read, or its compressed content is cut short.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = _RemoteFile(path) if _is_remote(path) else io.FileIO(path)
            raw = stack.enter_context(io.BufferedReader(file, _BUFFER_BYTES))
            kind = _COMPRESSIONS.get(os.path.splitext(path)[1])
            if kind and decompress:
                import pyarrow as pa  # also notices what is cut short

                stream = pa.CompressedInputStream(pa.PythonFile(raw, "r"), kind)
                raw = stack.enter_context(io.BufferedReader(stream, _BUFFER_BYTES))
            yield raw
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error


def tensorflow() -> Any:
    """Returns TensorFlow, imported without a word."""
    with contextlib.nullcontext() if "tensorflow" in sys.modules else quiet_stderr():
        import tensorflow as tf
    return tf


def _next_line(file: BinaryIO, position: int) -> int:
    """Goes to the first line that begins at `position` or later."""
    if position == 0:
        return 0
    file.seek(position - 1)
    return position - 1 + len(file.readline())


def _blocks(
    file: BinaryIO, path: str, shard: Shard, language: str
) -> Iterator[Document]:
    """What follows the first blank line that begins in the shard, and so on.

    It ends at the first blank line that begins behind the shard, where the next one
    takes over; none may begin in the shard, and then it holds nothing.
    """
    stop = sys.maxsize if shard.stop is None else shard.stop
    begin = _next_line(file, shard.start)
    ours = shard.start == 0
    kept: list[bytes] = []
    size = 0
    for line in iter(file.readline, b""):
        if line.strip():
            if ours:
                kept.append(line)
            size += len(line)
            continue
        if kept:
            yield _block(kept, path, begin, language)
        begin += size
        if begin >= stop:
            return
        begin += len(line)
        kept, size, ours = [], 0, True
    if kept:
        yield _block(kept, path, begin, language)


def _block(kept: list[bytes], path: str, begin: int, language: str) -> Document:
    text = b"".join(kept).removesuffix(b"\n").removesuffix(b"\r")
    return Document({"targets": text}, f"{path}@{begin}", language)


def _is_remote(path: str) -> bool:
    return "://" in path


def _size(path: str) -> int:
    if _is_remote(path):
        return _remotely(path, lambda gfile: gfile.stat(path).length)
    return os.path.getsize(path)


def _remotely(path: str, ask: Any) -> Any:
    """What TensorFlow's file systems answer."""
    tf = tensorflow()
    try:
        return ask(tf.io.gfile)
    except tf.errors.OpError as error:
        reason = str(error).partition("\n")[0][:200]
        raise StoreError(f"{path} cannot be read: {reason}") from None


class _RemoteFile(io.RawIOBase):
    """A file of a bucket, for `io.BufferedReader`."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._file = _remotely(path, lambda gfile: gfile.GFile(path, "rb"))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = _remotely(self._path, lambda _: self._file.read(len(buffer)))
        buffer[: len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            offset += _size(self._path)
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
