"""An array of a checkpoint that is written piece by piece, and digested."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from launch.checkpoints.arrays import Index, cut, spec_of
from launch.checkpoints.sums import Digest
from launch.checkpoints.writing import writing

_SAID = ("shape", "chunks", "dtype", "compressor", "order", "dimension_separator")


class Written:
    """An array that is written; few megabytes of it are on their way at a time.

    Args:
        state: folder of the database.
        name: name of the array in it.
        metadata: what zarr says of it; of that of another array, what a new one needs
            is taken.
    Raises:
        CheckpointError: the disk is full, or the like.
    """

    def __init__(self, state: Path, name: str, metadata: Mapping[str, Any]) -> None:
        said = {key: metadata[key] for key in _SAID if key in metadata}
        self._digest, self._state = Digest(tuple(said["shape"])), state
        self._chunks = said["chunks"]
        with writing(state):
            self._target = ts.open(
                spec_of(state, name) | {"metadata": said}, create=True
            ).result()
        self._dtype = self._target.dtype.numpy_dtype

    def add(self, place: Index, values: np.ndarray) -> None:
        """Writes a piece, whose place begins where chunks do, in the array's type."""
        for part in cut(values.shape, self._chunks):
            there = tuple(
                slice(whole.start + own.start, whole.start + own.stop)
                for whole, own in zip(place, part, strict=True)
            )
            piece = np.asarray(values[part], self._dtype, order="C")
            self._digest.add(there, piece)
            with writing(self._state):
                self._target[there].write(piece).result()

    def digest(self) -> str:
        """Returns the digest of the pieces so far."""
        return self._digest.digest()
