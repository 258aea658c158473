"""Reads documents from files of plain text, without TensorFlow.

The files that a pattern names, sorted, are cut into shards; each shard is read on its
own, as a stream, and all shards in their order give exactly the documents of the files
in their order. Big files are cut where documents end. Bytes pass through as they are,
but for a byte-order mark of UTF-8 at the beginning of a file, which is no text; whether
they are UTF-8 is looked at where they become tokens. `tasks.records` reads files that
hold records with fields.
"""

import dataclasses
import glob
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from tasks.errors import StoreError
from tasks.streams import (
    COMPRESSIONS,
    is_remote,
    opened,
    remotely,
    size_of,
    text_begins,
)

RANGE_BYTES = 64 << 20
_FILES_PER_SHARD = 256  # of files that are one document each

Pattern = str | os.PathLike | Sequence[str | os.PathLike]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        features: text of each: "targets", and "inputs" if something is given; of
            "images" the pixels.
        name: says where it comes from: a file, `file@byte` or `file:record`.
        language: that it is in; "" if the source does not say.
        label: that it bears; "" if it has none.
    """

    features: Mapping[str, bytes]
    name: str
    language: str = ""
    label: str = ""


def document_of(given: Any, features: Sequence[str], where: str) -> Document:
    """Returns what a source yielded as a document whose texts are bytes.

    Args:
        given: a Document, or a name and a text.
        features: which texts it has to have.
        where: it comes from, for messages.
    Raises:
        TypeError: it is something else, or a text of it is none.
    """
    if not isinstance(given, Document):
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise TypeError(
                f"{where} is {_said(given)}, and must be a name and a text, or a "
                "tasks.sources.Document"
            )
        name, text = given
        given = Document({"targets": text}, str(name) if type(name) is int else name)
    texts = given.features
    if all(type(texts.get(feature)) is bytes for feature in features) and (
        type(given.name) is type(given.language) is type(given.label) is str
    ):
        return given
    for what in ("name", "language", "label"):
        if not isinstance(getattr(given, what), str):
            raise TypeError(
                f"{where} has as its {what} {_said(getattr(given, what))}, and must be "
                "a str"
            )
    return dataclasses.replace(
        given,
        features={
            feature: _bytes_of(texts, feature, f"{where}, {given.name!r},")
            for feature in features
        },
    )


def encoded(text: str) -> bytes:
    """Returns the bytes of a text; half a character becomes faulty UTF-8."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b"".join(
            char.encode(
                errors="surrogateescape"
                if "\udc80" <= char <= "\udcff"
                else "surrogatepass"
            )
            for char in text
        )


def _bytes_of(texts: Mapping[str, Any], feature: str, where: str) -> bytes:
    if feature not in texts:
        there = ", ".join(map(repr, texts)) or "none at all"
        raise TypeError(f"{where} has no text {feature!r} among {there}")
    text = texts[feature]
    if isinstance(text, str):
        return encoded(text)
    if not isinstance(text, bytes):
        raise TypeError(
            f"{where} has as its {feature!r} {_said(text)}, which is no text: it must "
            "be str or bytes"
        )
    return text


def _said(value: Any) -> str:
    """A value and its type, in a few words."""
    said = " ".join(repr(value)[:200].split())
    if value is None:
        return said
    return f"{said[:60]}{'…' * (len(said) > 60)} ({type(value).__name__})"


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
    if is_remote(given):
        found = sorted(remotely(given, lambda gfile: gfile.glob(given)))
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
        size = 0 if is_remote(path) else size_of(path)
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
        if not path.endswith(tuple(COMPRESSIONS)):
            cuts = [*range(0, max(1, size_of(path)), range_bytes)]
        for start, stop in zip(cuts, [*cuts[1:], None], strict=True):
            shards.append(Shard((path,), start, stop))
    return tuple(shards)


def read_files(shard: Shard, language: str = "") -> Iterator[Document]:
    """Yields each file as one document."""
    for path in shard.paths:
        with opened(path) as file:
            text_begins(file, path)
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
            begin = _next_line(file, path, shard.start)
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


def _next_line(file: BinaryIO, path: str, position: int) -> int:
    """Goes to the first line that begins at `position` or later."""
    begin = text_begins(file, path)
    if position <= begin:
        return begin
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
    begin = _next_line(file, path, shard.start)
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
