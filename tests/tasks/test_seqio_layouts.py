"""Rows of the same examples, ours and those of SeqIO's feature converters, equal.

SeqIO begins a new row after every max(length) examples, full or not; there are fewer.
"""

import numpy as np
from memory_store import MemorySplit, MemoryStore, documents, settings

from tasks.batches import training
from tasks.settings import MixtureSettings

LENGTHS = {"inputs": 31, "targets": 24}
NUMBER = 28  # examples; some are longer than these lengths


def examples() -> dict[str, list[np.ndarray]]:
    return {
        "inputs": documents(NUMBER, 3, longest=40),
        "targets": documents(NUMBER, 4, longest=30),
    }


def converted(name: str, lengths: dict[str, int], **options) -> dict[str, np.ndarray]:
    """All rows that a converter of SeqIO makes of the examples."""
    columns = {feature: examples()[feature] for feature in lengths}
    rows = [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]
    return converter_of(rows, lengths, name, **options)


def converter_of(
    rows: list[dict[str, np.ndarray]], lengths: dict[str, int], name: str, **options
) -> dict[str, np.ndarray]:
    """All rows that a converter of SeqIO makes of given examples."""
    import seqio
    import tensorflow as tf

    dataset = tf.data.Dataset.from_generator(
        lambda: iter(rows),
        output_signature={f: tf.TensorSpec((None,), tf.int32) for f in lengths},
    )
    dataset = seqio.utils.trim_dataset(dataset, lengths, set(lengths))
    converter = getattr(seqio, name)(pack=True, **options)
    rows = list(converter(dataset, lengths).as_numpy_iterator())
    return {feature: np.stack([row[feature] for row in rows]) for feature in rows[0]}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert set(ours) == set(theirs)
    for name, feature in ours.items():
        np.testing.assert_array_equal(feature, theirs[name], err_msg=name)
        assert feature.dtype == theirs[name].dtype == np.int32
    assert len(feature) > 5  # rows


def all_rows(objective: str, lengths: dict[str, int], **changes):
    """Every row of a store with the examples, in stored order."""
    trimmed = {feature: examples()[feature] for feature in lengths}
    store = MemoryStore({"task": {"train": MemorySplit(trimmed)}})
    data = settings(objective, task_feature_lengths=lengths, shuffle=False, **changes)
    alone = MixtureSettings()
    batches = training(store, data, alone, batch_size=1, seed=0)
    size = batches.rows("task")
    return training(store, data, alone, batch_size=size, seed=0).read(0, 0, size)


def test_packed_text_is_that_of_seqio():
    longest = {"targets": 30}  # none is cut: SeqIO drops what we put into another row
    theirs = converted("DecoderFeatureConverter", longest)
    assert_equal(all_rows("causal_lm", longest), theirs)


def test_packed_pairs_of_a_decoder_are_those_of_seqio():
    ours = all_rows("seq2seq", LENGTHS, prefix_attention="bidirectional")
    assert_equal(ours, converted("PrefixLMFeatureConverter", LENGTHS))


def test_packed_pairs_of_encoder_and_decoder_are_those_of_seqio():
    ours = all_rows("seq2seq", LENGTHS, layout="encoder_decoder")
    assert_equal(ours, converted("EncDecFeatureConverter", LENGTHS))


def test_masked_rows_are_those_of_seqio_but_for_tokens_that_are_not_masked():
    length = {"targets": 30}
    ours = all_rows("masked_lm", length, layout="encoder")
    text = all_rows("causal_lm", length)
    for name in ("target_tokens", "segment_ids", "positions"):
        np.testing.assert_array_equal(ours[f"encoder_{name}"], text[f"decoder_{name}"])
    # SeqIO is given what is read, and tells the predicted by the mask alone.
    mask = int(ours["encoder_input_tokens"].max())
    rows = [
        {
            "inputs": ours["encoder_input_tokens"][row][own],
            "targets": ours["encoder_target_tokens"][row][own],
        }
        for row, segments in enumerate(ours["encoder_segment_ids"])
        for own in (segments == number for number in range(1, segments.max() + 1))
    ]
    theirs = converter_of(
        rows,
        {"inputs": 30, "targets": 30},
        "EncoderFeatureConverter",
        mask_id=mask,
    )
    read, weight = ours["encoder_input_tokens"], theirs.pop("encoder_loss_weights")
    np.testing.assert_array_equal(weight, read == mask)
    assert (ours.pop("encoder_loss_weights") >= weight).all()
    assert_equal(ours, theirs)
