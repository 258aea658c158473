"""SeqIO Tasks over a small made-up corpus, registered where a test imports them.

Importing this file imports TensorFlow; `documents` itself is in `corpus.py`.
"""

import functools

import seqio
import tensorflow as tf
from corpus import BROKEN, documents

from tasks.factories import add_documents

TRAIN = functools.partial(documents, "train", 60)
VALIDATION = functools.partial(documents, "validation", 7)


def _failing():
    yield "good", b"fine"
    raise OSError("no disk today")


def _pair(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda x: {"inputs": x["targets"], "targets": x["targets"]})


def _words(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Tokenises by itself: whatever vocabulary the feature has is not asked."""
    return dataset.map(lambda x: {"targets": tf.range(250, 270, dtype=tf.int32)})


add_documents("made_up", {"train": TRAIN, "validation": VALIDATION})
add_documents(
    "made_up_bad",
    {"train": lambda: [("good", b"fine"), ("latin", BROKEN)], "validation": VALIDATION},
)
add_documents("made_up_empty", {"train": TRAIN, "validation": lambda: [("void", b"")]})
add_documents("made_up_failing", {"train": _failing, "validation": VALIDATION})
add_documents("made_up_none", {"train": TRAIN, "validation": lambda: []})
add_documents(
    "made_up_extra",
    {"train": TRAIN, "validation": VALIDATION},
    vocabulary=seqio.ByteVocabulary(extra_ids=100),
)
_source = seqio.TaskRegistry.get("made_up").source
_bytes = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
seqio.TaskRegistry.add(
    "made_up_pairs",
    source=_source,
    preprocessors=[_pair, seqio.preprocessors.tokenize],
    output_features={"inputs": _bytes, "targets": _bytes},
)
seqio.TaskRegistry.add(
    "made_up_words",
    source=_source,
    preprocessors=[_words],
    output_features={"targets": seqio.Feature(seqio.PassThroughVocabulary(300))},
)
seqio.TaskRegistry.add(
    "made_up_strange",
    source=_source,
    preprocessors=[_words],
    output_features={"targets": _bytes},
)
seqio.TaskRegistry.add(
    "made_up_with_eos",
    source=_source,
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
)
seqio.MixtureRegistry.add("made_up_mixture", ["made_up"], default_rate=1.0)
