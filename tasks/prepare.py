"""Runs a SeqIO Task once and keeps its tokens, so that training never runs it.

The Task decides what is learnt: its source and its preprocessors. The settings decide
how text becomes tokens: the Task is run with SeqIO's byte vocabulary, from which the
text comes back exactly, and the vocabulary of the settings is applied to that text.
With vocabulary "task" the Task's own tokens are kept. TensorFlow is imported when
`prepare` is called, and kept away from accelerators.
"""

import contextlib
import dataclasses
import difflib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks import settings, vocabularies
from tasks.baselines import baselines
from tasks.errors import StoreError
from tasks.folders import appearing
from tasks.manifest import Manifest, SplitManifest, vocabulary_kind, write_manifest
from tasks.quiet import quiet_stderr
from tasks.settings import DataSettings
from tasks.split_writer import SplitWriter
from tasks.train_vocabulary import train_sentencepiece
from tasks.vocabularies import Vocabulary

_REPORT_SECONDS = 0.5
_FEATURE = "targets"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a preparation has come.

    Attributes:
        phase: "SeqIO", "vocabulary", the name of a split, or "baselines".
        documents: of this phase so far.
        tokens: of this phase so far.
        text_bytes: of this phase so far.
    """

    phase: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, ready to be stored.

    Attributes:
        ids: its tokens, without an end.
        text: what they stand for.
        replaced: it was not UTF-8.
    """

    ids: Sequence[int] | np.ndarray
    text: str
    replaced: bool = False


Report = Callable[[Progress], None]


def prepare(
    data: DataSettings,
    report: Report | None = None,
    *,
    allowed_modules: tuple[str, ...] = (),
) -> Manifest:
    """Writes the token store that the settings describe and returns its manifest.

    The store appears whole at the end, and replaces an older one only then. Preparing
    twice gives the same bytes.

    Args:
        data: the settings.
        report: called about twice a second, and at the end of each phase.
        allowed_modules: modules outside `tasks` that may be imported.
    Raises:
        StoreError: the settings, the Task or a document keep the store from being
            made.
    """
    if faults := settings.problems(data):
        raise StoreError("; ".join(faults))
    reporter = _Reporter(report)
    reporter.now(Progress("SeqIO"))  # takes seconds to import
    seqio = _import_seqio()
    task = _task(seqio, data, allowed_modules)
    with appearing(Path(data.store_dir)) as folder:
        vocabulary = _vocabulary(seqio, task, data, reporter)
        vocabularies.save(vocabulary, folder)
        writers, splits = {}, {}
        for split in (data.train_split, data.heldout_split):
            writers[split] = SplitWriter(folder / split, vocabulary)
            documents = _documents(seqio, task, split, data, vocabulary)
            splits[split] = _fill(writers[split], documents, split, data, reporter)
        reporter.now(Progress("baselines"))
        heldout = writers[data.heldout_split]
        manifest = Manifest(
            task=data.mixture_or_task_name,
            vocabulary=vocabulary_kind(data.vocabulary),
            vocabulary_size=vocabulary.size,
            vocabulary_fingerprint=vocabulary.fingerprint,
            train_split=data.train_split,
            heldout_split=data.heldout_split,
            splits=splits,
            baselines=baselines(
                writers[data.train_split].counts_V,
                heldout.counts_V,
                heldout.text_bytes,
                heldout.first_text,
            ),
        )
        write_manifest(manifest, folder)
    return manifest


def _fill(
    writer: SplitWriter,
    documents: Iterator[Document],
    split: str,
    data: DataSettings,
    reporter: "_Reporter",
) -> SplitManifest:
    """Writes the documents of one split."""

    def progress() -> Progress:
        return Progress(split, writer.documents, writer.tokens, writer.text_bytes)

    empty = replaced = 0
    for document in documents:
        if len(document.ids) == 0:
            empty += 1
            continue
        replaced += document.replaced
        writer.add(document.ids, document.text.encode())
        reporter.often(progress())
    if writer.text_bytes == 0:
        raise StoreError(
            f"split {split!r} of task {data.mixture_or_task_name!r} holds no text "
            f"({empty:,} empty documents): there is nothing to learn from"
        )
    reporter.now(progress())
    return writer.close(data.length, empty_documents=empty, replaced_documents=replaced)


class _Reporter:
    """Passes progress on, not too often."""

    def __init__(self, report: Report | None):
        self.now = report or (lambda progress: None)
        self._due = time.monotonic() + _REPORT_SECONDS

    def often(self, progress: Progress) -> None:
        if time.monotonic() >= self._due:
            self.now(progress)
            self._due = time.monotonic() + _REPORT_SECONDS


def _import_seqio() -> Any:
    """Imports SeqIO, with TensorFlow silent and away from accelerators."""
    variable = "TF_CPP_MIN_LOG_LEVEL"
    before = os.environ.get(variable)
    os.environ.setdefault(variable, "3")
    try:
        with quiet_stderr():
            import seqio
            import tensorflow as tf

            # Looks for accelerators, loudly. Refused where somebody has used
            # TensorFlow in this process already.
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices([], "GPU")
    except ImportError as error:
        raise StoreError(
            f"preparing tokens needs SeqIO and TensorFlow ({error}): install them with "
            "pip install 'switchyard[data]', or prepare on another machine and copy "
            "STORE_DIR here"
        ) from None
    finally:
        if before is None:
            del os.environ[variable]
    return seqio


def _task(seqio: Any, data: DataSettings, allowed_modules: tuple[str, ...]) -> Any:
    """Finds the Task and checks that it has what the settings ask for."""
    _import_task_module(data.mixture_or_task_module, allowed_modules)
    name = data.mixture_or_task_name
    known = sorted(seqio.TaskRegistry.names())
    if name in seqio.MixtureRegistry.names():
        raise StoreError(
            f"MIXTURE_OR_TASK_NAME = {name!r} is a Mixture: a store is made of one Task"
        )
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or known[:10]
        raise StoreError(
            f"MIXTURE_OR_TASK_NAME = {name!r} is not registered by "
            f"MIXTURE_OR_TASK_MODULE = {data.mixture_or_task_module!r}: "
            f"nearest are {', '.join(map(repr, near)) or 'none at all'}"
        )
    task = seqio.TaskRegistry.get(name)
    if set(task.output_features) != {_FEATURE}:
        raise StoreError(
            f"task {name!r} has the features {sorted(task.output_features)}, but a "
            f"language model has one, {_FEATURE!r}: rename or join them in the Task"
        )
    for macro, split in (
        ("TRAIN_SPLIT", data.train_split),
        ("HELDOUT_SPLIT", data.heldout_split),
    ):
        if split not in task.splits:
            names = ", ".join(map(repr, task.splits))
            raise StoreError(
                f"{macro} = {split!r} is not a split of task {name!r}: it has {names}"
            )
    return task


def _import_task_module(module: str, allowed_modules: tuple[str, ...]) -> None:
    """Imports a module that is ours or was allowed by name: importing runs code."""
    if not module.startswith("tasks.") and module not in allowed_modules:
        raise StoreError(
            f"MIXTURE_OR_TASK_MODULE = {module!r} is not one of Switchyard's own, and "
            "importing it runs its code: if you trust it, add --allow_module to the "
            "command"
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise StoreError(
            f"MIXTURE_OR_TASK_MODULE = {module!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _vocabulary(
    seqio: Any, task: Any, data: DataSettings, reporter: _Reporter
) -> Vocabulary:
    """Makes the vocabulary of the settings, training it if that is asked for."""
    if data.vocabulary == "bytes":
        return vocabularies.ByteVocabulary()
    if data.vocabulary == "task":
        return _vocabulary_of_task(seqio, task)
    if data.vocabulary != "sentencepiece":
        return vocabularies.sentencepiece_model(data.vocabulary)

    def texts() -> Iterator[str]:
        text_bytes = 0
        corpus = _texts(seqio, task, data.train_split, data.bad_utf8)
        for number, (text, _) in enumerate(corpus):
            text_bytes += len(text.encode())
            reporter.often(Progress("vocabulary", number + 1, 0, text_bytes))
            yield text

    return train_sentencepiece(texts(), data.vocabulary_size)


def _vocabulary_of_task(seqio: Any, task: Any) -> Vocabulary:
    """Our counterpart of the vocabulary that the Task tokenises with."""
    theirs = task.output_features[_FEATURE].vocabulary
    if type(theirs) is seqio.ByteVocabulary:
        return vocabularies.ByteVocabulary(theirs.extra_ids)
    if type(theirs) is seqio.SentencePieceVocabulary:
        return vocabularies.sentencepiece_model(
            theirs.sentencepiece_model_file, theirs.extra_ids
        )
    raise StoreError(
        f"VOCABULARY = 'task': task {task.name!r} uses a {type(theirs).__name__}, but "
        "a store keeps a seqio.ByteVocabulary or a seqio.SentencePieceVocabulary"
    )


def _documents(
    seqio: Any, task: Any, split: str, data: DataSettings, vocabulary: Vocabulary
) -> Iterator[Document]:
    """Yields the documents of a split, as tokens of `vocabulary`."""
    if data.vocabulary == "task":
        for _, ids in _examples(task, split):
            ids = _without_end(ids, vocabulary.eos_id)
            yield Document(ids, vocabulary.decode(ids))
    else:
        for text, replaced in _texts(seqio, task, split, data.bad_utf8):
            yield Document(vocabulary.encode(text), text, replaced)


def _texts(
    seqio: Any, task: Any, split: str, bad_utf8: str
) -> Iterator[tuple[str, bool]]:
    """Yields the text of each document, and whether it was not UTF-8."""
    alphabet = seqio.ByteVocabulary()
    feature = dataclasses.replace(task.output_features[_FEATURE], vocabulary=alphabet)
    for name, ids in _examples(
        task.replace(output_features={_FEATURE: feature}), split
    ):
        where = f"document {name} in split {split!r} of task {task.name!r}"
        ids = _without_end(ids, alphabet.eos_id)
        if len(ids) and not 3 <= ids.min() <= ids.max() < alphabet.vocab_size:
            raise StoreError(
                f"{where} is not plain text: its ids reach from {ids.min()} to "
                f"{ids.max()}, so the Task tokenises by itself. Set VOCABULARY = "
                "'task' to keep its tokens"
            )
        raw = (ids - 3).astype(np.uint8).tobytes()
        try:
            yield raw.decode(), False
        except UnicodeDecodeError as error:
            if bad_utf8 == "error":
                raise StoreError(
                    f"{where} is not UTF-8 at byte {error.start:,} "
                    f"(0x{raw[error.start]:02x}): repair it, or set BAD_UTF8 = "
                    "'replace' to substitute U+FFFD and count such documents"
                ) from None
            yield raw.decode(errors="replace"), True


def _examples(task: Any, split: str) -> Iterator[tuple[str, np.ndarray]]:
    """Runs the Task over one split, in its order; yields names and ids."""
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        num_epochs=1,
        seed=0,
        try_in_mem_cache=False,
    )
    try:
        for number, example in enumerate(dataset.as_numpy_iterator()):
            name = example.get("name")
            named = isinstance(name, bytes)
            yield repr(name.decode()) if named else f"{number:,}", example[_FEATURE]
    except Exception as error:  # whatever the Task's own code raises
        raise StoreError(
            f"task {task.name!r} failed in split {split!r}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def _without_end(ids: np.ndarray, eos_id: int) -> np.ndarray:
    return ids[:-1] if len(ids) and ids[-1] == eos_id else ids
