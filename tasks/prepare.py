"""Runs SeqIO Tasks once and keeps their tokens, so that training never runs them.

The Tasks decide what is learnt: their sources and preprocessors. The settings decide
how text becomes tokens, and which documents are left out. What is done is kept beside
the store as it grows, so that the same call goes on where another was killed, and the
store is the same however often that happened and whoever did the work.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tasks import files, masked_tokens, seqio_tasks, settings, vocabularies
from tasks.baselines import COMPRESSED_BYTES, baselines
from tasks.errors import StoreError
from tasks.manifest import (
    Manifest,
    SplitManifest,
    TaskManifest,
    vocabulary_kind,
    write_manifest,
)
from tasks.preparation import (
    assembly,
    folders,
    gathering,
    selection,
    sharing,
    stages,
    tokenise,
)
from tasks.preparation import plan as plans
from tasks.preparation.engines import Engine, WorkerLostError, in_this_process
from tasks.preparation.gathering import Gathered
from tasks.preparation.plan import PART_BYTES, Plan
from tasks.preparation.tokenise import Amount
from tasks.seqio_tasks import Found
from tasks.settings import DataSettings, FilterSettings
from tasks.store import Split, split_path, work_dir
from tasks.streams import note
from tasks.train_vocabulary import Statistics, train_vocabulary
from tasks.vocabularies import SentencePieceVocabulary, Vocabulary

_REPORT_SECONDS = 0.5
_PARTS_WORTH_KEEPING = 64  # a gigabyte of text
_LOSSY_SAMPLE = 200  # documents


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a preparation has come.

    Attributes:
        phase: "SeqIO", "vocabulary", "quality", "duplicates", "tokens", "store" or
            "baselines".
        documents: number of documents in this phase so far.
        tokens: number of tokens in this phase so far.
        text_bytes: bytes of text in this phase so far.
        expected_bytes: bytes of the whole phase, if the sources know; 0 if not.
    """

    phase: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    expected_bytes: int = 0


Report = Callable[[Progress], None]


def prepare(
    data: DataSettings,
    report: Report | None = None,
    *,
    filters: FilterSettings | None = None,
    allowed_modules: tuple[str, ...] = (),
    engine: Engine = in_this_process,
    force: bool = False,
    part_bytes: int = PART_BYTES,
) -> Manifest:
    """Writes the token store that the settings describe and returns its manifest.

    A preparation that was stopped is taken up again. A store that is there already
    stays until all documents are tokenised. Preparing twice gives the same bytes.

    Args:
        data: the settings.
        report: called about twice a second, and at the end of each phase.
        filters: which documents are left out; none by default.
        allowed_modules: modules outside `tasks` that may be imported.
        engine: who does the work.
        force: forget what an unfinished preparation has done.
        part_bytes: bytes of text that an interruption may cost.
    Raises:
        StoreError: the settings, a Task or a document keep the store from being made.
    """
    filters = filters or FilterSettings()
    if faults := settings.problems(data, filters=filters):
        raise StoreError("; ".join(faults))
    reporter = _Reporter(report)
    reporter.phase("SeqIO")  # takes seconds to import
    found = seqio_tasks.find(data, allowed_modules)
    plan = _plan(found, data, filters, allowed_modules, part_bytes)
    if shared := sharing.described(found, data, filters):
        note(shared)
    work = work_dir(data.store_dir)
    folders.refuse_what_is_no_store(data.store_dir, work)
    with folders.alone(work):
        if force:
            folders.abandon(work, data.store_dir)
        _begin(work, plan)
        try:
            _vocabulary(work, plan, found, reporter)
            _refuse_unsuited_vocabulary(work, data)
            if filters.quality_task:
                reporter.phase("quality")
            quality = selection.train_classifier(work, plan, found, reporter.add)
            if filters.duplicates != "keep":
                reporter.phase("duplicates")
            selection.find_duplicates(work, plan, engine, reporter.add)
            gathered = _tokenise(work, plan, engine, reporter)
            manifest = _assemble(work, plan, found, gathered, quality, engine, reporter)
        except WorkerLostError:
            raise
        except StoreError:
            # The user will change the sources or the settings, and then a preparation
            # begins anew; only what took long is kept until that is certain.
            with contextlib.suppress(StoreError):  # the first one is the cause
                done = [name for name in files.names(_parts(work)) if ".json" in name]
                if len(done) < _PARTS_WORTH_KEEPING:
                    folders.abandon(work, data.store_dir)
            raise
        write_manifest(manifest, data.store_dir)
        folders.forget(work)
    return manifest


def train_vocabulary_of(
    data: DataSettings,
    report: Report | None = None,
    *,
    allowed_modules: tuple[str, ...] = (),
) -> tuple[SentencePieceVocabulary, Statistics]:
    """Trains a vocabulary on the train splits that the settings name.

    Returns:
        The vocabulary, the same that `prepare` would train, and how well it fits.
    Raises:
        StoreError: the settings or a Task keep it from being trained.
    """
    reporter = _Reporter(report)
    reporter.phase("SeqIO")
    found = seqio_tasks.find(data, allowed_modules)
    plan = _plan(found, data, FilterSettings(), allowed_modules, PART_BYTES)
    return _train(plan, found, reporter)


def _train(
    plan: Plan, found: Found, reporter: "_Reporter"
) -> tuple[SentencePieceVocabulary, Statistics]:
    reporter.phase("vocabulary")
    data = plan.data
    trained = train_vocabulary(
        selection.sampled_texts(list(found.tasks.values()), plan, reporter.add),
        data.vocabulary_size,
        model_type=data.vocabulary_model,
        extra_ids=data.extra_ids,
    )
    reporter.end()
    return trained


class _Reporter:
    """Adds up and passes on progress, not too often."""

    def __init__(self, report: Report | None):
        self._report = report or (lambda progress: None)
        self._now = Progress("SeqIO")
        self._due = time.monotonic()

    def phase(self, name: str, expected_bytes: int = 0) -> None:
        """Begins a phase."""
        self._now = Progress(name, expected_bytes=expected_bytes)
        self._report(self._now)
        self._due = time.monotonic() + _REPORT_SECONDS

    def add(self, amount: Amount) -> None:
        """Adds what was done."""
        now = self._now
        self._now = dataclasses.replace(
            now,
            documents=now.documents + amount.documents,
            tokens=now.tokens + amount.tokens,
            text_bytes=now.text_bytes + amount.text_bytes,
        )
        if time.monotonic() >= self._due:
            self._report(self._now)
            self._due = time.monotonic() + _REPORT_SECONDS

    def end(self) -> None:
        """Reports the whole phase."""
        self._report(self._now)


def _plan(
    found: Found,
    data: DataSettings,
    filters: FilterSettings,
    allowed_modules: tuple[str, ...],
    part_bytes: int,
) -> Plan:
    shards = {
        name: {
            split: seqio_tasks.shards(task, split)
            for split in (data.train_split, data.heldout_split)
        }
        for name, task in found.tasks.items()
    }
    sources = [
        name
        for task, of_split in shards.items()
        for split in of_split
        for name in seqio_tasks.source_files(found.tasks[task], split)
    ]
    return Plan(
        data=data,
        filters=filters,
        allowed_modules=allowed_modules,
        shards=shards,
        rates=found.rates,
        features={n: seqio_tasks.features(task) for n, task in found.tasks.items()},
        state=plans.state_of([*sources, data.vocabulary]),
        part_bytes=part_bytes,
    )


def _begin(work: str, plan: Plan) -> None:
    """Writes the plan, or checks that it is the one that is being carried out."""
    before = plans.read(work)
    if before is None:
        folders.abandon(work, plan.data.store_dir)
    elif found := plans.differences(before, plan):
        raise StoreError(
            f"{work} is of an unfinished preparation of something else: "
            f"{'; '.join(found)}. Add --force to forget it, or set another STORE_DIR"
        )
    plans.write(plan, work)
    stages.forget()


def _vocabulary(work: str, plan: Plan, found: Found, reporter: _Reporter) -> None:
    """Keeps the vocabulary of the settings, training it if that is asked for."""
    if files.read(files.join(work, vocabularies.DESCRIPTION)) is not None:
        return
    data = plan.data
    if data.vocabulary == "bytes":
        vocabulary: Vocabulary = vocabularies.ByteVocabulary(data.extra_ids)
    elif data.vocabulary == "task":
        vocabulary = _vocabulary_of_tasks(found)
    elif data.vocabulary == "sentencepiece":
        vocabulary, _ = _train(plan, found, reporter)
    else:
        vocabulary = vocabularies.from_file(
            data.vocabulary, data.extra_ids, data.eos_token
        )
    _write_files(work, vocabularies.to_files(vocabulary))


def _refuse_unsuited_vocabulary(work: str, data: DataSettings) -> None:
    """Says what an objective lacks before hours are spent on tokens."""
    try:
        vocabulary = tokenise.read_vocabulary(work)
        if data.asks is not None:
            data.asks.make(data, vocabulary)
        masked_tokens.masking(data, vocabulary)
        vocabularies.start_id(vocabulary, data.start_token)
    except ValueError as error:
        raise StoreError(str(error)) from error


def _write_files(folder: str, contents: Mapping[str, bytes]) -> None:
    """Writes files, and last the one without which the others do not count."""
    for name in sorted(contents, key=lambda name: name == vocabularies.DESCRIPTION):
        files.write(files.join(folder, name), contents[name])


def _vocabulary_of_tasks(found: Found) -> Vocabulary:
    """Our counterpart of the vocabulary that the Tasks tokenise with."""
    seqio = seqio_tasks.import_seqio()
    kept: dict[str, tuple[Vocabulary, str]] = {}
    for name, task in found.tasks.items():
        for feature in task.output_features.values():
            theirs = feature.vocabulary
            if type(theirs) is seqio.ByteVocabulary:
                ours: Vocabulary = vocabularies.ByteVocabulary(theirs.extra_ids)
            elif type(theirs) is seqio.SentencePieceVocabulary:
                ours = vocabularies.from_file(
                    theirs.sentencepiece_model_file, theirs.extra_ids
                )
            else:
                raise StoreError(
                    f"VOCABULARY = 'task': task {name!r} uses a "
                    f"{type(theirs).__name__}, but a store keeps a "
                    "seqio.ByteVocabulary or a seqio.SentencePieceVocabulary"
                )
            kept.setdefault(ours.fingerprint, (ours, name))
    (vocabulary, first), *others = kept.values()
    if others:
        raise StoreError(
            f"VOCABULARY = 'task': tasks {first!r} and {others[0][1]!r} use different "
            "vocabularies, or inputs and targets do: a store has one"
        )
    return vocabulary


def _tokenise(
    work: str, plan: Plan, engine: Engine, reporter: _Reporter
) -> dict[tuple[str, str], Gathered]:
    """Tokenises every document into parts, and gathers those of each split."""
    gathered, vocabulary = {}, tokenise.read_vocabulary(work)
    reporter.phase("tokens", _expected_bytes(plan))
    # What is held out is little, and what is wrong with it is said before the rest.
    for split in (plan.data.heldout_split, plan.data.train_split):
        items = [dataclasses.asdict(unit) for unit in plan.units(split)]
        engine(work, stages.TOKENISE, items, reporter.add)
        for task in plan.shards:
            found = gathering.gather(work, plan, task, split)
            gathering.refuse_what_stands_for_no_text(
                work, found, vocabulary, plan.data.vocabulary
            )
            gathered[task, split] = found
    reporter.end()
    return gathered


def _expected_bytes(plan: Plan) -> int:
    """About how much text there is, if all of it is in plain files; else 0."""
    compressed = (".gz", ".zst", ".parquet")
    if not plan.state or any(name.endswith(compressed) for name in plan.state):
        return 0
    vocabulary = plan.data.vocabulary
    return sum(size for name, (size, _) in plan.state.items() if name != vocabulary)


def _assemble(
    work: str,
    plan: Plan,
    found: Found,
    gathered: Mapping[tuple[str, str], Gathered],
    quality: Mapping[str, Any],
    engine: Engine,
    reporter: _Reporter,
) -> Manifest:
    """Makes the store of the parts, in place of one that was there."""
    data, store_dir = plan.data, plan.data.store_dir
    reporter.phase("store")
    folders.begin_store(work, store_dir)
    vocabulary = tokenise.read_vocabulary(work)
    _write_files(store_dir, vocabularies.to_files(vocabulary))
    if (figure := files.read(selection.figure_path(work))) is not None:
        files.write(selection.figure_path(store_dir), figure)
    items = [
        dataclasses.asdict(job)
        for of_split in gathered.values()
        for job in assembly.jobs(of_split)
    ]
    engine(work, stages.ASSEMBLE, items, lambda amount: None)
    splits = {
        key: assembly.finish(work, store_dir, of_split)
        for key, of_split in gathered.items()
    }
    reporter.phase("baselines")
    return Manifest(
        name=data.mixture_or_task_name,
        vocabulary=vocabulary_kind(data.vocabulary),
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        extra_ids=vocabulary.extra_ids,
        train_split=data.train_split,
        heldout_split=data.heldout_split,
        tasks={
            task: TaskManifest(
                splits={split: splits[task, split] for split in of_split},
                rate=plan.rates[task],
                baselines=_baselines(work, data, task, gathered, splits, vocabulary),
            )
            for task, of_split in plan.shards.items()
        },
        filters=dataclasses.asdict(plan.filters),
        bad_utf8=data.bad_utf8,
        lossy_fraction=_lossy_fraction(plan, found, vocabulary),
        quality=quality,
    )


def _lossy_fraction(plan: Plan, found: Found, vocabulary: Vocabulary) -> float:
    """The part of sampled texts that do not come back from their tokens."""
    if plan.data.vocabulary in ("bytes", "task"):
        return 0.0
    tasks = list(found.tasks.values())
    texts = selection.sampled_texts(tasks, plan, lambda amount: None, _LOSSY_SAMPLE)
    lost = [vocabulary.decode(vocabulary.encode(text)) != text for text in texts]
    return sum(lost) / max(1, len(lost))


def _baselines(
    work: str,
    data: DataSettings,
    task: str,
    gathered: Mapping[tuple[str, str], Gathered],
    splits: Mapping[tuple[str, str], SplitManifest],
    vocabulary: Vocabulary,
) -> dict[str, float]:
    """What the held-out text of a Task costs without a network."""
    held = splits[task, data.heldout_split]
    split = Split(
        split_path(data.store_dir, task, data.heldout_split), held, vocabulary
    )
    offsets = split.offsets()
    texts: list[bytes] = []
    size, number = 0, 0
    while size < COMPRESSED_BYTES and number < held.documents:
        most = offsets[number] + COMPRESSED_BYTES  # tokens, of one byte or more
        stop = max(number + 1, int(np.searchsorted(offsets, most, side="right")) - 1)
        ids = split.read(
            "targets", offsets[number:stop], offsets[number + 1 : stop + 1]
        )
        texts += [vocabulary.decode(of_document).encode() for of_document in ids]
        size, number = sum(map(len, texts)), stop
    return baselines(
        assembly.counts(work, gathered[task, data.train_split]),
        assembly.counts(work, gathered[task, data.heldout_split]),
        held.text_bytes,
        b"".join(texts)[:COMPRESSED_BYTES],
    )


def _parts(work: str) -> str:
    return files.join(work, "parts")
