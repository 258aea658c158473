"""What a row of tokens asks the model to predict."""

import numpy as np

FEATURES = (
    "decoder_target_tokens",
    "decoder_input_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
)


def language_model(
    tokens_BL: np.ndarray, begins_BL: np.ndarray, num_tokens_B: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns the features of a language model on packed rows.

    The layout is that of SeqIO's `DecoderFeatureConverter` with packing: each piece
    predicts its own tokens from those before them in the same piece, its first from 0.

    Args:
        tokens_BL: the row's pieces one after the other; anything beyond them.
        begins_BL: bool, true where a piece begins; beyond the pieces, anything.
        num_tokens_B: how many tokens of each row are real.
    Returns:
        int32[B, L] under each name in `FEATURES`. Segments count from 1 in each row
        and are 0 on padding; positions count from 0 in each piece; weights are 1 on
        real tokens and 0 on padding.
    """
    place_L = np.arange(tokens_BL.shape[1], dtype=np.int32)
    real_BL = place_L < np.asarray(num_tokens_B)[:, None]
    begin_of_piece_BL = np.maximum.accumulate(np.where(begins_BL, place_L, 0), axis=1)
    target_BL = np.where(real_BL, tokens_BL, 0).astype(np.int32)
    input_BL = np.zeros_like(target_BL)
    input_BL[:, 1:] = target_BL[:, :-1]
    input_BL[begins_BL | ~real_BL] = 0
    return {
        "decoder_target_tokens": target_BL,
        "decoder_input_tokens": input_BL,
        "decoder_loss_weights": real_BL.astype(np.int32),
        "decoder_segment_ids": np.where(
            real_BL, np.cumsum(begins_BL, axis=1, dtype=np.int32), 0
        ).astype(np.int32),
        "decoder_positions": np.where(real_BL, place_L - begin_of_piece_BL, 0).astype(
            np.int32
        ),
    }
