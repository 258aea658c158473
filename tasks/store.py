"""The token store: what `switchyard prepare` writes and training reads.

A folder: `manifest.json`, the vocabulary, and for each split the flat array `tokens`,
the array `offsets` of where documents begin, and for each length of row L a pack
index `pack-L`.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks import packing, vocabularies
from tasks.arrays import Array, write_array
from tasks.errors import StoreError
from tasks.manifest import Manifest, SplitManifest, mismatches, read_manifest
from tasks.settings import DataSettings

__all__ = ["StoreError", "TokenStore", "open_store"]


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """An open store. Immutable; any number of readers may share it.

    Attributes:
        path: its folder.
        manifest: what it says about itself, checked against its arrays.
    """

    path: Path
    manifest: Manifest

    @functools.cached_property
    def vocabulary(self) -> vocabularies.Vocabulary:
        """The vocabulary its tokens are of."""
        return vocabularies.load(self.path)

    def offsets(self, split: str) -> np.ndarray:
        """Returns int64[documents + 1]: where documents begin, and the end."""
        return self._array(split, "offsets").read_all()

    def read(
        self, split: str, starts: Sequence[int], stops: Sequence[int]
    ) -> list[np.ndarray]:
        """Returns the tokens of several ranges of a split, read concurrently.

        Raises:
            StoreError: the store is damaged there.
        """
        return self._array(split, "tokens").read(starts, stops)

    def document(self, split: str, number: int) -> str:
        """Returns the text of one document."""
        start, stop = self.offsets(split)[number : number + 2]
        return self.vocabulary.decode(self.read(split, [start], [stop])[0])

    def pack(self, split: str, length: int) -> packing.Pack:
        """Returns the pack index of rows of `length` tokens.

        It is kept beside the split. One that is not there yet is computed, and kept
        if the folder can be written.
        """
        num_tokens = self._split(split).tokens
        folder = self.path / split / f"pack-{length}"
        if not folder.is_dir():
            index = packing.pack(self.offsets(split), length)
            with contextlib.suppress(OSError, StoreError):
                _write_pack(folder, index)
            return index
        index = packing.Pack(
            length,
            pieces=Array(folder / "pieces").read_all(),
            rows=Array(folder / "rows").read_all(),
        )
        if faults := packing.faults(index, num_tokens):
            raise StoreError(
                f"the pack index {folder} does not fit its split: {'; '.join(faults)}. "
                "Delete that folder: it will be computed again."
            )
        return index

    def _split(self, split: str) -> SplitManifest:
        try:
            return self.manifest.splits[split]
        except KeyError:
            names = ", ".join(map(repr, self.manifest.splits))
            raise StoreError(
                f"the store {self.path} has no split {split!r}: it has {names}"
            ) from None

    @functools.cached_property
    def _arrays(self) -> dict[tuple[str, str], Array]:
        arrays = {}
        for name, split in self.manifest.splits.items():
            sizes = {"tokens": split.tokens, "offsets": split.documents + 1}
            for kind, size in sizes.items():
                arrays[name, kind] = Array(self.path / name / kind, size)
        return arrays

    def _array(self, split: str, kind: str) -> Array:
        self._split(split)
        return self._arrays[split, kind]


def open_store(store_dir: str | Path, data: DataSettings | None = None) -> TokenStore:
    """Opens a prepared store.

    Args:
        store_dir: its folder.
        data: if given, the store must be the one that these settings describe.
    Raises:
        StoreError: there is none, it is damaged, or it is another one than `data`
            describes.
    """
    path = Path(store_dir)
    if not path.is_dir():
        raise StoreError(_missing(path))
    manifest = read_manifest(path)
    if data is not None and (found := _mismatches(manifest, data)):
        raise StoreError(
            f"the store {path} is another one than the settings describe: "
            f"{'; '.join(found)}. Set STORE_DIR to a folder of its own, or prepare "
            "this one again: switchyard prepare --gin_file=..."
        )
    store = TokenStore(path, manifest)
    _ = store._arrays  # every array is there and as long as the manifest says
    if store.vocabulary.fingerprint != manifest.vocabulary_fingerprint:
        raise StoreError(
            f"the vocabulary in {path} is not the one the tokens were made with. "
            "Copy the store again from where it is whole, or prepare it again."
        )
    return store


def write_pack(split_folder: Path, index: packing.Pack) -> None:
    """Writes a pack index beside its split."""
    _write_pack(split_folder / f"pack-{index.length}", index)


def _write_pack(folder: Path, index: packing.Pack) -> None:
    """Writes under another name first, so that half an index is never found."""
    unfinished = folder.with_name(f"{folder.name}.incomplete-{os.getpid()}")
    unfinished.mkdir()
    try:
        write_array(unfinished / "pieces", index.pieces)
        write_array(unfinished / "rows", index.rows)
        unfinished.rename(folder)
    except OSError:  # somebody else was faster, with the same index
        shutil.rmtree(unfinished, ignore_errors=True)


def _mismatches(manifest: Manifest, data: DataSettings) -> list[str]:
    """Those of the manifest, and whether a model file is the one that was used."""
    found = mismatches(manifest, data)
    if not found and manifest.vocabulary == "model" and Path(data.vocabulary).exists():
        model = vocabularies.sentencepiece_model(data.vocabulary)
        if model.fingerprint != manifest.vocabulary_fingerprint:
            found.append(
                f"VOCABULARY = {data.vocabulary!r} is another model than the store "
                "was prepared with"
            )
    return found


def _missing(path: Path) -> str:
    """Says that there is no store, and what an unfinished one means."""
    message = (
        f"there is no token store at {path} (STORE_DIR): make it with "
        "`switchyard prepare --gin_file=...`"
    )
    leftovers = sorted(path.parent.glob(f"{path.name}.incomplete-*"))
    if leftovers:
        message += (
            f". {leftovers[-1]} is of a preparation that still runs or was "
            "interrupted; the next one removes it"
        )
    return message
