"""A batch in which everything that a mask must hide, hides something."""

from typing import Any

import numpy as np

from launch.config.settings import Settings
from tasks import layouts


def draw(settings: Settings, tail: int, seed: int) -> dict[str, np.ndarray]:
    """Draws rows of several documents with padding, one row of nothing else.

    Args:
        settings: configuration that decides the batch's shape and whether it has
            prefixes.
        tail: tokens at the end of every row that are padding, on each side.
        seed: PRNG seed for the draws.
    Returns:
        SeqIO's features of each stack, int32[B, L]; images of the first tokens of each
        row, uint8.
    """
    rng = np.random.default_rng(seed)
    B, layers = settings.train.batch_size, settings.layers
    features: dict[str, Any] = {
        name: np.zeros((B, L)) for name, L in layouts.features(settings.data).items()
    }
    images = features.pop(layouts.IMAGES, None)
    for name in reversed(layers.stacks):  # the scored one draws first
        side = {
            feature.removeprefix(f"{name}_"): array
            for feature, array in features.items()
            if feature.startswith(name)
        }
        token_BL = rng.integers(0, settings.model.vocab_size, side["positions"].shape)
        for row in range(B - 1):
            last = token_BL.shape[1] - tail - rng.integers(0, 3)
            stops = [*np.sort(rng.choice(np.arange(2, last), 2, replace=False)), last]
            start = 0
            for segment, stop in enumerate(stops, 1):
                here = slice(start, stop)
                document = {key: array[row, here] for key, array in side.items()}
                document["segment_ids"][:] = segment
                _fill(document, token_BL[row, here], causal=name == "decoder")
                start = stop
    if images is not None:
        features[layouts.IMAGES] = rng.integers(0, 256, images.shape)
    return {
        name: values.astype(layouts.type_of(name)) for name, values in features.items()
    }


def _fill(
    document: dict[str, np.ndarray], token_l: np.ndarray, *, causal: bool
) -> None:
    """One document of a side, of which a third is given if it is scored."""
    place_l = np.arange(len(token_l))
    given = len(token_l) // 3
    document["positions"][:] = place_l
    document["input_tokens"][:] = np.where(place_l, np.roll(token_l, 1), 0)
    if "target_tokens" in document:
        document["target_tokens"][:] = token_l
        # An encoder reads what it is not asked for.
        asked_l = place_l >= given if causal else place_l % 3 == 1
        document["loss_weights"][:] = asked_l
        if not causal:
            document["input_tokens"][:] = np.where(asked_l, 1, token_l)
    elif not causal:
        document["input_tokens"][:] = token_l
    if "causal_attention" in document:
        document["causal_attention"][:] = place_l <= given
