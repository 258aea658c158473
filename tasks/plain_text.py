"""Makes a SeqIO Task of plain documents: a few names, a few strings of bytes.

Importing this file imports TensorFlow.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import seqio
import tensorflow as tf

Documents = Callable[[], Iterable[tuple[str, bytes]]]


def add_plain_text_task(
    name: str,
    splits: Mapping[str, Documents],
    vocabulary: seqio.Vocabulary | None = None,
) -> seqio.Task:
    """Registers a Task that yields one example per document and returns it.

    An example holds the document's `name` beside its `targets`, so that a document
    that is not UTF-8 can be named.

    Args:
        name: of the Task; a name can be registered once.
        splits: for each split, a function that yields (name, bytes of text) in a
            fixed order. It is called when the split is read, not before.
        vocabulary: of the Task itself; bytes unless given. `prepare` puts the
            vocabulary of the settings in its place unless that is "task".
    """
    vocabulary = vocabulary or seqio.ByteVocabulary()
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_dataset, splits=dict(splits)), splits=tuple(splits)
        ),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=False)},
    )


def text_files(folder: str | Path, pattern: str = "**/*.txt") -> Documents:
    """Returns documents that are the files of `folder`, in the order of their names."""

    def documents() -> Iterable[tuple[str, bytes]]:
        root = Path(folder)
        for path in sorted(root.glob(pattern)):
            if path.is_file():
                yield path.relative_to(root).as_posix(), path.read_bytes()

    return documents


def _dataset(
    split: str,
    shuffle_files: bool = False,
    seed: int | None = None,
    *,
    splits: Mapping[str, Documents],
) -> tf.data.Dataset:
    """The documents of one split, unread until they are asked for."""
    del shuffle_files, seed  # the order is part of the store: batches are shuffled

    def examples() -> Iterable[dict[str, str | bytes]]:
        for name, text in splits[split]():
            yield {"name": name, "targets": text}

    return tf.data.Dataset.from_generator(
        examples,
        output_signature={
            "name": tf.TensorSpec((), tf.string),
            "targets": tf.TensorSpec((), tf.string),
        },
    )
