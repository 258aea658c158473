"""What a token store says about itself, in `manifest.json`."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any

from tasks import files
from tasks.errors import StoreError
from tasks.settings import DataSettings, FilterSettings

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FEATURES = frozenset({"images", "inputs", "targets"})  # folders of a split
_AGAIN = "Delete the folder and run `switchyard prepare` again."


@dataclasses.dataclass(frozen=True)
class LanguageManifest:
    """The documents of one language.

    Attributes:
        documents: how many there are.
        tokens: number in their targets, ends among them.
        text_bytes: bytes of UTF-8 that those tokens stand for.
    """

    documents: int
    tokens: int
    text_bytes: int


@dataclasses.dataclass(frozen=True)
class SplitManifest:
    """One split of a Task.

    Attributes:
        documents: how many it holds.
        tokens: number in each feature, the end of each document among them.
        text_bytes: bytes of UTF-8 that the tokens of "targets" stand for.
        fingerprint: digest of every token and of where documents end.
        languages: counts by language, of documents that say theirs; in the order of
            the languages' numbers.
        replaced_documents: stored with U+FFFD where they were not UTF-8.
        removed: documents left out, by reason: "empty", "bad_utf8",
            "exact_duplicates", "near_duplicates", "low_quality".
        samples: digests of a few numbers of each file, by array, such as
            "targets/tokens"; see `tasks.samples`.
    """

    documents: int
    tokens: Mapping[str, int]
    text_bytes: int
    fingerprint: str
    languages: Mapping[str, LanguageManifest] = dataclasses.field(default_factory=dict)
    replaced_documents: int = 0
    removed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """Turns nats per token into bits per byte: nats / ln 2 / bytes_per_token."""
        return self.text_bytes / self.tokens["targets"]


@dataclasses.dataclass(frozen=True)
class TaskManifest:
    """One Task.

    Attributes:
        splits: each split by its name.
        rate: in the SeqIO Mixture; 1 for a Task alone.
        baselines: numbers on the held-out split that need no network.
    """

    splits: Mapping[str, SplitManifest]
    rate: float
    baselines: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole store.

    Attributes:
        name: key of the Task or Mixture in SeqIO's registry.
        vocabulary: "bytes", "sentencepiece" (trained), "model" (a file) or "task".
        vocabulary_size: V, of the model's embedding at least.
        vocabulary_fingerprint: digest of the vocabulary.
        extra_ids: ids at its end that stand for no text.
        train_split: name of the split that is learnt.
        heldout_split: name of the split that is scored.
        tasks: each Task by its name, in the order of the Mixture.
        filters: the FilterSettings that the train splits went through.
        bad_utf8: what became of documents that were not UTF-8.
        lossy_fraction: share of sampled texts that the vocabulary does not give back:
            bits per byte then count text that no token holds.
        quality: what the quality classifier reported; empty without one.
        format_version: number of the store's layout.
    """

    name: str
    vocabulary: str
    vocabulary_size: int
    vocabulary_fingerprint: str
    extra_ids: int
    train_split: str
    heldout_split: str
    tasks: Mapping[str, TaskManifest]
    filters: Mapping[str, object]
    bad_utf8: str = "error"
    lossy_fraction: float = 0.0
    quality: Mapping[str, object] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of the data and the vocabulary: what a run learnt from."""
        parts = [self.vocabulary_fingerprint]
        for name, task in sorted(self.tasks.items()):
            for split, counts in sorted(task.splits.items()):
                parts.append(f"{name} {split} {counts.fingerprint}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    @property
    def had_bad_utf8(self) -> bool:
        """Whether any document was not UTF-8."""
        splits = [
            split for task in self.tasks.values() for split in task.splits.values()
        ]
        return any(s.replaced_documents or s.removed.get("bad_utf8") for s in splits)

    def split(self, task: str, split: str) -> SplitManifest:
        """Returns what is known of one split.

        Raises:
            StoreError: there is no such task or split.
        """
        for kind, name, known in (
            ("task", task, self.tasks),
            ("split", split, self.tasks[task].splits if task in self.tasks else {}),
        ):
            if name not in known:
                there = ", ".join(map(repr, known))
                raise StoreError(f"the store has no {kind} {name!r}: it has {there}")
        return self.tasks[task].splits[split]


def write_manifest(manifest: Manifest, store_dir: str) -> None:
    """Writes `manifest.json`, which makes a store of a folder."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2)
    files.write(files.join(store_dir, MANIFEST), f"{text}\n".encode())


def read_manifest(store_dir: str) -> Manifest:
    """Reads `manifest.json`.

    Raises:
        StoreError: it is missing, unreadable, or of another format.
    """
    path = files.join(store_dir, MANIFEST)
    content = files.read(path)
    if content is None:
        raise StoreError(f"{store_dir} holds no {MANIFEST}: it is no store")
    try:
        fields = json.loads(content)
        version = fields["format_version"]
    # JSON that is nested too deep is a RecursionError.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}). {_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} is of format {version!r}, and this version of Switchyard reads "
            f"format {FORMAT_VERSION}: prepare into another STORE_DIR, or delete this "
            "one"
        )
    try:
        manifest = _record(Manifest, fields)
        _check_names(manifest)
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{path} lacks what it should say ({error}). {_AGAIN}"
        ) from None
    return manifest


def mismatches(
    manifest: Manifest, data: DataSettings, filters: FilterSettings | None = None
) -> list[str]:
    """Lists where a store is not the one that the settings describe."""
    kind = vocabulary_kind(data.vocabulary)
    asked, held = data.vocabulary, manifest.vocabulary
    if kind == held:
        asked = held
    elif held == "model":
        held = "a vocabulary of a file"
    wanted: list[tuple[str, object, object]] = [
        ("MIXTURE_OR_TASK_NAME", data.mixture_or_task_name, manifest.name),
        ("VOCABULARY", asked, held),
        ("TRAIN_SPLIT", data.train_split, manifest.train_split),
        ("HELDOUT_SPLIT", data.heldout_split, manifest.heldout_split),
    ]
    if kind != "task":
        wanted.append(("EXTRA_IDS", data.extra_ids, manifest.extra_ids))
    if kind == manifest.vocabulary == "sentencepiece":
        size = manifest.vocabulary_size - manifest.extra_ids
        wanted.append(("VOCABULARY_PIECES", data.vocabulary_size, size))
    if manifest.had_bad_utf8:
        wanted.append(("BAD_UTF8", data.bad_utf8, manifest.bad_utf8))
    if filters is not None:
        wanted += _filters_wanted(filters, manifest)
    return [
        f"{macro} = {asked!r}, but the store was prepared with {held!r}"
        for macro, asked, held in wanted
        if asked != held
    ]


def _filters_wanted(
    filters: FilterSettings, manifest: Manifest
) -> list[tuple[str, object, object]]:
    """What is asked for and what is there; what has no effect is not compared."""
    asked = dataclasses.asdict(filters)
    held = {**dataclasses.asdict(FilterSettings()), **manifest.filters}
    macros = {"DUPLICATES": "duplicates", "QUALITY_TASK": "quality_task"}
    if "near" in (asked["duplicates"], held["duplicates"]):
        macros["NEAR_DUPLICATE_SIMILARITY"] = "near_similarity"
    if asked["quality_task"] or held["quality_task"]:
        macros["QUALITY_PARETO"] = "quality_pareto"
        macros["QUALITY_SAMPLE"] = "quality_sample"
    return [(macro, asked[field], held[field]) for macro, field in macros.items()]


def vocabulary_kind(vocabulary: str) -> str:
    """Returns how a manifest names a vocabulary: a path is a "model"."""
    known = ("bytes", "sentencepiece", "task")
    return vocabulary if vocabulary in known else "model"


def _record(kind: Any, value: Any, name: str = "it") -> Any:
    """Returns a value of JSON as what a record says it is.

    Raises:
        TypeError: it is something else.
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        kinds = typing.get_type_hints(kind)
        if other := value.keys() - kinds.keys():
            raise TypeError(f"{name} has {sorted(other)[0]!r}, which is not known")
        given = {key: _record(kinds[key], item, key) for key, item in value.items()}
        return typing.cast(Any, kind)(**given)
    if origin is Mapping and isinstance(value, dict):
        return {key: _record(inside[1], item, key) for key, item in value.items()}
    number = type(value) is int and 0 <= value < 2**63
    if (
        kind is object
        or (kind is str and isinstance(value, str))
        or (kind is int and number)
        or (kind is float and (number or isinstance(value, float)))
    ):
        return value
    raise TypeError(f"{name[:50]!r} is {str(value)[:50]!r}")


def _check_names(manifest: Manifest) -> None:
    """Refuses what could not be the name of a folder in the store."""
    for task, of_task in manifest.tasks.items():
        for name in (task, *of_task.splits):
            if not name.strip() or not name.isprintable():
                raise ValueError(f"{name[:50]!r} is not the name of a Task or split")
        for split in of_task.splits.values():
            if "targets" not in split.tokens or not split.tokens.keys() <= FEATURES:
                raise ValueError(f"it names features {sorted(split.tokens)[:5]}")
