import numpy as np
import pytest
from memory_store import settings

from tasks.layouts import (
    FEATURES,
    Rows,
    decoder,
    encoder_decoder,
    features,
    joined,
    started,
)

pytestmark = pytest.mark.fast

LENGTH = 12
PIECES = [[5, 6, 7, 1], [8, 1], [9, 3, 1]]
PAIRS = [([7, 8, 5, 1], [3, 9, 1]), ([8, 4, 1], [4, 1])]


def our_row(pieces: list[list[int]]) -> dict[str, np.ndarray]:
    tokens_BL = np.full((1, LENGTH), 99)  # what lies beyond the pieces is not read
    begins_BL = np.arange(LENGTH)[None] % 2 == 0
    given_BL = np.arange(LENGTH)[None] % 3 == 0
    flat = [token for piece in pieces for token in piece]
    begins = [token == 0 for piece in pieces for token in range(len(piece))]
    tokens_BL[0, : len(flat)], begins_BL[0, : len(flat)] = flat, begins
    given_BL[0, : len(flat)] = False
    rows = Rows(tokens_BL, begins_BL, np.asarray([len(flat)]), given_BL)
    return {name: feature[0] for name, feature in decoder(rows).items()}


def test_text_by_hand():
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


def test_a_start_of_another_id_stands_before_each_piece():
    row = started(our_row(PIECES), 4)
    wanted = [4, 5, 6, 7, 4, 8, 4, 9, 3, 0, 0, 0]
    assert row["decoder_input_tokens"].tolist() == wanted
    assert row["decoder_input_tokens"].dtype == np.int32
    assert started(row, 0) is row


def test_an_empty_row_and_a_full_one():
    empty = our_row([])
    assert all((feature == 0).all() for feature in empty.values())
    full = our_row([list(range(3, 3 + LENGTH))])
    assert full["decoder_input_tokens"].tolist() == [0, *range(3, 2 + LENGTH)]
    assert full["decoder_loss_weights"].all()


def test_joined_pairs_by_hand():
    row = decoder(joined([PAIRS, []], 14), bidirectional=True)
    assert all(feature.dtype == np.int32 for feature in row.values())
    assert not any(feature[1].any() for feature in row.values())
    assert {name: feature[0].tolist() for name, feature in row.items()} == {
        "decoder_target_tokens": [7, 8, 5, 1, 3, 9, 1, 8, 4, 1, 4, 1, 0, 0],
        "decoder_input_tokens": [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 1, 4, 0, 0],
        "decoder_loss_weights": [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0],
        "decoder_positions": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 0, 0],
        "decoder_causal_attention": [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0],
    }


def test_an_encoder_and_a_decoder_by_hand():
    sides = [joined([[([], p[i]) for p in PAIRS]], n) for i, n in ((0, 9), (1, 6))]
    row = encoder_decoder(*sides)
    assert {name: feature[0].tolist() for name, feature in row.items()} == {
        "encoder_input_tokens": [7, 8, 5, 1, 8, 4, 1, 0, 0],
        "encoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 0, 0],
        "encoder_positions": [0, 1, 2, 3, 0, 1, 2, 0, 0],
        "decoder_target_tokens": [3, 9, 1, 4, 1, 0],
        "decoder_input_tokens": [0, 3, 9, 0, 4, 0],
        "decoder_loss_weights": [1, 1, 1, 1, 1, 0],
        "decoder_segment_ids": [1, 1, 1, 2, 2, 0],
        "decoder_positions": [0, 1, 2, 0, 1, 0],
    }


def test_features_are_those_of_the_settings():
    assert tuple(features(settings("seq2seq"))) == FEATURES
    both = features(settings("seq2seq", prefix_attention="bidirectional"))
    assert tuple(both) == (*FEATURES, "decoder_causal_attention")
