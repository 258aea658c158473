"""Finds documents that repeat an earlier one, exactly or nearly.

Two steps, so that the dear one runs anywhere: `fingerprint` is a pure function of one
text, and `find` compares the fingerprints of all documents in stored order. The result
does not depend on who made the fingerprints.

Near duplicates are those whose sets of shingles have a large Jaccard similarity. A
shingle is eight characters in a row of the text in lower case, so that it needs no
spaces between words: Chinese is treated as English is. Similarity is estimated by
MinHash (Broder, "On the resemblance and containment of documents", 1997).
"""

import dataclasses
import functools
import hashlib
import unicodedata
from typing import Any

import numpy as np

from tasks.quality.packages import quality_packages
from tasks.settings import FilterSettings

_SHINGLE = 8  # characters
_MULTIPLIER = np.uint32(0x9E3779B1)  # odd, of the polynomial that hashes a shingle
_BLOCK = 512  # shingles at once: 512 × 128 hashes stay in the processor's cache
_VALUES = 128  # of a signature: a similarity s is off by √(s(1 - s)/128), 0.035 at 0.8
# The index is made for few misses; what it finds wrongly is compared and let go.
_WEIGHTS = (0.125, 0.875)  # of false finds and of misses
_STEEPEST = 0.95  # similarity: beyond it an index of 128 values has a single band
# Documents that a bucket of the index remembers. Bounds the work where very many
# documents share a template and yet are not near duplicates.
_REMEMBERED = 256


@dataclasses.dataclass(frozen=True)
class Found:
    """Which documents repeat an earlier one.

    Attributes:
        first: int64[documents], the document that stays in place of each one: its own
            number if it stays itself.
        similarity: float32[documents], to that document: 1 for a document that stays
            or is an exact duplicate, else an estimate, which may be 1 too.
        equal: bool[documents], those left out because an equal one is before them.
    """

    first: np.ndarray
    similarity: np.ndarray
    equal: np.ndarray

    @property
    def exact(self) -> int:
        """How many documents are left out because an equal one is before them."""
        return int(self.equal.sum())

    @property
    def near(self) -> int:
        """How many are left out because they resemble one that stays before them."""
        return int(self.leave_out.sum()) - self.exact

    @property
    def leave_out(self) -> np.ndarray:
        """bool[documents], the documents that repeat another."""
        return self.first != np.arange(len(self.first))


def record_type(filters: FilterSettings) -> np.dtype:
    """Returns what a fingerprint is made of: 16 bytes, or 272 with a signature."""
    fields: list[Any] = [("digest", "<u8", (2,))]
    if filters.duplicates == "near":
        fields.append(("signature", "<u2", (_VALUES,)))
    return np.dtype(fields)


def digest(text: str) -> bytes:
    """Returns 16 bytes that stand for a text: equal only for equal texts."""
    return hashlib.blake2b(_utf8(text), digest_size=16).digest()


def fingerprint(text: str, filters: FilterSettings) -> bytes:
    """Returns what `find` has to know of a document, one record of `record_type`.

    Args:
        text: all of the document.
        filters: whether near duplicates are sought; nothing else of it matters.
    Raises:
        StoreError: datasketch is not installed.
    """
    if filters.duplicates != "near":
        return digest(text)
    return digest(text) + _signature(text).tobytes()


def find(records: np.ndarray, filters: FilterSettings) -> Found:
    """Decides which documents are left out: all but the first of those alike.

    A document is left out if an equal one comes before it. With
    `duplicates = "near"` it is also left out if it resembles a document that comes
    before it and stays: one that shares a band of its signature (locality-sensitive
    hashing) and then agrees in at least `near_similarity` of the whole signature.
    Chains do not count: b may go for a, and c, which resembles b alone, stays.

    Takes about 60 bytes of memory per document beside the records, which may be a
    `numpy.memmap`, and about 0.4 kB for each document that shares a band with another.

    Args:
        records: fingerprints of all documents in stored order, as an array of
            `record_type(filters)`:
            `np.frombuffer(b"".join(fingerprints), record_type(filters))`.
        filters: the settings that the fingerprints were made with.
    Raises:
        StoreError: datasketch is not installed.
    """
    first = _first_equal(records["digest"])
    similarity = np.ones(len(records), np.float32)
    equal = first != np.arange(len(first))
    if filters.duplicates == "near":
        _compare(
            records["signature"],
            np.flatnonzero(~equal),
            filters.near_similarity,
            first,
            similarity,
        )
        first = first[first]  # an exact duplicate of a near duplicate
    return Found(first, similarity, equal)


# ------------------------------------------------------------------------ signatures


def _signature(text: str) -> np.ndarray:
    """uint16[128], the low bits of the MinHash of a text's shingles.

    Low bits agree by chance once in 65,536 times (b-bit minwise hashing,
    arXiv:0910.3349).
    """
    minhash = _empty_minhash().copy()
    codes = _code_points(text)
    for start in range(0, len(codes) - _SHINGLE + 1, _BLOCK):
        hashes = _shingles(codes[start : start + _BLOCK + _SHINGLE - 1])
        minhash.update_batch([hashes])  # one "value" that is an array of hashes
    return minhash.hashvalues.astype("<u2")


@functools.cache
def _empty_minhash() -> Any:
    """A MinHash of nothing: making its permutations takes longer than a document."""
    with quality_packages("finding near duplicates"):
        from datasketch import MinHash
    # affine32 mixes the hashes itself before it permutes them.
    return MinHash(_VALUES, seed=1, scheme="affine32", hashfunc=_unchanged)


def _unchanged(hashes: np.ndarray) -> np.ndarray:
    return hashes


def _code_points(text: str) -> np.ndarray:
    """uint32, the characters that are compared: neither case nor kind of space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)  # full-width signs and letters
    plain = " ".join(text.lower().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.pad(codes, (0, max(0, _SHINGLE - len(codes))))


def _shingles(codes: np.ndarray) -> np.ndarray:
    """A polynomial of each `_SHINGLE` characters in a row, modulo 2^32."""
    count = len(codes) - _SHINGLE + 1
    hashes = codes[:count].copy()
    for place in range(1, _SHINGLE):
        hashes *= _MULTIPLIER
        hashes += codes[place : place + count]
    return hashes


# ---------------------------------------------------------------------------- finding


def _first_equal(digests: np.ndarray) -> np.ndarray:
    """For each document the number of the first one with its digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: the first one leads
    ordered = digests[order]
    leads = np.ones(len(order), bool)
    leads[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    leader = order[leads][np.cumsum(leads) - 1] if len(order) else order
    first = np.empty(len(order), np.int64)
    first[order] = leader
    return first


def _compare(
    signatures: np.ndarray,
    numbers: np.ndarray,
    threshold: float,
    first: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Compares those of `numbers` that share a bucket; fills `first`, `similarity`."""
    suspects, bucket_of = _buckets(signatures, numbers, threshold)
    starts = np.searchsorted(bucket_of, np.arange(bucket_of.max(initial=-1) + 1))
    # A bucket's part of `kept` holds those of its documents that stay, so far.
    kept, sizes = np.empty_like(suspects), np.zeros(len(starts), np.int64)
    order = np.argsort(suspects, kind="stable")  # all buckets of a document together
    ends = np.flatnonzero(np.diff(suspects[order], append=-1)) + 1
    begin = 0
    for end in ends.tolist():
        number = int(suspects[order[begin]])
        buckets = bucket_of[order[begin:end]].tolist()
        begin = end
        parts = [kept[starts[b] : starts[b] + sizes[b]] for b in buckets]
        earlier = np.unique(np.concatenate(parts))
        if len(earlier):
            agree = (signatures[earlier] == signatures[number]).mean(axis=1)
            best = int(agree.argmax())
            if agree[best] >= threshold:
                first[number], similarity[number] = earlier[best], agree[best]
                continue
        for b in buckets:
            if sizes[b] < _REMEMBERED:
                kept[starts[b] + sizes[b]] = number
                sizes[b] += 1


def _buckets(
    signatures: np.ndarray, numbers: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the documents that share a bucket with another.

    Sorting the keys of one band at a time takes far less memory than an index of
    dictionaries, and leaves those few that share a bucket.

    Returns:
        Pairs of a document's number and a bucket's, ordered by bucket: int32[pairs]
        or int64[pairs], and int32[pairs].
    """
    bands, width = _bands(threshold)
    small = np.int32 if len(signatures) < 2**31 else np.int64
    members, buckets, total = [np.empty(0, small)], [np.empty(0, np.int32)], 0
    for band in range(bands):
        keys = _keys(signatures, numbers, slice(band * width, (band + 1) * width))
        order = np.argsort(keys, kind="stable")
        changes = np.flatnonzero(np.diff(keys[order])) + 1
        sizes = np.diff(np.concatenate([[0], changes, [len(order)]]))
        members.append(numbers[order[np.repeat(sizes > 1, sizes)]].astype(small))
        shared = sizes[sizes > 1]
        names = np.arange(total, total + len(shared), dtype=np.int32)
        buckets.append(np.repeat(names, shared))
        total += len(shared)
    return np.concatenate(members), np.concatenate(buckets)


@functools.cache
def _bands(threshold: float) -> tuple[int, int]:
    """How many bands a signature is cut into, and how many values each has."""
    with quality_packages("finding near duplicates"):
        from datasketch import MinHashLSH
    index = MinHashLSH(min(threshold, _STEEPEST), num_perm=_VALUES, weights=_WEIGHTS)
    return index.b, index.r


def _keys(signatures: np.ndarray, numbers: np.ndarray, band: slice) -> np.ndarray:
    """uint64, a hash of one band of each document."""
    keys = np.zeros(len(numbers), np.uint64)
    for start in range(0, len(numbers), 1 << 16):  # a part of a memmap at a time
        part = slice(start, start + (1 << 16))
        for column in signatures[numbers[part]][:, band].T:
            keys[part] += column
            keys[part] *= np.uint64(0xBF58476D1CE4E5B9)
            keys[part] ^= keys[part] >> np.uint64(29)
    return keys


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
