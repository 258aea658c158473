"""Tensors in a folder or file of safetensors, each read when it is asked for.

Nothing stays open or mapped between two reads: a file that is cut short meanwhile is an
error, and not the end of the process.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from launch.exchange.header import (
    LENGTH_BYTES,
    MOST_HEADER_BYTES,
    Form,
    TensorsError,
    parse,
    parsed_json,
    shown,
)

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WHY_NO_PICKLE = (
    "is a pickle, which can run code of its own when it is read, and is not read here: "
    "load it where you trust it, and save it with save_pretrained of transformers or "
    "save_file of safetensors"
)
_POINTER = b"version "  # how a pointer of Git LFS begins, where a length should stand


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: its name.
        form: type and shape.
        file: where it lies.
        begin: its first byte in the file.
        stamp: the file as it was when its header was read.
    """

    name: str
    form: Form
    file: Path
    begin: int
    stamp: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Reads all of it, and nothing else.

        Returns:
            A new array of its type; its bytes are those of the file.
        Raises:
            TensorsError: the file cannot be read, has changed since its header was
                read, or holds truth values other than 0 and 1.
        """
        form = self.form
        content = np.empty(form.num_bytes, np.uint8)
        with _Opened(self.file) as opened:
            if opened.stamp != self.stamp:
                raise TensorsError(f"{self.file} has changed since it was opened")
            opened.read_into(content.data, self.begin)
        if form.dtype == np.bool_ and (content > 1).any():
            raise TensorsError(
                f"{self.file} holds tensor {shown(self.name)} as BOOL, with bytes "
                "other than 0 and 1"
            )
        return content.view(form.dtype).reshape(form.shape)


def open_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a model by name; none of them is read yet.

    Args:
        path: a folder that holds `model.safetensors`, or the index of shards; or one of
            those files, or any other file of safetensors.
    Raises:
        TensorsError: a file is missing, cut short, or not what it should be; the
            message names it.
    """
    with _reading(path):
        if path.is_dir():
            path = _file_of(path)
    if path.suffix in _PICKLES:
        raise TensorsError(f"{path} {_WHY_NO_PICKLE}")
    return _of_shards(path) if path.suffix == ".json" else _of_file(path)


def _file_of(folder: Path) -> Path:
    """Returns the file of a folder that is to be read first."""
    names = sorted(one.name for one in folder.iterdir())
    if WHOLE in names and INDEX in names:
        raise TensorsError(
            f"{folder} holds both {WHOLE} and {INDEX}: name the one that is meant"
        )
    for name in (WHOLE, INDEX):
        if name in names:
            return folder / name
    others = [name for name in names if name.endswith((".safetensors", ".index.json"))]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles and not others:
        return folder / pickles[0]
    but = f", but {_first_of(others)}: name the file that is meant" if others else ""
    raise TensorsError(f"{folder} holds neither {WHOLE} nor {INDEX}{but}")


def _of_shards(index: Path) -> dict[str, Tensor]:
    """Opens every file that an index names, all of them beside it."""
    with _Opened(index) as opened:
        if opened.num_bytes > MOST_HEADER_BYTES:
            raise TensorsError(
                f"{index} has {opened.num_bytes:,} bytes, and an index at most "
                f"{MOST_HEADER_BYTES:,}"
            )
        content = opened.read(opened.num_bytes, 0)
    file_of = _weight_map(index, content)
    count = collections.Counter(file_of.values())
    with _reading(index.parent):
        there = {one.name for one in index.parent.iterdir()}
    missing = sorted(set(count) - there)
    if missing:
        raise TensorsError(
            f"{index} names {len(count):,} files, of which {len(missing):,} are not "
            f"there: {_first_of(missing)}"
        )
    shards = {file: _of_file(index.parent / file) for file in sorted(count)}
    for name, file in file_of.items():
        if name not in shards[file]:
            raise TensorsError(
                f"{index.parent / file} holds no tensor {shown(name)}, which "
                f"{index.name} says is in it"
            )
    for file, tensors in shards.items():
        for name in tensors:
            if name not in file_of:
                raise TensorsError(
                    f"{index.parent / file} holds tensor {shown(name)}, which "
                    f"{index.name} does not name"
                )
    return {name: shards[file][name] for name, file in file_of.items()}


def _weight_map(index: Path, content: bytes) -> dict[str, str]:
    """Reads which tensor is in which file; no name leads out of the folder."""
    said = parsed_json(content, str(index)).get("weight_map")
    if not isinstance(said, dict):
        raise TensorsError(f'{index} has no "weight_map" from tensors to files')
    for name, file in said.items():
        if not (isinstance(file, str) and _is_name_of_shard(file)):
            raise TensorsError(
                f"{index} has tensor {shown(name)} in {shown(file)}, which is not the "
                "name of a .safetensors file beside it"
            )
    return said


def _is_name_of_shard(file: str) -> bool:
    """Whether text is a name without a folder, as any system reads it."""
    return (
        file.isprintable()
        and not set(file) & set("/\\:")
        and file.endswith(".safetensors")
    )


def _of_file(path: Path) -> dict[str, Tensor]:
    """Reads the header of one file."""
    with _Opened(path) as opened:
        start = opened.read(min(LENGTH_BYTES, opened.num_bytes), 0)
        length = int.from_bytes(start, "little")
        begin = LENGTH_BYTES + length
        if start == _POINTER:
            raise TensorsError(
                f"{path} is a pointer of Git LFS: fetch the file itself (git lfs pull)"
            )
        if len(start) < LENGTH_BYTES:
            raise TensorsError(
                f"{path} has {opened.num_bytes:,} bytes: a file of safetensors has "
                f"{LENGTH_BYTES} before its header"
            )
        if length > MOST_HEADER_BYTES:
            raise TensorsError(
                f"{path} says that its header has {length:,} bytes, and the most is "
                f"{MOST_HEADER_BYTES:,}: it is no file of safetensors"
            )
        if begin > opened.num_bytes:
            raise TensorsError(
                f"{path} is cut short: its header ends at byte {begin:,}, and it has "
                f"{opened.num_bytes:,}"
            )
        content = opened.read(length, LENGTH_BYTES)
        places = parse(content, opened.num_bytes - begin, str(path))
        return {
            name: Tensor(name, place.form, path, begin + place.begin, opened.stamp)
            for name, place in places.items()
        }


class _Opened:
    """A file while it is read; what goes wrong is one sentence that names it.

    Attributes:
        num_bytes: size of the file.
        stamp: what tells it from another of its name, or from what it was.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _reading(path):
            if not path.is_file():  # a pipe would be waited for
                what = "is no file" if path.exists() else "is not there"
                raise TensorsError(f"{path} {what}")
            self._file = path.open("rb", buffering=0)
            found = os.fstat(self._file.fileno())
        self.num_bytes = found.st_size
        self.stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, num_bytes: int, begin: int) -> bytes:
        """Reads some bytes, all of them."""
        content = bytearray(num_bytes)
        self.read_into(memoryview(content), begin)
        return bytes(content)

    def read_into(self, content: memoryview, begin: int) -> None:
        """Fills memory with the bytes of the file from `begin` on."""
        done = 0
        with _reading(self._path):
            self._file.seek(begin)
            while done < len(content):  # one call reads at most 2 GiB
                got = self._file.readinto(content[done:])
                if not got:
                    raise TensorsError(
                        f"{self._path} is cut short: it ends at byte {begin + done:,}, "
                        f"and {begin + len(content):,} are needed"
                    )
                done += got


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one sentence what keeps a file from being read."""
    try:
        yield
    except OSError as error:
        raise TensorsError(f"cannot read {path}: {error.strerror}") from error


def _first_of(names: Sequence[str]) -> str:
    """Says the first of many names."""
    words = ", ".join(shown(name) for name in names[:3])
    return f"{words} and {len(names) - 3:,} more" if len(names) > 3 else words
