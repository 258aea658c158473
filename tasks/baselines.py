"""What needs no network: numbers a trained model has to beat on the held-out text."""

import gzip
import lzma
import math

import numpy as np

# Compressors at their highest level take about a second per megabyte.
COMPRESSED_BYTES = 16 << 20


def baselines(
    train_counts_V: np.ndarray,
    heldout_counts_V: np.ndarray,
    text_bytes: int,
    text: bytes,
) -> dict[str, float]:
    """Returns the baselines of a held-out split.

    Args:
        train_counts_V: how often each token occurs in the train split.
        heldout_counts_V: the same in the held-out split.
        text_bytes: bytes of the held-out text, all of it.
        text: the held-out documents one after the other, or the first
            `COMPRESSED_BYTES` of them.
    """
    nats = unigram_nats(train_counts_V, heldout_counts_V)
    return {
        "unigram_nats_per_token": nats / int(heldout_counts_V.sum()),
        "unigram_bits_per_byte": nats / math.log(2) / text_bytes,
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        "xz_bits_per_byte": 8
        * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        / len(text),
        "compressed_text_bytes": len(text),
    }


def unigram_nats(train_counts_V: np.ndarray, heldout_counts_V: np.ndarray) -> float:
    """Returns -Σ_v n_v log p_v with p_v = (train_v + 1) / (Σ train + V).

    One is added to every count, so that a token unseen in training costs a finite
    price.
    """
    smoothed_V = train_counts_V.astype(np.float64) + 1
    return float(-(heldout_counts_V * np.log(smoothed_V / smoothed_V.sum())).sum())
