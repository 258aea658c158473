"""SeqIO Tasks of pairs with metric functions; importing it imports TensorFlow."""

import flax
import numpy as np
import seqio
import tensorflow as tf

PAIRS = {
    "train": [("one", "ONE"), ("two words", "TWO WORDS"), ("再见", "Zàijiàn")] * 30,
    "validation": [
        ("hello", "Hello"),
        ("你好，世界", "Nǐ hǎo, shìjiè"),
        ("empty", ""),  # which is not stored
        ("a longer one that does not fit", "What is kept whole in the text"),
        ("hello", "Hello"),
        ("one more", "One more"),
        ("odd", "Seven examples, and so no even number"),
    ],
}


def _dataset(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed
    inputs, targets = zip(*PAIRS[split], strict=True)
    weights = list(range(len(inputs)))
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": list(inputs), "targets": list(targets), "weight": weights}
    )


def postprocess(text: str, example=None, is_target: bool = False) -> tuple:
    """Not the same for targets and predictions, and of its own example."""
    return text.casefold(), int(example["weight"]), is_target


def agreement(targets, predictions) -> dict:
    """Weighted by the examples, so that their order matters."""
    pairs = list(zip(targets, predictions, strict=True))
    assert all(t[2] and not p[2] for t, p in pairs)
    assert all(t[1] == p[1] for t, p in pairs)
    return {
        "equal": sum(t[1] * (t[0] == p[0]) for t, p in pairs),
        "characters": seqio.metrics.Scalar(
            np.float32(sum(len(p[0]) for _, p in pairs))
        ),
        "shown": seqio.metrics.Text("not a number"),
    }


def likelihood(targets, scores) -> dict:
    """Weighted, too."""
    return {"score": sum(t[1] * s for t, s in zip(targets, scores, strict=True))}


def with_aux(targets, predictions, aux_values) -> dict:
    """Asks for what is not computed."""
    raise AssertionError


def failing(targets, predictions) -> dict:
    """Has a fault of its own."""
    return {"ratio": 1 / (len(targets) - len(predictions))}


def _text(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(lambda example: {"targets": example["targets"]})


def length(targets, predictions) -> dict:
    """Made into an object, as a user of SeqIO may do."""
    return {"length": len(predictions) + 100 * len(targets)}


@flax.struct.dataclass
class Largest(seqio.metrics.Metric):
    """An object of one's own."""

    model_output_type: seqio.metrics.ModelOutputType = (
        seqio.metrics.ModelOutputType.SCORE
    )
    value: float = 0.0

    @classmethod
    def from_model_output(cls, inputs, model_output, features, *_, **__):
        del inputs, features
        return cls(value=float(np.max(model_output)))

    def compute(self):
        return {"largest": self.value}


def _add(
    name: str, *metric_fns, metric_objs=(), features=("inputs", "targets")
) -> None:
    feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_dataset, splits=tuple(PAIRS)),
        preprocessors=[
            *([] if "inputs" in features else [_text]),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features=dict.fromkeys(features, feature),
        postprocess_fn=postprocess,
        metric_fns=metric_fns,
        metric_objs=metric_objs,
    )


_by_class = seqio.metrics.PassthroughLegacyMetric.from_metric_fn(length, postprocess)
_add("measured", agreement, likelihood, metric_objs=[_by_class, Largest()])
_add("measured_by_aux", likelihood, with_aux)
_add("measured_twice", likelihood, lambda targets, scores: {"score": 0.0})
_add("measured_badly", failing)
_add("measured_text", agreement, features=("targets",))
_add("not_measured")
seqio.MixtureRegistry.add("mixed", ["measured", "not_measured"], default_rate=1.0)
