"""Attention with every score held at once, in float32."""

import jax
import jax.numpy as jnp
from jax import lax

from moe.model.attention.mask import Who
from moe.model.attention.scoring import LEAST, Scoring, by_key_head, products, scores


def attend(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUX: jax.Array,
    queries: Who,
    keys: Who,
    scoring: Scoring,
) -> jax.Array:
    """Mixes values by a softmax over the scores.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BTUD: keys.
        value_BTUX: values, whose width X may be another.
        queries: who the queries are.
        keys: who the keys are.
        scoring: what scores are made of.
    Returns:
        mixed_BLNX in the dtype of the values; 0 where a query sees nothing.
    """
    (B, L, N, _), U = query_BLND.shape, key_BTUD.shape[2]
    query_BLUnD = by_key_head(query_BLND, U, scoring)
    product_BUnLT = products(query_BLUnD, key_BTUD)
    visible_BLT = scoring.visible(queries, keys)
    score_BUnLT = scores(product_BUnLT, scoring, queries, keys, visible_BLT)
    top_BUnL1 = jnp.maximum(jnp.max(score_BUnLT, axis=-1, keepdims=True), LEAST)
    if scoring.sink_N is not None:
        sink_Un11 = scoring.sink_N.astype(jnp.float32).reshape(U, N // U, 1, 1)
        top_BUnL1 = jnp.maximum(top_BUnL1, sink_Un11)
    top_BUnL1 = lax.stop_gradient(top_BUnL1)
    weight_BUnLT = jnp.exp(score_BUnLT - top_BUnL1)
    total_BUnL1 = jnp.sum(weight_BUnLT, axis=-1, keepdims=True)
    if scoring.sink_N is not None:
        total_BUnL1 += jnp.exp(sink_Un11 - top_BUnL1)
    # A query that sees anything has a total of at least 1, its greatest weight.
    weight_BUnLT /= jnp.maximum(total_BUnL1, 0.5)
    mixed_BLUnX = jnp.einsum(
        "BUnLT,BTUX->BLUnX", weight_BUnLT.astype(value_BTUX.dtype), value_BTUX
    )
    return mixed_BLUnX.reshape(B, L, N, -1)
