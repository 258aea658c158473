"""The arrays of a checkpoint, read leaf by leaf, on any machine.

Orbax writes them as zarr in one OCDBT database, `state`, whichever processes and mesh
they were of. Here TensorStore reads them, and every read is waited for: nothing goes on
in a thread after an error. An error says what is proven: only what is missing, too
short, or cannot be decoded is damage.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from launch.checkpoints import located
from launch.checkpoints.places import CheckpointError, DamagedError, short

Index = tuple[slice, ...]

BLOCK_ELEMENTS = 2**22
# Codes with which TensorStore says that what is there is not what was written.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT")
_CACHE_BYTES = 2**24  # for the nodes of the database


class Arrays:
    """The arrays of one checkpoint.

    Args:
        path: the folder of its step.
        manifest: what it says about itself.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.saved: dict[str, dict[str, Any]] = dict(manifest["arrays"])
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})

    def opening(self, name: str) -> ts.Future:
        """Begins to open an array; `opened` waits for it."""
        return ts.open(
            spec_of(self.path / "state", name),
            open=True,
            read=True,
            context=self._context,
        )

    def opened(self, name: str, opening: ts.Future | None = None) -> ts.TensorStore:
        """Returns an open array, which has the shape and type that it should.

        Raises:
            DamagedError: it is not there, or is another.
        """
        found = self.result(name, opening or self.opening(name))
        said = self.saved[name]
        if list(found.shape) != said["shape"] or found.dtype.name != said["dtype"]:
            raise DamagedError(
                self.path,
                f"{name} is {found.dtype.name}{list(found.shape)} and was saved as "
                f"{said['dtype']}{said['shape']}",
            )
        return found

    def result(self, name: str, future: ts.Future) -> Any:
        """Waits for what was begun with an array.

        Raises:
            DamagedError: what is read is proven to be damaged.
            CheckpointError: it cannot be read, for another reason.
        """
        try:
            return future.result()
        except ValueError as error:  # whatever the code
            raise _explained(self.path, name, error) from error

    def blocks(self, name: str) -> Iterator[tuple[Index, np.ndarray]]:
        """Yields an array piece by piece, a few million elements at a time.

        A piece is whole chunks: as much memory is needed as two of them, at least.
        """
        array = self.opened(name)
        chunk = array.spec().to_json()["metadata"]["chunks"]
        places = cut(array.shape, chunk)
        ahead: tuple[Index, ts.Future] | None = None
        for place in places:
            begun = place, array[place].read()
            if ahead is not None:
                yield ahead[0], self.result(name, ahead[1])
            ahead = begun
        if ahead is not None:
            yield ahead[0], self.result(name, ahead[1])


def spec_of(state: Path, name: str) -> dict[str, Any]:
    """Returns how TensorStore names an array of a `state` folder."""
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {"driver": "file", "path": f"{state}/"},
            "path": f"{name}/",
        },
    }


def cut(shape: tuple[int, ...], chunk: Sequence[int]) -> Iterator[Index]:
    """Cuts an array along its chunks, into pieces of about BLOCK_ELEMENTS.

    Args:
        shape: shape of the array.
        chunk: that of a chunk.
    """
    size = [max(1, min(n, c)) for n, c in zip(shape, chunk, strict=True)]
    for dim in reversed(range(len(shape))):
        others = int(np.prod(size)) // size[dim]
        whole = max(1, BLOCK_ELEMENTS // max(1, others) // size[dim]) * size[dim]
        size[dim] = min(shape[dim], max(size[dim], whole)) or 1
    starts = [range(0, n, s) for n, s in zip(shape, size, strict=True)]
    for start in itertools.product(*starts):
        yield tuple(
            slice(a, min(a + s, n)) for a, s, n in zip(start, size, shape, strict=True)
        )


def _explained(path: Path, name: str, error: ValueError) -> CheckpointError:
    """Says what an error of TensorStore proves, naming the file where it can."""
    text = str(error)
    code = re.search(r"os_error_code='(\d+)'", text)
    damage = text.startswith(_DAMAGE) or (
        text.startswith("FAILED_PRECONDITION") and code is None
    )
    if not damage:
        why = os.strerror(int(code[1])) if code else short(error)
        return CheckpointError(f"cannot read {name} of {path}: {why}")
    file = located.fault_in_files(path, name) or _named_file(path, text)
    if file is not None:
        return DamagedError(path, f"{file}, so the array {name} cannot be read")
    files = located.files_of(path, name)
    of_files = f", of which {' and '.join(files)} hold the numbers" if files else ""
    return DamagedError(path, f"{name} cannot be decoded: {_reason(text)}{of_files}")


def _named_file(path: Path, text: str) -> str | None:
    """The innermost file that an error names, and what is wrong with it."""
    files = re.findall(r'local file "([^"]+[^/])"', text)
    if not files:
        return None
    file = os.path.relpath(files[-1], path)
    return f"{file} is not what was saved ({_reason(text)})"


def _reason(text: str) -> str:
    """The last words of an error, without its numbers and whereabouts."""
    head = text.partition(" [tensorstore_spec")[0].splitlines()[0]
    head = head.rpartition('": ')[2].partition(": expected=")[0].partition(";")[0]
    return head.removeprefix("Error ")[:120]
