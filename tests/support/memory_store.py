"""A store in memory with what batches read of one, and a corpus made by a formula."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks import files, vocabularies
from tasks.arrays import write_array
from tasks.manifest import Manifest, SplitManifest, TaskManifest, write_manifest
from tasks.settings import DataSettings
from tasks.store import TokenStore, open_store, sampled, split_path
from tasks.vocabularies import ByteVocabulary

EXTRA_IDS = 30
VOCABULARY = ByteVocabulary(extra_ids=EXTRA_IDS)


@dataclasses.dataclass
class MemorySplit:
    """As `tasks.store.Split`; `kept` are the pack indices computed so far."""

    documents: Mapping[str, Sequence[np.ndarray]]
    vocabulary: ByteVocabulary = VOCABULARY
    kept: dict = dataclasses.field(default_factory=dict)

    @property
    def features(self):
        return tuple(sorted(self.documents))

    @property
    def num_documents(self):
        return len(self.documents["targets"])

    def num_tokens(self, feature="targets"):
        return sum(map(len, self.documents[feature]))

    def offsets(self, feature="targets"):
        return np.cumsum([0, *map(len, self.documents[feature])])

    def read(self, feature, starts, stops):
        tokens = np.concatenate(self.documents[feature]).astype(np.uint16)
        return [tokens[start:stop] for start, stop in zip(starts, stops, strict=True)]

    def pack(self, key, compute):
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


@dataclasses.dataclass
class MemoryStore:
    """As `tasks.store.TokenStore`."""

    splits: Mapping[str, Mapping[str, MemorySplit]]
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    vocabulary: ByteVocabulary = VOCABULARY

    @property
    def tasks(self):
        return tuple(self.splits)

    @property
    def manifest(self):
        tasks = {
            name: types.SimpleNamespace(rate=self.rates.get(name, 1.0))
            for name in self.splits
        }
        return types.SimpleNamespace(tasks=tasks)

    def split(self, task, split):
        return self.splits[task][split]


def on_disk(store: MemoryStore, folder: Path) -> TokenStore:
    """The same store, written and opened."""
    tasks = {}
    for task, splits in store.splits.items():
        counts = {}
        for split, part in splits.items():
            place = split_path(str(folder), task, split)
            for feature in part.features:
                tokens = np.concatenate(part.documents[feature]).astype(np.uint16)
                write_array(files.join(place, feature, "tokens"), tokens)
                write_array(
                    files.join(place, feature, "offsets"), part.offsets(feature)
                )
            counted = {name: part.num_tokens(name) for name in part.features}
            written = SplitManifest(part.num_documents, counted, 1, split)
            counts[split] = sampled(place, written)
        tasks[task] = TaskManifest(counts, store.rates.get(task, 1.0), {})
    for name, content in vocabularies.to_files(store.vocabulary).items():
        files.write(files.join(folder, name), content)
    manifest = Manifest(
        name="made_up",
        vocabulary="bytes",
        vocabulary_size=store.vocabulary.size,
        vocabulary_fingerprint=store.vocabulary.fingerprint,
        extra_ids=EXTRA_IDS,
        train_split="train",
        heldout_split="validation",
        tasks=tasks,
        filters={},
    )
    write_manifest(manifest, str(folder))
    return open_store(folder)


def documents(number: int, salt: int, longest: int = 61) -> list[np.ndarray]:
    """Documents of 2 to `longest` tokens by a formula, each ended by 1."""
    made = []
    for d in range(number):
        place = np.arange(1 + (d * d * 7 + d * 3 + salt) % (longest - 1))
        tokens = 3 + (d * 31 + place * place * 7 + place * 13 + salt * 5) % 256
        made.append(np.append(tokens, 1))
    return made


def text_store(**sizes: int) -> MemoryStore:
    """Tasks of text by name, each of so many documents; a fifth more are held out."""
    return MemoryStore(
        {
            name: {
                "train": MemorySplit({"targets": documents(size, salt)}),
                "validation": MemorySplit(
                    {"targets": documents(1 + size // 5, salt + 50)}
                ),
            }
            for salt, (name, size) in enumerate(sizes.items())
        }
    )


def pair_store(**sizes: int) -> MemoryStore:
    """Tasks of pairs by name, likewise."""

    def pairs(size: int, salt: int) -> MemorySplit:
        return MemorySplit(
            {
                "inputs": documents(size, salt + 100, longest=30),
                "targets": documents(size, salt + 200, longest=14),
            }
        )

    return MemoryStore(
        {
            name: {
                "train": pairs(size, salt),
                "validation": pairs(1 + size // 5, salt + 50),
            }
            for salt, (name, size) in enumerate(sizes.items())
        }
    )


def settings(objective: str = "causal_lm", **changes) -> DataSettings:
    """Settings with rows of 32 tokens, or that many inputs and suitable targets."""
    lengths = {
        "span_corruption": {"inputs": 32, "targets": 10},
        "ul2": {"inputs": 32, "targets": 24},
        "seq2seq": {"inputs": 20, "targets": 9},
    }
    values = {
        "mixture_or_task_name": "made_up",
        "mixture_or_task_module": "made_up",
        "task_feature_lengths": lengths.get(objective, {"targets": 32}),
        "store_dir": "",
        "objective": objective,
        "extra_ids": EXTRA_IDS,
        **changes,
    }
    return DataSettings(**values)
