import numpy as np
import pytest

from tasks.objectives import FEATURES, language_model

LENGTH = 12
PIECES = [[5, 6, 7, 1], [8, 1], [9, 3, 1]]


def our_row(pieces: list[list[int]]) -> dict[str, np.ndarray]:
    tokens_BL = np.full((1, LENGTH), 99)  # what lies beyond the pieces is not read
    begins_BL = np.arange(LENGTH)[None] % 2 == 0
    flat = [token for piece in pieces for token in piece]
    begins = [token == 0 for piece in pieces for token in range(len(piece))]
    tokens_BL[0, : len(flat)], begins_BL[0, : len(flat)] = flat, begins
    features = language_model(tokens_BL, begins_BL, np.asarray([len(flat)]))
    return {name: feature[0] for name, feature in features.items()}


@pytest.mark.fast
def test_language_model_by_hand():
    row = our_row(PIECES)
    assert set(row) == set(FEATURES)
    assert all(feature.dtype == np.int32 for feature in row.values())
    assert {name: feature.tolist() for name, feature in row.items()} == {
        "decoder_target_tokens": [5, 6, 7, 1, 8, 1, 9, 3, 1, 0, 0, 0],
        "decoder_input_tokens": [0, 5, 6, 7, 0, 8, 0, 9, 3, 0, 0, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0, 0],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0],
    }


@pytest.mark.fast
def test_an_empty_row_and_a_full_one():
    empty = our_row([])
    assert all((feature == 0).all() for feature in empty.values())
    full = our_row([list(range(3, 3 + LENGTH))])
    assert full["decoder_input_tokens"].tolist() == [0, *range(3, 2 + LENGTH)]
    assert full["decoder_loss_weights"].all()


def test_layout_is_that_of_seqio():
    import seqio
    import tensorflow as tf

    dataset = tf.data.Dataset.from_generator(
        lambda: ({"targets": piece} for piece in PIECES),
        output_signature={"targets": tf.TensorSpec((None,), tf.int32)},
    )
    dataset = seqio.utils.trim_dataset(dataset, {"targets": LENGTH}, {"targets"})
    converter = seqio.DecoderFeatureConverter(pack=True)
    theirs = next(converter(dataset, {"targets": LENGTH}).as_numpy_iterator())
    ours = our_row(PIECES)
    assert set(theirs) == set(ours)
    for name, feature in ours.items():
        np.testing.assert_array_equal(feature, theirs[name], err_msg=name)
        assert theirs[name].dtype == np.int32
