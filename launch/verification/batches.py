"""A batch in which everything that a mask must hide, hides something."""

from typing import Any

import numpy as np

from launch.settings import Settings
from tasks import objectives


def draw(settings: Settings, tail: int, seed: int) -> dict[str, np.ndarray]:
    """Draws rows of several documents with padding, one row of nothing else.

    Args:
        settings: of the batch, and whether it has prefixes.
        tail: tokens at the end of every row that are padding.
        seed: of the draws.
    Returns:
        SeqIO's decoder features, int32[B, L].
    """
    B, L = settings.train.batch_size, settings.data.length
    rng = np.random.default_rng(seed)
    shape = (B, L)
    features: dict[str, Any] = {
        name: np.zeros(shape) for name in objectives.features(settings.data)
    }
    target_BL = rng.integers(0, settings.model.vocab_size, shape)
    for row in range(B - 1):
        last = L - tail - rng.integers(0, 3)
        stops = [*np.sort(rng.choice(np.arange(2, last), 2, replace=False)), last]
        start = 0
        for segment, stop in enumerate(stops, 1):
            here = slice(start, stop)
            length = stop - start
            given = length // 3  # of its tokens, which are not predicted
            features["decoder_target_tokens"][row, here] = target_BL[row, here]
            source = np.roll(target_BL[row, here], 1)
            source[0] = 0
            features["decoder_input_tokens"][row, here] = source
            features["decoder_segment_ids"][row, here] = segment
            features["decoder_positions"][row, here] = np.arange(length)
            features["decoder_loss_weights"][row, here] = np.arange(length) >= given
            if "decoder_causal_attention" in features:
                features["decoder_causal_attention"][row, here] = (
                    np.arange(length) <= given
                )
            start = stop
    return {name: values.astype(np.int32) for name, values in features.items()}
