"""The bias that each token would need to choose an expert: counts and their quantiles.

Quantile balancing (Kimi K3's technical report, section 2.3.3, eqs. 13 and 14, and
appendix D; J. Su, kexue.fm/archives/11619): of the score s of expert e, and the token's
K + 1-th largest score + bias α, the expert is chosen where its bias is above α - s. So
the quantile K / E of α - s over a batch is the bias that an even share of the tokens
would choose it by.
"""

import jax
import jax.numpy as jnp

BINS = 1000  # H; their width bounds what is left of the imbalance


def counted(
    score_GSE: jax.Array, cutoff_GS: jax.Array, bias_E: jax.Array, mask_GS: jax.Array
) -> jax.Array:
    """Counts tokens by the bias that they would need for each expert.

    Counts add up over groups, devices and microbatches. A comparison instead of a
    scatter: a bin's tokens are those of it and of all below.

    Args:
        score_GSE: float32 in [0, 1], without the bias.
        cutoff_GS: K + 1-th largest of score + bias of each token.
        bias_E: float32.
        mask_GS: bool, True for real tokens.
    Returns:
        below_1EH: int32, real tokens in bins 0 to h; the range is that of `_range`.
    """
    low, width = _range(bias_E)
    needed_GSE = jax.lax.stop_gradient(cutoff_GS[..., None] - score_GSE)
    bin_GSE = jnp.floor((needed_GSE - low) / width).astype(jnp.int32)
    bin_GSE = jnp.where(mask_GS[..., None], jnp.clip(bin_GSE, 0, BINS - 1), BINS)
    is_below_GSEH = bin_GSE[..., None] <= jnp.arange(BINS)
    return jnp.sum(is_below_GSEH, axis=(0, 1), dtype=jnp.int32)[None]


def quantile(below_EH: jax.Array, bias_E: jax.Array, share: float) -> jax.Array:
    """Returns the bias by which each expert gets its share of tokens; their mean is 0.

    Within a bin tokens are taken to lie evenly.

    Args:
        below_EH: counts of a whole batch, from `counted`.
        bias_E: the one that it was counted under, which stays if there was no token.
        share: fraction of the tokens that choose an expert, K / E.
    """
    low, width = _range(bias_E)
    below_EH = below_EH.astype(jnp.float32)
    wanted_E1 = share * below_EH[:, -1:]
    # The first bin that reaches the number wanted, which so holds a token.
    bin_E1 = jnp.sum(below_EH < wanted_E1, axis=1, keepdims=True)
    bin_E1 = jnp.minimum(bin_E1, BINS - 1)
    before_E1 = jnp.where(
        bin_E1 > 0,
        jnp.take_along_axis(below_EH, jnp.maximum(bin_E1 - 1, 0), axis=1),
        0.0,
    )
    inside_E1 = jnp.take_along_axis(below_EH, bin_E1, axis=1) - before_E1
    part_E1 = (wanted_E1 - before_E1) / jnp.maximum(inside_E1, 1.0)
    found_E = (low + width * (bin_E1 + part_E1))[:, 0]
    return jnp.where(below_EH[0, -1] > 0, found_E - jnp.mean(found_E), bias_E)


def _range(bias_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where bins begin, and how wide they are.

    With scores in [0, 1], α lies in [min b, max b + 1] and α - s in one more.
    """
    low, high = jnp.min(bias_E) - 1.0, jnp.max(bias_E) + 1.0
    return low, (high - low) / BINS
