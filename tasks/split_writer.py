"""Writes the documents of one split, one after the other."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks import packing
from tasks.arrays import ArrayWriter, write_array
from tasks.baselines import COMPRESSED_BYTES
from tasks.manifest import SplitManifest
from tasks.store import write_pack
from tasks.vocabularies import Vocabulary


class SplitWriter:
    """Appends documents, and counts all that the manifest says of them."""

    def __init__(self, folder: Path, vocabulary: Vocabulary):
        """Creates the split's folder and its array of tokens."""
        folder.mkdir()
        self._folder = folder
        self._eos_id = vocabulary.eos_id
        self._dtype = np.min_scalar_type(vocabulary.size - 1)
        self._tokens = ArrayWriter(folder / "tokens", self._dtype)
        self._ends = [0]
        self._digest = hashlib.sha256()
        self._first_text: list[bytes] = []
        self.counts_V = np.zeros(vocabulary.size, np.int64)
        self.text_bytes = 0

    @property
    def documents(self) -> int:
        """How many were added."""
        return len(self._ends) - 1

    @property
    def tokens(self) -> int:
        """How many were added."""
        return self._ends[-1]

    @property
    def first_text(self) -> bytes:
        """The text of the first documents, up to `COMPRESSED_BYTES`."""
        return b"".join(self._first_text)[:COMPRESSED_BYTES]

    def add(self, ids: Sequence[int] | np.ndarray, text: bytes) -> None:
        """Adds a document: its tokens, and the text they stand for, and its end."""
        ids = np.append(ids, self._eos_id).astype(self._dtype)
        self._tokens.append(ids)
        self._ends.append(self.tokens + len(ids))
        self._digest.update(ids.astype("<u4").tobytes())
        self.counts_V += np.bincount(ids, minlength=len(self.counts_V))
        if self.text_bytes < COMPRESSED_BYTES:
            self._first_text.append(text)
        self.text_bytes += len(text)

    def close(self, length: int, **counts: int) -> SplitManifest:
        """Writes what is left, and the pack index of rows of `length` tokens."""
        offsets = np.asarray(self._ends, np.int64)
        self._tokens.close()
        write_array(self._folder / "offsets", offsets)
        write_pack(self._folder, packing.pack(offsets, length))
        self._digest.update(offsets.astype("<i8").tobytes())
        return SplitManifest(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            fingerprint=self._digest.hexdigest()[:32],
            **counts,
        )
