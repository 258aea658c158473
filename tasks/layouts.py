"""What a row of tokens asks the model to predict.

The layouts are those of SeqIO's feature converters with packing. SeqIO tells padding
by its token, 0; here rows say how many of their tokens are real, so that 0 may be
one. SeqIO gives pairs without targets a target of padding; stored documents are never
empty.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tasks.objectives import Asked
from tasks.settings import DataSettings

FEATURES = (
    "decoder_target_tokens",
    "decoder_input_tokens",
    "decoder_loss_weights",
    "decoder_segment_ids",
    "decoder_positions",
)


ENCODER_FEATURES = (
    "encoder_input_tokens",
    "encoder_segment_ids",
    "encoder_positions",
)


IMAGES = "decoder_images"


def type_of(feature: str) -> str:
    """Returns the type of a feature's numbers."""
    return "uint8" if feature == IMAGES else "int32"


def features(data: DataSettings) -> dict[str, int]:
    """Returns L of what a batch holds, int32[B, L] each, by name.

    Images are uint8[B, N].
    """
    if data.layout == "encoder":
        names = tuple(name.replace("decoder", "encoder") for name in FEATURES)
        return dict.fromkeys(names, data.length)
    found = dict.fromkeys(FEATURES, data.length)
    if data.layout == "encoder_decoder":
        found |= dict.fromkeys(ENCODER_FEATURES, data.encoder_length)
    if data.prefix_attention == "bidirectional":
        found["decoder_causal_attention"] = data.length
    if data.image_size:
        found[IMAGES] = data.image_values
    return found


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tokens of rows, one piece after the other.

    Attributes:
        tokens_BL: int[B, L]; beyond the pieces, anything.
        begins_BL: bool[B, L], true where a piece begins; beyond them, anything.
        num_tokens_B: int[B], how many tokens of each row are real.
        given_BL: bool[B, L], true on tokens that are given and not predicted, the
            first of their piece; beyond the pieces, anything.
    """

    tokens_BL: np.ndarray
    begins_BL: np.ndarray
    num_tokens_B: np.ndarray
    given_BL: np.ndarray


def rows_of(pieces: Sequence[Sequence[np.ndarray]], length: int) -> Rows:
    """Returns rows of whole pieces, of which every token is predicted.

    Args:
        pieces: documents or parts of them, for each row; together at most `length`
            tokens.
        length: L.
    """
    nothing = np.zeros(0, np.int64)
    return joined([[(nothing, piece) for piece in row] for row in pieces], length)


def joined(
    pairs: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], length: int
) -> Rows:
    """Returns rows in which targets follow their inputs, which are given.

    Args:
        pairs: the inputs and targets of each row; together at most `length` tokens.
        length: L.
    """
    shape = (len(pairs), length)
    rows = Rows(
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
        np.zeros(len(pairs), np.int64),
        np.zeros(shape, bool),
    )
    for row, row_pairs in enumerate(pairs):
        place = 0
        for inputs, targets in row_pairs:
            middle = place + len(inputs)
            end = middle + len(targets)
            rows.begins_BL[row, place : min(place + 1, end)] = True
            rows.given_BL[row, place:middle] = True
            rows.tokens_BL[row, place:middle] = inputs
            rows.tokens_BL[row, middle:end] = targets
            place = end
        rows.num_tokens_B[row] = place
    return rows


def decoder(rows: Rows, *, bidirectional: bool = False) -> dict[str, np.ndarray]:
    """Returns the features of a decoder alone.

    The layout is that of SeqIO's `DecoderFeatureConverter` with packing: each piece
    predicts its own tokens from those before them in the same piece, its first from
    0; no loss on given tokens.

    Args:
        rows: what to lay out.
        bidirectional: add "decoder_causal_attention", 1 where a position sees all
            others that have 1 in the same piece, whatever their order: where a given
            token is read, and so one position beyond those where it is predicted.
    Returns:
        int32[B, L] under each name in `FEATURES`. Segments count from 1 in each row
        and are 0 on padding; positions count from 0 in each piece; weights are 0 on
        padding.
    """
    real_BL, segment_BL, position_BL = _packed(rows)
    target_BL = np.where(real_BL, rows.tokens_BL, 0).astype(np.int32)
    batch = {
        "decoder_target_tokens": target_BL,
        "decoder_input_tokens": np.where(
            rows.begins_BL | ~real_BL, 0, _shift_right(target_BL)
        ).astype(np.int32),
        "decoder_loss_weights": (real_BL & ~rows.given_BL).astype(np.int32),
        "decoder_segment_ids": segment_BL,
        "decoder_positions": position_BL,
    }
    if bidirectional:
        given_before_BL = _shift_right(rows.given_BL) | rows.begins_BL
        seen_BL = real_BL & (rows.given_BL | given_before_BL)
        batch["decoder_causal_attention"] = seen_BL.astype(np.int32)
    return batch


def started(features: dict[str, np.ndarray], start_id: int) -> dict[str, np.ndarray]:
    """Returns the features of a decoder that reads another id than 0 as a start."""
    if not start_id:
        return features
    inside_BL = features["decoder_segment_ids"] > 0
    first_BL = inside_BL & (features["decoder_positions"] == 0)
    input_BL = features["decoder_input_tokens"]
    read_BL = np.where(first_BL, np.int32(start_id), input_BL)
    return features | {"decoder_input_tokens": read_BL}


def captions(
    rows: Rows, image_BN: np.ndarray, num_patches: int, *, bidirectional: bool = False
) -> dict[str, np.ndarray]:
    """Returns the features of a decoder whose rows begin with the patches of an image.

    Patches are read where they stand, so the first token of the text is predicted at
    the place behind them, which reads 0 as the start of any text does.

    Args:
        rows: P given places and the text.
        image_BN: uint8, the images.
        num_patches: P.
        bidirectional: whether patches see one another whole.
    """
    batch = decoder(rows) | {IMAGES: image_BN}
    if bidirectional:
        real_BL = batch["decoder_segment_ids"] > 0
        seen_BL = real_BL & (batch["decoder_positions"] < num_patches)
        batch["decoder_causal_attention"] = seen_BL.astype(np.int32)
    return batch


def encoder_decoder(inputs: Rows, targets: Rows) -> dict[str, np.ndarray]:
    """Returns the features of an encoder and a decoder.

    The layout is that of SeqIO's `EncDecFeatureConverter` with packing.

    Args:
        inputs: rows of inputs.
        targets: rows of the targets that belong to them, piece by piece.
    Returns:
        Those of `decoder` for the targets, and int32[B, L of inputs] as
        "encoder_input_tokens", "encoder_segment_ids" and "encoder_positions".
    """
    real_BL, segment_BL, position_BL = _packed(inputs)
    return decoder(targets) | {
        "encoder_input_tokens": np.where(real_BL, inputs.tokens_BL, 0).astype(np.int32),
        "encoder_segment_ids": segment_BL,
        "encoder_positions": position_BL,
    }


def sides(
    pairs: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], data: DataSettings
) -> tuple[Rows, ...]:
    """Returns inputs and targets in one row, or in a row each; the targets last.

    Args:
        pairs: the inputs and targets of each row, neither of them empty where they
            have rows of their own: segments are counted on each side.
        data: whose rows they are, and their lengths.
    """
    if data.layout == "decoder":
        return (joined(pairs, data.length),)
    lengths = data.encoder_length, data.length
    return tuple(
        rows_of([[pair[side] for pair in row] for row in pairs], length)
        for side, length in enumerate(lengths)
    )


def of_pairs(
    pairs: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], data: DataSettings
) -> dict[str, np.ndarray]:
    """Returns the features of inputs and targets; see `sides`."""
    *inputs, targets = sides(pairs, data)
    if inputs:
        return encoder_decoder(inputs[0], targets)
    return decoder(targets, bidirectional=data.prefix_attention == "bidirectional")


def broken_rule(
    asked: Asked, num_tokens: int, data: DataSettings, vocabulary_size: int
) -> str:
    """Returns the first rule that what was made of a row breaks; "" if none.

    Args:
        asked: what was made.
        num_tokens: n, of how many tokens.
        data: whose lengths it has to fit.
        vocabulary_size: V.
    """
    if not isinstance(asked, Asked):
        return f"it made a {type(asked).__name__}, not an Asked"
    for name, given in asked._asdict().items():
        ids, limit = np.asarray(given), vocabulary_size
        if name == "sources":
            limit = num_tokens
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            return f"{name} is {ids.dtype}{list(ids.shape)}, not a row of integers"
        if ids.size and not 0 <= ids.min() <= ids.max() < limit:
            return f"{name} has {ids.min()} to {ids.max()}, not from 0 to {limit - 1}"
    inputs, targets, sources = asked
    if not len(targets) or len(targets) != len(sources):
        return (
            f"it made {len(targets)} targets of {len(sources)} sources: there must be "
            "at least one, and as many of each"
        )
    lengths = dict(data.task_feature_lengths)
    if data.layout == "encoder_decoder":
        if not len(inputs):
            return "it made no inputs, and an encoder must have some"
        fits = len(inputs) <= data.encoder_length and len(targets) <= data.length
    else:
        fits = len(inputs) + len(targets) <= data.length
    if not fits:
        return (
            f"it made {len(inputs)} inputs and {len(targets)} targets, which do not "
            f"fit TASK_FEATURE_LENGTHS = {lengths}: lower its row_tokens"
        )
    return ""


def encoder(rows: Rows, read_BL: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the features of an encoder alone.

    The layout is that of SeqIO's `EncoderFeatureConverter` with packing, but for the
    weights: SeqIO's are 1 where the mask is read, these where a token is predicted.

    Args:
        rows: what stands there; tokens that are not predicted are given.
        read_BL: int[B, L], what is read in their place.
    Returns:
        int32[B, L] under names as those of `decoder`.
    """
    real_BL, segment_BL, position_BL = _packed(rows)
    return {
        "encoder_target_tokens": np.where(real_BL, rows.tokens_BL, 0).astype(np.int32),
        "encoder_input_tokens": np.where(real_BL, read_BL, 0).astype(np.int32),
        "encoder_loss_weights": (real_BL & ~rows.given_BL).astype(np.int32),
        "encoder_segment_ids": segment_BL,
        "encoder_positions": position_BL,
    }


def _packed(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where tokens are real, their segment from 1 and their position from 0."""
    place_L = np.arange(rows.tokens_BL.shape[1], dtype=np.int32)
    real_BL = place_L < rows.num_tokens_B[:, None]
    segment_BL = np.cumsum(rows.begins_BL, axis=1, dtype=np.int32)
    start_BL = np.maximum.accumulate(np.where(rows.begins_BL, place_L, 0), axis=1)
    position_BL = (place_L - start_BL).astype(np.int32)
    return real_BL, segment_BL * real_BL, position_BL * real_BL


def _shift_right(value_BL: np.ndarray) -> np.ndarray:
    shifted_BL = np.zeros_like(value_BL)
    shifted_BL[:, 1:] = value_BL[:, :-1]
    return shifted_BL
