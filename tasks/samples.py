"""A few numbers of each file of an array, by which it is told from another store's.

Checksums in the files find what was damaged, but a file of another store, of the same
size and whole, passes them all.
"""

import hashlib

import numpy as np

from tasks.arrays import SHARD, Array
from tasks.errors import StoreError

_NUMBERS = 256  # at the beginning of a file, and at its end
_DIGITS = 8  # of hexadecimal, for each file


def of(array: Array) -> str:
    """Returns the digests of what an array's files begin and end with, in their order.

    Raises:
        StoreError: the array is damaged there.
    """
    firsts = np.arange(0, array.size, SHARD)
    lasts = np.minimum(firsts + SHARD, array.size)
    starts = np.stack([firsts, np.maximum(lasts - _NUMBERS, firsts)], 1).ravel()
    stops = np.stack([np.minimum(firsts + _NUMBERS, lasts), lasts], 1).ravel()
    pieces = array.read(starts, stops)
    digests = []
    for first, last in zip(pieces[::2], pieces[1::2], strict=True):
        hashed = hashlib.sha256(first.astype("<i8").tobytes())
        hashed.update(last.astype("<i8").tobytes())
        digests.append(hashed.hexdigest()[:_DIGITS])
    return " ".join(digests)


def check(array: Array, kept: str, remedy: str) -> None:
    """Compares an array with the samples that were kept of it.

    Args:
        array: the array as it is.
        kept: what `of` returned when it was written.
        remedy: sentence that says what to do if it is another one.
    Raises:
        StoreError: a file is another one than was written.
    """
    found, wanted = of(array).split(), kept.split()
    pairs = enumerate(zip(found, wanted, strict=False))
    odd = [number for number, (one, other) in pairs if one != other]
    if len(found) != len(wanted) or odd:
        named = ", ".join(f"c/{number}" for number in odd[:5]) or "as many files"
        raise StoreError(
            f"array {array.path} is not the one that was prepared, in {named}: a file "
            f"of another store is in its place. {remedy}"
        )
