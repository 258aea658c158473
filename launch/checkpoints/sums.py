"""The digest of `launch/checkpoints/digest.py`, of arrays in the host's memory."""

from collections.abc import Iterable

import numpy as np

from launch.checkpoints.arrays import Index

_MOST = 2**20  # elements that are digested at a time


def digest_of(
    shape: tuple[int, ...], blocks: Iterable[tuple[Index, np.ndarray]]
) -> str:
    """The digest of an array whose pieces come in any order, in hexadecimal.

    Args:
        shape: shape of the array.
        blocks: every piece once, with its place.
    """
    digest = Digest(shape)
    for place, values in blocks:
        digest.add(place, values)
    return digest.digest()


class Digest:
    """A digest that grows piece by piece.

    Args:
        shape: shape of the array.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._total = 0

    def add(self, place: Index, values: np.ndarray) -> None:
        """Adds a piece, by its place."""
        self._total += _sum(self._shape, [part.start for part in place], values)

    def digest(self) -> str:
        """The digest of the pieces so far, in hexadecimal."""
        return f"{self._total % 2**32:08x}"


def _sum(shape: tuple[int, ...], starts: list[int], values: np.ndarray) -> int:
    if values.size > _MOST and max(values.shape) > 1:  # what follows takes memory
        dim = next(dim for dim, length in enumerate(values.shape) if length > 1)
        parts = np.array_split(values, 2, axis=dim)
        later = list(starts)
        later[dim] += parts[0].shape[dim]
        return _sum(shape, starts, parts[0]) + _sum(shape, later, parts[1])
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[values.dtype.itemsize]
    # Not of numbers: of those NumPy warns when they wrap.
    values, shape, starts = (
        (values.reshape(1), (1,), [0]) if values.ndim == 0 else (values, shape, starts)
    )
    bits = np.ascontiguousarray(values).view(word).astype(np.uint32)
    index = np.zeros(values.shape, np.uint32)
    for dim, (length, start) in enumerate(zip(shape, starts, strict=True)):
        along = np.arange(start, start + values.shape[dim]).astype(np.uint32)
        index *= np.uint32(length % 2**32)
        index += along.reshape([-1 if d == dim else 1 for d in range(values.ndim)])
    return int(_mixed(bits.reshape(values.shape) ^ _mixed(index)).sum(dtype=np.uint64))


def _mixed(words: np.ndarray) -> np.ndarray:
    """Permutes the 32-bit words: the last step of MurmurHash3."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
