"""In which files of a checkpoint which array is, by the nodes of its database."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes of a file that hold a part of something.

    Attributes:
        key: what they hold, such as "params/embedding/0.0"; "" is a node that says
            where other things are.
        file: path below the folder of the checkpoint.
        end: length that the file has at least.
    """

    key: str
    file: str
    end: int

    @property
    def array(self) -> str:
        """The array that it is of; "" if of all."""
        return self.key.rpartition("/")[0]


_HEAD = Piece("", "state/manifest.ocdbt", 1)


def pieces(path: Path) -> Iterator[Piece]:
    """Yields where everything is, in the order of names, as far as nodes can be read.

    Raises:
        ValueError: a node cannot be read; what TensorStore says of it.
    """
    base = ts.KvStore.open({"driver": "file", "path": f"{path / 'state'}/"}).result()
    manifest = ts.ocdbt.dump(base).result()
    yield _HEAD
    if versions := manifest["versions"]:
        root = versions[-1]["root"].get("location")
        if root is not None:
            yield from _below(base, root, "")


def _below(base: Any, location: str, prefix: str) -> Iterator[Piece]:
    yield _piece("", location)
    node = ts.ocdbt.dump(base, location).result()
    for entry in node["entries"]:
        key = prefix + _text(entry.get("key", b""))
        if node["height"]:
            # Of the keys below a node, those in it lack what they have in common.
            common = entry.get("subtree_common_prefix_length", 0)
            yield from _below(base, entry["location"], key[: len(prefix) + common])
        elif "indirect_value" in entry:
            yield _piece(key, entry["indirect_value"])


def fault_in_files(path: Path, array: str) -> str | None:
    """Says which file of an array is missing or too short; None if none is."""
    if fault := fault_of(path, _HEAD):
        return fault
    try:
        for piece in pieces(path):
            if piece.array in ("", array) and (fault := fault_of(path, piece)):
                return fault
    except ValueError:
        return None  # the error that brought us here names the node
    return None


def files_of(path: Path, array: str) -> list[str]:
    """Lists the files that hold an array's numbers, as far as nodes can be read."""
    found: set[str] = set()
    with contextlib.suppress(ValueError):
        found.update(piece.file for piece in pieces(path) if piece.array == array)
    return sorted(found)


def fault_of(path: Path, piece: Piece) -> str | None:
    """Says what is wrong with a file, without reading it."""
    file = path / piece.file
    if not file.is_file():
        return f"{piece.file} is missing"
    size = file.stat().st_size
    if size < piece.end:
        return f"{piece.file} has {size:,} bytes of at least {piece.end:,}"
    return None


def _piece(key: str, location: str) -> Piece:
    """From such as "value:ocdbt.process_0/:d/85729c18:0:1034"."""
    head, offset, length = location.rsplit(":", 2)
    _, base, name = head.split(":", 2)
    return Piece(key, f"state/{base}{name}", int(offset) + int(length))


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
