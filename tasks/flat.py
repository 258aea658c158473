"""Boundaries of a large store: mapped files, so that memory holds what is read of them.

The arrays of a store are compressed, and reading one number decodes thousands. Rows are
read at random, so boundaries also lie beside their array as they are in memory, in a
file that every process of a machine maps; the operating system keeps one copy, as far
as there is room. The file repeats the array, which has the checksums: whoever finds
none makes it, and again whoever finds it damaged or of other data. Where it cannot be
written, as in a bucket, a process keeps its own among temporary files.
"""

import contextlib
import mmap
import os
import tempfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from tasks import files
from tasks.arrays import SHARD, Array

_WHOLE = 1 << 20  # numbers; so few are simply read
_NUMBER = np.dtype("<i8")
_BLOCK_BYTES = 8 << 20
_CHECKSUM_BYTES = 8


def opened(array: Array, of: str) -> np.ndarray:
    """Returns the numbers of an array as int64 that can only be read.

    Args:
        array: of the store.
        of: fingerprint of the data that it belongs to.
    Raises:
        StoreError: the array is damaged.
    """
    if array.size <= _WHOLE:
        return array.read_all().astype(_NUMBER, copy=False)
    if files.is_local(array.path):
        path = f"{array.path}.flat"
        if not _is_whole(path, array.size, of):
            with contextlib.suppress(OSError):  # no room, or not ours: see below
                _write(path, array, of)
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return _mapped(file, array.size, mmap.ACCESS_READ)
    with tempfile.TemporaryFile() as file:
        for block in _blocks(array):
            file.write(block)
        file.flush()
        return _mapped(file, array.size, mmap.ACCESS_READ)


def room(size: int) -> np.ndarray:
    """Returns int64[size] to be written: in memory, or in a temporary file if large."""
    if size <= _WHOLE:
        return np.empty(size, _NUMBER)
    with tempfile.TemporaryFile() as file:
        file.truncate(size * _NUMBER.itemsize)
        return _mapped(file, size, mmap.ACCESS_WRITE)


def released(numbers: np.ndarray) -> np.ndarray:
    """Returns the numbers, of which this process keeps none in memory for now.

    After a pass over all of them; what is read again comes from the file.
    """
    base = numbers
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    held = base.obj if isinstance(base, memoryview) else base
    if isinstance(held, mmap.mmap):
        held.madvise(mmap.MADV_DONTNEED)
    return numbers


def _mapped(file: BinaryIO, size: int, access: int) -> np.ndarray:
    content = mmap.mmap(file.fileno(), size * _NUMBER.itemsize, access=access)
    return np.frombuffer(content, _NUMBER)


def _write(path: str, array: Array, of: str) -> None:
    """Writes the file, which appears whole; another process may do so at once."""
    handle, unfinished = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".flat")
    try:
        checksum = 0
        with open(handle, "wb") as file:
            for block in _blocks(array):
                checksum = zlib.crc32(block, checksum)
                file.write(block)
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little") + of.encode())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _is_whole(path: str, size: int, of: str) -> bool:
    """Whether a file is there, of this data, and undamaged. It is read, not mapped."""
    left = size * _NUMBER.itemsize
    checksum = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(left)
            end = file.read()
            if end[_CHECKSUM_BYTES:] != of.encode():
                return False
            file.seek(0)
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                checksum = zlib.crc32(block, checksum)
                left -= len(block)
    except OSError:
        return False
    return not left and checksum == int.from_bytes(end[:_CHECKSUM_BYTES], "little")


def _blocks(array: Array) -> Iterator[bytes]:
    for start in range(0, array.size, SHARD):
        (block,) = array.read([start], [min(start + SHARD, array.size)])
        yield block.astype(_NUMBER, copy=False).tobytes()
