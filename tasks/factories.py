"""Makes SeqIO Tasks, each with one call, from files, generators or TFDS names.

A module of your own that holds such calls is named by MIXTURE_OR_TASK_MODULE, and one
of its Tasks by MIXTURE_OR_TASK_NAME:

    from tasks import factories

    # Every .txt file below a folder is one document.
    factories.add_text_files("novels", {"train": "novels/**/*.txt",
                                        "validation": "held_out/*.txt"})

    # Every line; or all that stands between blank lines (add_text_blocks).
    factories.add_text_lines("headlines", {"train": "lines-*.txt",
                                           "validation": "last.txt"}, language="en")

    # JSON lines, also .gz and .zst, here or in a bucket.
    factories.add_json_lines("web", {"train": "gs://bucket/web-*.jsonl.zst",
                                     "validation": "web-last.jsonl"},
                             text="content", language_field="meta.lang")

    # Questions and answers: the answers are learnt.
    factories.add_parquet("quiz", {"train": "quiz/train-*.parquet",
                                   "validation": "quiz/test.parquet"},
                          inputs="question", targets="answer")

    # Whatever Python yields: pairs of a name and some bytes.
    factories.add_documents("squares", {
        "train": lambda: ((f"{n}", b"%d" % n**2) for n in range(1000)),
        "validation": lambda: [("1000", b"1000000")]})

A Mixture is SeqIO's: `seqio.MixtureRegistry.add("both", [("novels", 2), ("web", 1)])`.
Nothing is read before tokens are made. Importing this file imports TensorFlow.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from tasks import examples, records, sources
from tasks.errors import StoreError
from tasks.records import Fields
from tasks.seqio_sources import DocumentSource, SourceShard, TfdsSource
from tasks.seqio_tasks import CAPTIONS, PAIRS, TEXT
from tasks.sources import Document, Pattern

Files = Mapping[str, Pattern]
# Yields documents, or names and texts.
Generator = Callable[[], Iterable[Document | tuple[str, bytes | str]]]


def add_text_files(
    name: str, files: Files, *, language: str = "", **task: Any
) -> seqio.Task:
    """Registers a Task whose documents are whole files.

    Args:
        name: key of the Task in SeqIO's registry; each can be registered once.
        files: for each split a path, local or `gs://`, in which `*`, `?`, `[...]` and
            (locally) `**` match; or several. Files are read in the order of their
            names. Those that end in `.gz` and `.zst` are decompressed.
        language: that all documents are in.
        **task: as in `add_task`.
    """
    return _add_text(
        name, files, sources.groups_of_files, sources.read_files, language, task
    )


def add_text_lines(
    name: str, files: Files, *, language: str = "", **task: Any
) -> seqio.Task:
    """Registers a Task whose documents are lines. Arguments: see `add_text_files`."""
    return _add_text(
        name, files, sources.byte_ranges, sources.read_lines, language, task
    )


def add_text_blocks(
    name: str, files: Files, *, language: str = "", **task: Any
) -> seqio.Task:
    """Registers a Task whose documents are separated by blank lines.

    Arguments: see `add_text_files`.
    """
    return _add_text(
        name, files, sources.byte_ranges, sources.read_blocks, language, task
    )


def add_json_lines(name: str, files: Files, **fields_and_task: Any) -> seqio.Task:
    """Registers a Task whose documents are JSON objects, one on each line.

    Args:
        name: key of the Task in SeqIO's registry.
        files: as in `add_text_files`.
        **fields_and_task: as in `add_records`.
    """
    return add_records(
        name, files, sources.byte_ranges, records.read_json_lines, **fields_and_task
    )


def add_parquet(name: str, files: Files, **fields_and_task: Any) -> seqio.Task:
    """Registers a Task of rows of Parquet files. Arguments: see `add_json_lines`."""
    return add_records(
        name, files, sources.byte_ranges, records.read_parquet, **fields_and_task
    )


def add_tf_examples(name: str, files: Files, **fields_and_task: Any) -> seqio.Task:
    """Registers a Task of tf.Examples in TFRecord files.

    Arguments: see `add_json_lines`.
    """
    return add_records(
        name, files, _one_file_each, examples.read_tf_records, **fields_and_task
    )


def add_array_records(name: str, files: Files, **fields_and_task: Any) -> seqio.Task:
    """Registers a Task of tf.Examples in ArrayRecord files.

    Arguments: see `add_json_lines`.
    """
    return add_records(
        name, files, _one_file_each, examples.read_array_records, **fields_and_task
    )


def add_documents(
    name: str,
    splits: Mapping[str, Generator | Sequence[Generator]],
    *,
    features: Sequence[str] = TEXT,
    **task: Any,
) -> seqio.Task:
    """Registers a Task whose documents Python functions yield.

    Args:
        name: key of the Task in SeqIO's registry.
        splits: for each split a function that yields documents, always the same in the
            same order: (name, text), or `tasks.sources.Document`. Several
            functions are several shards, that several processes may read.
        features: texts of each document: ("targets",) or ("inputs", "targets"); or
            ("images", "targets"), an image as the bytes of its pixels, row by row, and
            its text.
        **task: as in `add_task`.
    """

    def shards(split: str) -> list[SourceShard]:
        given = splits[split]
        if callable(given):
            return [SourceShard(split, functools.partial(_documents_of, given))]
        return [
            SourceShard(f"{split}/{i}", functools.partial(_documents_of, function))
            for i, function in enumerate(given)
        ]

    source = DocumentSource(
        {split: functools.partial(shards, split) for split in splits}, features
    )
    return add_task(name, source, features, **task)


def add_tfds(
    name: str,
    dataset: str,
    splits: Mapping[str, str],
    *,
    text: str = "text",
    inputs: str | None = None,
    targets: str | None = None,
    language: str = "",
    language_field: str = "",
    label: str = "",
    data_dir: str | None = None,
    preprocessors: Sequence[Callable] = (),
    **task: Any,
) -> seqio.Task:
    """Registers a Task of a dataset of TensorFlow Datasets that is on disk.

    Args:
        name: key of the Task in SeqIO's registry.
        dataset: its name, config and version, such as "c4/en:3.1.0".
        splits: for each split the dataset's, such as {"validation": "train[:1%]"}.
        text: as in `add_records`, with the fields that follow it.
        inputs: as in `add_records`.
        targets: as in `add_records`.
        language: as in `add_records`.
        language_field: as in `add_records`.
        label: as in `add_records`.
        data_dir: where it is; None is TFDS_DATA_DIR, or ~/tensorflow_datasets.
        preprocessors: come before the fields are looked for.
        **task: as in `add_task`.
    """
    fields = _fields(text, inputs, targets, language, language_field, label)
    return add_task(
        name,
        TfdsSource(dataset, splits, data_dir),
        tuple(fields.features),
        preprocessors=[*preprocessors, functools.partial(_renamed, fields=fields)],
        **task,
    )


def add_records(
    name: str,
    files: Files,
    cut: Callable[[Pattern], Sequence[sources.Shard]],
    read: Callable[..., Iterator[Document]],
    *,
    text: str = "text",
    inputs: str | None = None,
    targets: str | None = None,
    language: str = "",
    language_field: str = "",
    label: str = "",
    **task: Any,
) -> seqio.Task:
    """Registers a Task of records with fields.

    Args:
        name: key of the Task in SeqIO's registry.
        files: as in `add_text_files`.
        cut: returns the shards of a pattern.
        read: yields the documents of a shard; it is given `fields`.
        text: the field that is learnt, where nothing is given.
        inputs: the field that is given; then `targets` is learnt, and not `text`.
        targets: the field that is learnt.
        language: that all documents are in.
        language_field: the field that says the language.
        label: the field that says the label, for finding wrong ones.
        **task: as in `add_task`.
    """
    fields = _fields(text, inputs, targets, language, language_field, label)
    reader = functools.partial(read, fields=fields)
    features = tuple(fields.features)
    source = DocumentSource(_splits(files, cut, reader), features)
    return add_task(name, source, features, **task)


def add_task(
    name: str,
    source: seqio.DataSource,
    features: Sequence[str],
    *,
    vocabulary: seqio.Vocabulary | None = None,
    preprocessors: Sequence[Callable] = (),
    postprocess_fn: Callable | None = None,
    metric_fns: Sequence[Callable] = (),
) -> seqio.Task:
    """Registers a Task and returns it.

    Args:
        name: key of the Task in SeqIO's registry; each can be registered once.
        source: SeqIO data source whose examples have a text for each feature.
        features: ("targets",), ("inputs", "targets") or ("images", "targets").
        vocabulary: the Task's own; bytes unless given. `prepare` puts the vocabulary
            of the settings in its place unless that is "task".
        preprocessors: SeqIO's, of examples that are still text. They cost time: a Task
            without them is read without TensorFlow.
        postprocess_fn: SeqIO's, from the text that a model generated.
        metric_fns: SeqIO's.
    """
    if tuple(features) not in (TEXT, PAIRS, CAPTIONS):
        raise StoreError(
            f"features = {features}: must be {TEXT}, {PAIRS} or {CAPTIONS}"
        )
    feature = seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=False)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[*preprocessors, seqio.preprocessors.tokenize],
        output_features=dict.fromkeys(features, feature),
        postprocess_fn=postprocess_fn,
        metric_fns=list(metric_fns),
    )


def _add_text(
    name: str,
    files: Files,
    cut: Callable[[Pattern], Sequence[sources.Shard]],
    read: Callable[..., Iterator[Document]],
    language: str,
    task: Mapping[str, Any],
) -> seqio.Task:
    reader = functools.partial(read, language=language)
    source = DocumentSource(_splits(files, cut, reader), TEXT)
    return add_task(name, source, TEXT, **task)


def _splits(
    files: Files,
    cut: Callable[[Pattern], Sequence[sources.Shard]],
    read: Callable[[sources.Shard], Iterator[Document]],
) -> dict[str, Callable[[], list[SourceShard]]]:
    """For each split, what looks for its files."""

    def shards(pattern: Pattern) -> list[SourceShard]:
        return [
            SourceShard(str(shard), functools.partial(read, shard), shard.paths)
            for shard in cut(pattern)
        ]

    return {
        split: functools.partial(shards, pattern) for split, pattern in files.items()
    }


def _one_file_each(pattern: Pattern) -> tuple[sources.Shard, ...]:
    return sources.groups_of_files(pattern, 1)


def _fields(
    text: str,
    inputs: str | None,
    targets: str | None,
    language: str,
    language_field: str,
    label: str,
) -> Fields:
    features = {"targets": text}
    if inputs is not None and targets is not None:
        features = {"inputs": inputs, "targets": targets}
    elif inputs is not None or targets is not None:
        raise StoreError(
            f"inputs = {inputs!r} and targets = {targets!r}: give both, or neither and "
            "text"
        )
    return Fields(features, language, language_field, label)


def _documents_of(function: Generator) -> Iterator[Any]:
    found = function()
    if not isinstance(found, Iterable):
        raise TypeError(
            f"its function returned {type(found).__name__}, and must yield documents"
        )
    return iter(found)


def _renamed(dataset: tf.data.Dataset, fields: Fields) -> tf.data.Dataset:
    """Examples whose keys are those of a `DocumentSource`."""
    for name in fields.names:
        if fault := _fault(dataset.element_spec, name):
            raise ValueError(fault)

    def found(example: Mapping[str, Any], name: str) -> tf.Tensor:
        value: Any = example
        for part in [name] if name in example else name.split("."):
            value = value[part]
        return value if value.dtype == tf.string else tf.strings.as_string(value)

    def renamed(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
        texts = {key: found(example, name) for key, name in fields.features.items()}
        language = tf.constant(fields.language)
        if fields.language_field:
            language = found(example, fields.language_field)
        label = tf.constant("")
        if fields.label_field:
            label = found(example, fields.label_field)
        return {**texts, "language": language, "label": label}

    return dataset.map(renamed)


def _fault(specs: Any, name: str) -> str:
    """Why examples have no text, or no number, in a field; or ""."""
    value, outer = specs, []
    for part in [name] if name in specs else name.split("."):
        if not isinstance(value, Mapping):
            return records.no_fields(name, outer, "no table")
        if part not in value:
            return records.missing(name, value, outer)
        value = value[part]
        outer.append(part)
    if not isinstance(value, tf.TensorSpec) or value.shape.rank:
        return f"field {name!r} is no single text: it is {value}"
    return ""
