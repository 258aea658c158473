"""What a SeqIO Task makes of a model's outputs: its own metric functions.

The meaning is that of `seqio.Evaluator`: what the model predicts is decoded, given to
the Task's `postprocess_fn` beside the example that it belongs to, and all of it to each
metric function. The Evaluator itself is not used, since it knows no vocabulary but the
Task's. SeqIO and TensorFlow are imported when `load` is called.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from tasks import seqio_tasks
from tasks.errors import StoreError
from tasks.settings import DataSettings
from tasks.store import Split, TokenStore
from tasks.vocabularies import Vocabulary

_BYTES_END = 1  # the end of a sequence in SeqIO's byte vocabulary


@dataclasses.dataclass(frozen=True)
class ScoredTask:
    """The held-out examples of a Task that has metrics, in stored order.

    Attributes:
        name: key of the Task in SeqIO's registry.
        task: the SeqIO Task; its ids are bytes if `reads_bytes`.
        reads_bytes: whether ids are handed to it as those of SeqIO's byte vocabulary,
            from which it gets the text back exactly; else they are its own.
        vocabulary: mapping between the ids below and text.
        examples: what the Task's preprocessors give, for `postprocess_fn`.
        inputs: tokens of each example, the end among them unless it was cut off.
        targets: likewise.
        texts: inputs and targets of each example, uncut.
        notes: what is left out, in words.
    """

    name: str
    task: Any = dataclasses.field(repr=False)
    reads_bytes: bool
    vocabulary: Vocabulary
    examples: Sequence[dict[str, Any]] = dataclasses.field(repr=False)
    inputs: Sequence[np.ndarray] = dataclasses.field(repr=False)
    targets: Sequence[np.ndarray] = dataclasses.field(repr=False)
    texts: Sequence[tuple[str, str]] = dataclasses.field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def predicts(self) -> bool:
        """Whether a metric asks for predictions; the others ask for scores."""
        return any(_wants(metric) == "PREDICTION" for metric in self._metrics)

    def metrics(
        self, predicted: Sequence[Sequence[int]] | None, score_N: np.ndarray
    ) -> dict[str, float | None]:
        """Runs every metric function of the Task.

        Args:
            predicted: ids that the model drew for each example, without an end; may be
                None if nothing `predicts`.
            score_N: log-likelihood of the targets of each example, in nats.
        Returns:
            Each number by the name that the Task gives it; None for what is no number
            (text, images, histograms).
        Raises:
            StoreError: a metric function raised, or two gave the same name.
        """
        outputs = {"SCORE": np.asarray(score_N)}
        if predicted is not None:
            outputs["PREDICTION"] = self._as_model_output(predicted)
        found: dict[str, float | None] = {}
        with seqio_tasks.explained(f"a metric of task {self.name!r}"):
            for metric in self._metrics:
                for name, value in self._run(metric, outputs[_wants(metric)]).items():
                    if name in found:
                        raise StoreError(
                            f"task {self.name!r} has two metrics {name!r}: give them "
                            "names of their own"
                        )
                    found[name] = _number(value)
        return found

    def records(
        self, predicted: Sequence[Sequence[int]] | None, score_N: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        """Yields what was predicted for each example, ready for JSON."""
        for index, (inputs, targets) in enumerate(self.texts):
            record: dict[str, Any] = {"index": index}
            name = self.examples[index].get("name")
            if isinstance(name, bytes):
                record["name"] = name.decode(errors="replace")
            record |= {"inputs": inputs, "target": targets}
            if predicted is not None:
                record["prediction"] = self.vocabulary.decode(predicted[index])
            yield record | {"score": float(score_N[index])}

    @property
    def _metrics(self) -> list[Any]:
        """Those whose outputs we have."""
        known = ("PREDICTION", "SCORE")
        return [m for m in self.task.metric_objs if _wants(m) in known]

    def _run(self, metric: Any, output_N: np.ndarray) -> dict[str, Any]:
        """As `seqio.Evaluator` calls a metric object, or a function made into one."""
        from seqio import metrics

        about = (self.examples, output_N, self.task.output_features, "targets")
        kind = metric if isinstance(metric, type) else type(metric)
        if not issubclass(kind, metrics.CollectingMetric):
            return metric.from_model_output(*about).compute()
        everything = np.ones(len(self.examples), np.int32)
        order_N2 = np.stack([0 * everything, np.arange(len(self.examples))], axis=1)
        collected = metric.from_model_output(
            *about, mask=everything, indices_2d=order_N2
        )
        return collected.actual_compute(
            self.examples, self.task.output_features, "targets"
        )[0]

    def _as_model_output(self, predicted: Sequence[Sequence[int]]) -> np.ndarray:
        """Rows of ids of the Task's vocabulary, each ended and padded with 0."""
        end = self.vocabulary.eos_id
        if self.reads_bytes:
            texts = [self.vocabulary.decode(ids).encode() for ids in predicted]
            predicted = [[byte + 3 for byte in text] for text in texts]
            end = _BYTES_END
        longest = max(map(len, predicted), default=0)
        ids_NL = np.zeros((len(predicted), longest + 1), np.int32)
        for ids_L, ids in zip(ids_NL, predicted, strict=True):
            ids_L[: len(ids) + 1] = [*ids, end]
        return ids_NL


def load(
    store: TokenStore, data: DataSettings, allowed_modules: tuple[str, ...] = ()
) -> list[ScoredTask]:
    """Reads the held-out examples of all Tasks that have metrics.

    Tokens are those of the store; only what `postprocess_fn` is told comes from
    running the Task.

    Args:
        store: the prepared tokens.
        data: names the Tasks, their split and the lengths that examples are cut to.
        allowed_modules: modules outside `tasks` that may be imported.
    Raises:
        StoreError: a Task cannot be run, or gives other examples than the store holds.
    """
    seqio = seqio_tasks.import_seqio()
    found = seqio_tasks.find(data, allowed_modules).tasks
    return [
        _load(seqio, found[name], store, data)
        for name in store.tasks
        if found[name].metric_objs
    ]


def _load(seqio: Any, task: Any, store: TokenStore, data: DataSettings) -> ScoredTask:
    part = store.split(task.name, data.heldout_split)
    if part.features != seqio_tasks.PAIRS:
        note = f"task {task.name!r} has no inputs to predict its targets from"
        return _without_examples(task, store, note)
    reads_bytes = data.vocabulary != "task"
    if reads_bytes:
        task = seqio_tasks.reading_bytes(seqio, task)
    inputs, targets = (_documents(part, feature) for feature in seqio_tasks.PAIRS)
    kept = _kept(seqio, task, data, store.vocabulary)
    examples = list(_matched(kept, targets, task.name, data.heldout_split))
    decode = store.vocabulary.decode
    lengths = data.task_feature_lengths
    notes = [
        f"a metric of task {task.name!r} asks for {_wants(metric).lower()}, which is "
        "not computed"
        for metric in task.metric_objs
        if _wants(metric) not in ("PREDICTION", "SCORE")
    ]
    return ScoredTask(
        name=task.name,
        task=task,
        reads_bytes=reads_bytes,
        vocabulary=store.vocabulary,
        examples=examples,
        inputs=[ids[: lengths["inputs"]] for ids in inputs],
        targets=[ids[: lengths["targets"]] for ids in targets],
        texts=[(decode(i), decode(t)) for i, t in zip(inputs, targets, strict=True)],
        notes=tuple(notes),
    )


def _without_examples(task: Any, store: TokenStore, note: str) -> ScoredTask:
    return ScoredTask(task.name, task, True, store.vocabulary, [], [], [], [], (note,))


def _documents(part: Split, feature: str) -> list[np.ndarray]:
    """All documents of a feature."""
    offsets = part.offsets(feature)
    return part.read(feature, offsets[:-1], offsets[1:])


def _kept(
    seqio: Any, task: Any, data: DataSettings, vocabulary: Vocabulary
) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Runs a Task; yields the examples that `prepare` stores, with their targets."""
    encode = _encoder(data, vocabulary)
    names = seqio_tasks.shards(task, data.heldout_split)
    for shard in range(len(names)):
        for example in seqio_tasks.examples(
            seqio, task, data.heldout_split, shard, len(names)
        ):
            ids = encode(example)
            if ids:  # what is empty is not stored
                yield {k: _valid(k, value) for k, value in example.items()}, ids


def _encoder(
    data: DataSettings, vocabulary: Vocabulary
) -> Callable[[dict[str, Any]], list[int]]:
    """Returns what gives the stored targets of an example; none if it is left out."""

    def own(example: dict[str, Any]) -> list[int]:
        texts = [
            example.get(f"{feature}_pretokenized") for feature in seqio_tasks.PAIRS
        ]
        if not all(_is_utf8(text) for text in texts if isinstance(text, bytes)):
            return []
        ids = example["targets"].tolist()
        return ids[:-1] if ids and ids[-1] == vocabulary.eos_id else ids

    def from_bytes(example: dict[str, Any]) -> list[int]:
        texts = {
            feature: seqio_tasks.as_bytes(example[feature], "an example")
            for feature in seqio_tasks.PAIRS
        }
        if data.bad_utf8 == "drop" and not all(map(_is_utf8, texts.values())):
            return []
        return vocabulary.encode(texts["targets"].decode(errors="replace"))

    return own if data.vocabulary == "task" else from_bytes


def _matched(
    kept: Iterator[tuple[dict[str, Any], list[int]]],
    targets: Sequence[np.ndarray],
    task: str,
    split: str,
) -> Iterator[dict[str, Any]]:
    """Yields examples that are, one by one, those of the store."""
    again = (
        "its source or its code has changed since the store was prepared. Prepare it "
        "again: switchyard prepare --force --gin_file=..."
    )
    number = 0
    for number, (example, ids) in enumerate(kept, start=1):
        if number > len(targets) or ids != targets[number - 1][:-1].tolist():
            raise StoreError(
                f"example {number - 1:,} in split {split!r} of task {task!r} is not "
                f"the one in the store: {again}"
            )
        yield example
    if number < len(targets):
        raise StoreError(
            f"split {split!r} of task {task!r} has {number:,} examples, and the store "
            f"{len(targets):,}: {again}"
        )


def _valid(name: str, value: Any) -> Any:
    """Text that SeqIO decodes strictly, without what is not UTF-8."""
    if name.endswith("_pretokenized") and isinstance(value, bytes):
        return value.decode(errors="replace").encode()
    return value


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _wants(metric: Any) -> str:
    """Which output of a model a metric is about."""
    return metric.model_output_type.name


def _number(value: Any) -> float | None:
    """The number of a metric, of SeqIO's `Scalar` too; None if it is none."""
    try:
        return float(getattr(value, "value", value))
    except (TypeError, ValueError):
        return None
