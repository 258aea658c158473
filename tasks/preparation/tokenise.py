"""A worker's job: the documents of a unit, filtered and tokenised, into parts."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tasks import files, vocabularies
from tasks.errors import StoreError
from tasks.preparation import documents, parts
from tasks.preparation.documents import Document
from tasks.preparation.plan import Plan, Unit
from tasks.store import split_path
from tasks.vocabularies import Vocabulary

KEEP, EXACT, NEAR = 0, 1, 2  # what was decided about possible duplicates
_REASONS = {EXACT: "exact_duplicates", NEAR: "near_duplicates"}
_BATCH_BYTES = 1 << 20  # of text that is filtered and tokenised together
_DOCUMENT_BYTES = 200  # what one takes beside its text


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much was done.

    Attributes:
        documents: read.
        tokens: made of their targets.
        text_bytes: size of their targets in UTF-8; before tokenising, of all features.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        """Adds up two amounts."""
        return Amount(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
        )


Report = Callable[[Amount], None]


def tokenise(work: str, plan: Plan, task: Any, unit: Unit, report: Report) -> None:
    """Writes those parts of a unit that are not there yet.

    Args:
        work: folder of the preparation, with vocabulary and filters in it.
        plan: description of the preparation.
        task: the SeqIO Task.
        unit: what to do.
        report: told of what was done since it was last told; those parts that were
            there already are told at once.
    """
    done = parts.finished(work, unit)
    for old in done:
        report(Amount(old.documents, old.tokens["targets"], old.text_bytes))
    if done and done[-1].last:
        return
    skip = done[-1].consumed if done else 0
    vocabulary = read_vocabulary(work)
    decide = _decider(work, plan, unit)

    def writer(number: int) -> parts.PartWriter:
        return parts.PartWriter(
            work,
            unit,
            number,
            types={f: type_of(f, vocabulary) for f in plan.features[unit.task]},
            size=vocabulary.size,
        )

    part, number, consumed = writer(len(done)), len(done), skip
    found = documents.read(task, unit.split, unit.shard, plan.data, skip=skip)
    read_bytes = 0
    for batch in _batches(found, min(_BATCH_BYTES, plan.part_bytes)):
        before = Amount(0, part.tokens, part.text_bytes)
        reasons = decide(batch)
        for document, reason in zip(batch, reasons, strict=True):
            _add(part, document, reason, vocabulary)
        consumed += len(batch)
        report(
            Amount(
                len(batch),
                part.tokens - before.tokens,
                part.text_bytes - before.text_bytes,
            )
        )
        # Inputs and what is left out count too: an interruption costs them as well.
        read_bytes += sum(map(_size, batch))
        if max(part.text_bytes, read_bytes) >= plan.part_bytes:
            part.close(consumed, last=False)
            number += 1
            part, read_bytes = writer(number), 0
    part.close(consumed, last=True)


def read_vocabulary(work: str) -> Vocabulary:
    """Returns the vocabulary of a preparation."""
    return vocabularies.from_files(
        lambda name: files.read(files.join(work, name)), work
    )


def token_type(vocabulary: Vocabulary) -> np.dtype:
    """Returns the smallest type of integer that holds every id."""
    return np.min_scalar_type(vocabulary.size - 1)


def type_of(feature: str, vocabulary: Vocabulary) -> np.dtype:
    """Returns the type of a feature's numbers: tokens, or pixels of images."""
    return np.dtype(np.uint8) if feature == "images" else token_type(vocabulary)


def digest(document: Document) -> bytes:
    """Returns 16 bytes that stand for a document."""
    hashed = hashlib.blake2b(digest_size=16)
    for feature in sorted(document.text):
        text = document.text[feature].encode()
        hashed.update(len(text).to_bytes(8, "little") + text)
    hashed.update(document.image)
    return hashed.digest()


def decisions_path(work: str, unit: Unit) -> str:
    """Returns where it is kept which documents of a unit are duplicates."""
    folder = split_path(files.join(work, "duplicates"), unit.task, unit.split)
    return files.join(folder, f"{unit.shard:06}")


def classifier_path(work: str) -> str:
    """Returns where the classifier of quality is kept."""
    return files.join(work, "classifier")


def _add(
    part: parts.PartWriter, document: Document, reason: str, vocabulary: Vocabulary
) -> None:
    """Adds a document to a part, or counts why not."""
    if reason:
        part.remove(reason)
        return
    ids: dict[str, Sequence[int] | np.ndarray]
    if document.ids:
        _refuse_strange_ids(document, vocabulary)
        ids = {f: _without_end(i, vocabulary.eos_id) for f, i in document.ids.items()}
    else:
        ids = {f: vocabulary.encode(text) for f, text in document.text.items()}
    if len(ids["targets"]) == 0:
        part.remove("empty")
        return
    if document.text:
        text_bytes = len(document.text["targets"].encode())
    else:
        text_bytes = len(vocabulary.decode(ids["targets"]).encode())
    part.replaced += document.fault == "replaced"
    ended = {f: _with_end(i, vocabulary) for f, i in ids.items()}
    if document.image:
        ended["images"] = np.frombuffer(document.image, np.uint8)
    part.add(ended, text_bytes, document.language)


def _refuse_strange_ids(document: Document, vocabulary: Vocabulary) -> None:
    """Ids that a Task makes by itself need not be those of its vocabulary."""
    for feature, ids in document.ids.items():
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary.size:
            raise StoreError(
                f"document {document.name}: its {feature!r} have ids from {ids.min()} "
                f"to {ids.max()}, but VOCABULARY = 'task' found a vocabulary of "
                f"{vocabulary.size:,}: give the Task's feature the vocabulary that it "
                "tokenises with"
            )


def _decider(
    work: str, plan: Plan, unit: Unit
) -> Callable[[Sequence[Document]], list[str]]:
    """Returns what says why each document of a batch is left out, or ""."""
    filters, classifier, flags = plan.filters, None, None
    if unit.split == plan.data.train_split:
        if filters.duplicates != "keep":
            flags = files.read(decisions_path(work, unit))
        if filters.quality_task:
            from tasks.quality import classifier as quality  # imports scikit-learn

            content = files.read(classifier_path(work))
            assert content is not None, "it was trained before"
            classifier = quality.Classifier.from_bytes(content)

    def decide(batch: Sequence[Document]) -> list[str]:
        reasons = ["bad_utf8" if d.fault == "bad_utf8" else "" for d in batch]
        if flags is not None:
            for place, document in enumerate(batch):
                reasons[place] = reasons[place] or _REASONS.get(
                    flags[document.number], ""
                )
        if classifier is not None:
            scores = classifier.score([d.text["targets"] for d in batch])
            for place, (document, score) in enumerate(zip(batch, scores, strict=True)):
                if not reasons[place] and not quality.keep(
                    float(score), digest(document), filters.quality_pareto, 0
                ):
                    reasons[place] = "low_quality"
        return reasons

    return decide


def _batches(found: Iterator[Document], batch_bytes: int) -> Iterator[list[Document]]:
    """Cuts documents into batches; where depends on the documents alone."""
    batch: list[Document] = []
    size = 0
    for document in found:
        batch.append(document)
        size += _size(document)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(document: Document) -> int:
    """About how much memory a document takes."""
    contents = (document.text or document.ids).values()
    return _DOCUMENT_BYTES + sum(map(len, contents)) + len(document.image)


def _with_end(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    ended = np.empty(len(ids) + 1, token_type(vocabulary))
    ended[:-1], ended[-1] = ids, vocabulary.eos_id
    return ended


def _without_end(ids: np.ndarray, eos_id: int) -> np.ndarray:
    return ids[:-1] if len(ids) and ids[-1] == eos_id else ids
