"""The token store: what `switchyard prepare` writes and training reads.

A folder or a place in a bucket: `manifest.json`, the vocabulary, and for each split of
each Task the flat array `tokens` of each feature, the array `offsets` of where its
documents begin, and a pack index for each way in which rows were made of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tasks import files, flat, packing, samples, vocabularies
from tasks.arrays import REMEDY, Array, write_array
from tasks.errors import StoreError
from tasks.manifest import (
    MANIFEST,
    Manifest,
    SplitManifest,
    mismatches,
    read_manifest,
)
from tasks.settings import DataSettings, FilterSettings

__all__ = ["Split", "StoreError", "TokenStore", "open_store"]


_PACK = ("pieces", "rows")  # arrays of a pack index


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of one Task.

    Attributes:
        path: its place in the store.
        manifest: its counts.
        vocabulary: mapping between its tokens and text.
        read_retries: how often a failed read is tried again.
    """

    path: str
    manifest: SplitManifest
    vocabulary: vocabularies.Vocabulary
    read_retries: int = 0

    @property
    def features(self) -> tuple[str, ...]:
        """("targets",), ("inputs", "targets") or ("images", "targets")."""
        return tuple(sorted(self.manifest.tokens))

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return self.manifest.documents

    def num_tokens(self, feature: str = "targets") -> int:
        """How many tokens a feature has, the ends of documents among them."""
        return self.manifest.tokens[feature]

    def offsets(self, feature: str = "targets") -> np.ndarray:
        """Returns int64[documents + 1]: where documents begin, and the end.

        Of many documents it is a file that is mapped.
        """
        return flat.opened(self._arrays[feature, "offsets"], self.manifest.fingerprint)

    def read(
        self,
        feature: str,
        starts: Sequence[int] | np.ndarray,
        stops: Sequence[int] | np.ndarray,
    ) -> list[np.ndarray]:
        """Returns the tokens of several ranges of a feature, read concurrently.

        Raises:
            StoreError: the store is damaged there.
        """
        return self._arrays[feature, "tokens"].read(starts, stops)

    @property
    def language_names(self) -> tuple[str, ...]:
        """The languages of documents that say theirs."""
        return tuple(self.manifest.languages)

    def languages(self) -> np.ndarray | None:
        """Returns uint16[documents], each the number of a language name.

        None if no document says its language; the name of those that do not, where
        others do, is "".
        """
        if not self.language_names:
            return None
        return self._arrays["", "languages"].read_all()

    def document(self, feature: str, number: int) -> str:
        """Returns the text of one document."""
        start, stop = self._arrays[feature, "offsets"].read([number], [number + 2])[0]
        return self.vocabulary.decode(self.read(feature, [start], [stop])[0])

    def pack(self, key: str, compute: Callable[[], packing.Pack]) -> packing.Pack:
        """Returns the pack index kept under a key.

        One that is not there yet is computed, and kept if the store can be written.
        """
        folder = files.join(self.path, f"pack-{key}")
        description = files.read(files.join(folder, "length"))
        if description is None:
            index = compute()
            if not _keep_pack(folder, index):
                return index
            description = str(index.length).encode()  # what was just written
        remedy = "Delete that folder: it will be computed again."
        length, *kept = description.decode(errors="replace").split("\n")
        if not length.isdecimal() or len(length) > 18:
            raise StoreError(
                f"the length in the pack index {folder} is no number. {remedy}"
            )
        arrays = [Array(files.join(folder, name)) for name in _PACK]
        for array, samples_of in zip(arrays, kept, strict=False):
            samples.check(array, samples_of, remedy)
        of = f"{self.manifest.fingerprint} {key}"
        pieces, rows = (flat.opened(array, of) for array in arrays)
        index = packing.Pack(int(length), pieces=pieces, rows=rows)
        if faults := packing.faults(index):
            raise StoreError(
                f"the pack index {folder} does not fit its split: {'; '.join(faults)}. "
                f"{remedy}"
            )
        return index

    @property
    def retries(self) -> int:
        """How many failed reads were tried again so far."""
        return sum(array.retries for array in self._arrays.values())

    @functools.cached_property
    def _arrays(self) -> dict[tuple[str, str], Array]:
        return _opened(self.path, self.manifest, self.read_retries)


def _opened(
    path: str, manifest: SplitManifest, read_retries: int = 0
) -> dict[tuple[str, str], Array]:
    """Every array of a split, checked to be there, as long as is said, and its own."""
    sizes = {}
    for feature, tokens in manifest.tokens.items():
        sizes[feature, "tokens"] = tokens
        sizes[feature, "offsets"] = manifest.documents + 1
    if manifest.languages:
        sizes["", "languages"] = manifest.documents
    found = {}
    for name, size in sizes.items():
        place = files.join(path, *filter(None, name))
        found[name] = array = Array(place, size, read_retries=read_retries)
        if kept := manifest.samples.get("/".join(name)):
            samples.check(array, kept, REMEDY)
    return found


def sampled(path: str, manifest: SplitManifest) -> SplitManifest:
    """Returns what is known of a split, with samples of its files.

    Args:
        path: place of the split, whose arrays are written.
        manifest: its counts.
    """
    found = {"/".join(n): samples.of(a) for n, a in _opened(path, manifest).items()}
    return dataclasses.replace(manifest, samples=found)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """An open store. Immutable; any number of readers may share it.

    Attributes:
        path: its folder, or place in a bucket.
        manifest: what it says about itself, checked against its arrays.
        read_retries: how often a failed read is tried again.
    """

    path: str
    manifest: Manifest
    read_retries: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of its Tasks."""
        return tuple(self.manifest.tasks)

    @functools.cached_property
    def vocabulary(self) -> vocabularies.Vocabulary:
        """The vocabulary its tokens are of."""
        return vocabularies.from_files(
            lambda name: files.read(files.join(self.path, name)), self.path
        )

    def split(self, task: str, split: str) -> Split:
        """Returns one split of one Task.

        Raises:
            StoreError: there is no such task or split.
        """
        self.manifest.split(task, split)
        return self._splits[task, split]

    @property
    def retries(self) -> int:
        """How many failed reads were tried again so far."""
        return sum(split.retries for split in self._splits.values())

    @functools.cached_property
    def _splits(self) -> dict[tuple[str, str], Split]:
        return {
            (task, split): Split(
                split_path(self.path, task, split),
                counts,
                self.vocabulary,
                self.read_retries,
            )
            for task, manifest in self.manifest.tasks.items()
            for split, counts in manifest.splits.items()
        }


def open_store(
    store_dir: str | Path,
    data: DataSettings | None = None,
    filters: FilterSettings | None = None,
) -> TokenStore:
    """Opens a prepared store.

    Args:
        store_dir: its folder, or place in a bucket.
        data: if given, the store must be the one that these settings describe.
        filters: likewise.
    Raises:
        StoreError: there is none, it is damaged, or it is another one than the
            settings describe.
    """
    path = str(store_dir)
    if not is_there(path):
        raise StoreError(_missing(path))
    manifest = read_manifest(path)
    if data is not None and (found := _mismatches(path, manifest, data, filters)):
        raise StoreError(
            f"the store {path} is another one than the settings describe: "
            f"{'; '.join(found)}. Set STORE_DIR to a folder of its own, or prepare "
            "this one again: switchyard prepare --force --gin_file=..."
        )
    store = TokenStore(path, manifest, data.read_retries if data else 0)
    for split in store._splits.values():
        _ = split._arrays  # every array is there and as long as the manifest says
    if store.vocabulary.fingerprint != manifest.vocabulary_fingerprint:
        raise StoreError(
            f"the vocabulary in {path} is not the one the tokens were made with. "
            "Copy the store again from where it is whole, or prepare it again."
        )
    if data is not None:
        vocabularies.start_id(store.vocabulary, data.start_token)
    return store


def is_there(store_dir: str | Path) -> bool:
    """Whether a store, finished, is at a place."""
    return files.read(files.join(store_dir, MANIFEST)) is not None


def split_path(store_dir: str, task: str, split: str) -> str:
    """Returns where a split is kept; names of Tasks may hold colons and slashes."""
    return files.join(store_dir, _file_name(task), _file_name(split))


def _file_name(name: str) -> str:
    """A name of the same meaning that every file system takes, and inside a folder."""
    if name in (".", ".."):
        return name.replace(".", "%2e")
    return "".join(
        c
        if c.isalnum() or c in "._-"
        else f"%{c.encode(errors='surrogatepass').hex('%')}"
        for c in name
    )


def _keep_pack(folder: str, index: packing.Pack) -> bool:
    """Writes the length last, so that half an index is never found.

    What cannot be written is only slower: the next process computes it again. Says
    whether it could be written.
    """
    try:
        for name, values in zip(_PACK, (index.pieces, index.rows), strict=True):
            write_array(files.join(folder, name), values)
        kept = [samples.of(Array(files.join(folder, name))) for name in _PACK]
        description = "\n".join([str(index.length), *kept])
        files.write(files.join(folder, "length"), description.encode())
    except StoreError:
        return False
    return True


def _mismatches(
    path: str, manifest: Manifest, data: DataSettings, filters: FilterSettings | None
) -> list[str]:
    """Those of the manifest, and whether a model file is the one that was used."""
    found = mismatches(manifest, data, filters)
    if found or manifest.vocabulary != "model":
        return found
    if not Path(data.vocabulary).exists():
        if data.eos_token:
            found += _other_end(data.eos_token, path)
        return found
    model = vocabularies.from_file(data.vocabulary, data.extra_ids, data.eos_token)
    if isinstance(model, vocabularies.HuggingFaceVocabulary):
        found += _other_end(model.end, path)
    if not found and model.fingerprint != manifest.vocabulary_fingerprint:
        found.append(
            f"VOCABULARY = {data.vocabulary!r} is another model than the store was "
            "prepared with"
        )
    return found


def _other_end(asked: str, path: str) -> list[str]:
    """Says if the documents of a store end with another token than is asked for."""
    held = vocabularies.from_files(
        lambda name: files.read(files.join(path, name)), path
    )
    if not isinstance(held, vocabularies.HuggingFaceVocabulary) or held.end == asked:
        return []
    return [f"EOS_TOKEN is {asked!r}, but the store was prepared with {held.end!r}"]


def work_dir(store_dir: str | Path) -> str:
    """Returns where a preparation keeps what it has done so far."""
    return f"{str(store_dir).rstrip('/')}.preparing"


def _missing(path: str) -> str:
    """Says that there is no store, and what an unfinished one means."""
    message = (
        f"there is no token store at {path} (STORE_DIR): make it with "
        "`switchyard prepare --gin_file=...`"
    )
    if files.names(work_dir(path)):
        message += (
            f". {work_dir(path)} is of a preparation that still runs or was "
            "interrupted; the same command goes on with it"
        )
    return message
