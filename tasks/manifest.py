"""What a token store says about itself, in `manifest.json`."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tasks.errors import StoreError
from tasks.settings import DataSettings

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class SplitManifest:
    """One split.

    Attributes:
        documents: how many it holds.
        tokens: of all documents, the end of each document among them.
        text_bytes: bytes of UTF-8 that those tokens stand for.
        fingerprint: digest of every token and of where documents end.
        empty_documents: left out because they held no text.
        replaced_documents: stored with U+FFFD where they were not UTF-8.
    """

    documents: int
    tokens: int
    text_bytes: int
    fingerprint: str
    empty_documents: int = 0
    replaced_documents: int = 0

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte: nats / ln 2 / bytes_per_token."""
        return self.text_bytes / self.tokens


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole store.

    Attributes:
        task: name of the SeqIO Task.
        vocabulary: "bytes", "sentencepiece" (trained), "model" (a file) or "task".
        vocabulary_size: V, of the model's embedding at least.
        vocabulary_fingerprint: digest of the vocabulary.
        train_split: name of the split that is learnt.
        heldout_split: name of the split that is scored.
        splits: each split by its name.
        baselines: numbers on the held-out split that need no network.
        format_version: of the store's layout.
    """

    task: str
    vocabulary: str
    vocabulary_size: int
    vocabulary_fingerprint: str
    train_split: str
    heldout_split: str
    splits: Mapping[str, SplitManifest]
    baselines: Mapping[str, float]
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of the data and the vocabulary: what a run learnt from."""
        parts = [self.vocabulary_fingerprint]
        parts += [f"{name} {s.fingerprint}" for name, s in sorted(self.splits.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `manifest.json`."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2, sort_keys=True)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        StoreError: it is missing, unreadable, or of a newer format.
    """
    path = folder / MANIFEST
    again = "Delete the folder and run `switchyard prepare` again."
    try:
        fields = json.loads(path.read_text())
        version = fields["format_version"]
    except FileNotFoundError:
        raise StoreError(f"{folder} holds no {MANIFEST}: it is no store") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error}). {again}") from None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} is of format {version!r}, and this version of Switchyard reads "
            f"format {FORMAT_VERSION}. Update Switchyard, or prepare into another "
            "STORE_DIR."
        )
    try:
        splits = {name: SplitManifest(**s) for name, s in fields.pop("splits").items()}
        return Manifest(splits=splits, **fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} lacks what it should say ({error}). {again}"
        ) from None


def mismatches(manifest: Manifest, data: DataSettings) -> list[str]:
    """Lists where a store is not the one that the settings describe."""
    kind = vocabulary_kind(data.vocabulary)
    wanted: list[tuple[str, object, object]] = [
        ("MIXTURE_OR_TASK_NAME", data.mixture_or_task_name, manifest.task),
        ("VOCABULARY", kind, manifest.vocabulary),
        ("TRAIN_SPLIT", data.train_split, manifest.train_split),
        ("HELDOUT_SPLIT", data.heldout_split, manifest.heldout_split),
    ]
    if kind == manifest.vocabulary == "sentencepiece":
        size = manifest.vocabulary_size
        wanted.append(("VOCABULARY_SIZE", data.vocabulary_size, size))
    return [
        f"{macro} = {asked!r}, but the store was prepared with {held!r}"
        for macro, asked, held in wanted
        if asked != held
    ]


def vocabulary_kind(vocabulary: str) -> str:
    """Returns how a manifest names a vocabulary: a path is a "model"."""
    known = ("bytes", "sentencepiece", "task")
    return vocabulary if vocabulary in known else "model"
