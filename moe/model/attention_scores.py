"""Attention of queries to keys and values: whole, block by block, or round a ring.

All three compute the same. `attend_whole` holds every score at once; the others hold
those of one block of queries and one of keys, forward and backward, and keep a running
softmax (arXiv:1805.02867, algorithm 3; arXiv:2205.14135). Keys and values may have
fewer heads than queries, each shared by as many neighbours (arXiv:2305.13245).

Functions of local arrays; inside `shard_map` they need `check_vma=False`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe.model.online_softmax import ATTENDED_NAMES, Ring, attend_blocks, packed
from moe.model.scores import LEAST, Bias, Seen, scores, visible

__all__ = [
    "ATTENDED_NAMES",
    "Bias",
    "Seen",
    "attend_blocked",
    "attend_ring",
    "attend_whole",
]


def attend_whole(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUD: jax.Array,
    queries: Seen,
    keys: Seen,
    bias: Bias | None = None,
) -> jax.Array:
    """Attends with all scores held at once, in float32.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BTUD: keys.
        value_BTUD: values.
        queries: who the queries are.
        keys: who the keys are.
        bias: added to the scores.
    Returns:
        mixed_BLND in the dtype of the values; 0 where a query sees nothing.
    """
    query_BLUnD = _grouped(query_BLND, key_BTUD.shape[2])
    visible_BLT = visible(queries, keys)
    score_BUnLT = scores(query_BLUnD, key_BTUD, bias, queries, keys, visible_BLT)
    top_BUnL1 = jnp.maximum(jnp.max(score_BUnLT, axis=-1, keepdims=True), LEAST)
    weight_BUnLT = jnp.exp(score_BUnLT - lax.stop_gradient(top_BUnL1))
    total_BUnL1 = jnp.sum(weight_BUnLT, axis=-1, keepdims=True)
    # A query that sees anything has a total of at least 1, its greatest weight.
    weight_BUnLT /= jnp.maximum(total_BUnL1, 0.5)
    mixed_BLUnD = jnp.einsum(
        "BUnLT,BTUD->BLUnD", weight_BUnLT.astype(value_BTUD.dtype), value_BTUD
    )
    return mixed_BLUnD.reshape(query_BLND.shape)


def attend_blocked(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUD: jax.Array,
    queries: Seen,
    keys: Seen,
    bias: Bias | None = None,
    *,
    block: int,
) -> jax.Array:
    """Attends block by block: neither pass holds an L × T array.

    Pairs of blocks in which nothing is visible are skipped. The backward pass computes
    the scores again, from the output and one number per query and head.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BTUD: keys.
        value_BTUD: values.
        queries: who the queries are.
        keys: who the keys are.
        bias: added to the scores.
        block: queries, and keys, of a block.
    Returns:
        mixed_BLND in the dtype of the values; 0 where a query sees nothing.
    """
    return _attend(query_BLND, key_BTUD, value_BTUD, queries, keys, bias, Ring(), block)


def attend_ring(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUD: jax.Array,
    queries: Seen,
    keys: Seen,
    bias: Bias | None = None,
    *,
    axis: str,
    axis_size: int,
    block: int,
) -> jax.Array:
    """Attends to the keys of every device of a mesh axis, as they pass by.

    Keys and values go round the ring (arXiv:2310.01889), `axis_size - 1` times to the
    next device. The backward pass sends them round again, all the way, and with them
    the sums of their gradients, in float32. A device holds its own and its neighbour's.
    Unlike there, blocks that nothing sees are skipped; devices with earlier tokens then
    wait for those with later ones.

    Args:
        query_BLND: this device's queries, not yet scaled; N is a multiple of U.
        key_BTUD: this device's keys.
        value_BTUD: their values.
        queries: who the queries are, by their places in the whole row.
        keys: who the keys are.
        bias: added to the scores.
        axis: name of the mesh axis.
        axis_size: devices on it.
        block: queries, and keys, of a block.
    Returns:
        mixed_BLND in the dtype of the values; 0 where a query sees nothing.
    """
    ring = Ring(axis, axis_size)
    return _attend(query_BLND, key_BTUD, value_BTUD, queries, keys, bias, ring, block)


def _attend(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUD: jax.Array,
    queries: Seen,
    keys: Seen,
    bias: Bias | None,
    ring: Ring,
    block: int,
) -> jax.Array:
    """Cuts everything into blocks, a leading dimension, and mends the cut."""
    B, L, N, D = query_BLND.shape
    l, t = min(block, L), min(block, key_BTUD.shape[1])  # noqa: E741
    # The mask is the same in every layer. Without this barrier XLA hoists it out of the
    # scan over layers, for all blocks at once: an L × T array.
    asking, asked = jax.lax.optimization_barrier(
        (packed(queries), packed(keys), jax.lax.stop_gradient(query_BLND))
    )[:2]
    # Queries of padding get segment -2 and keys -1, so that they never match.
    mixed = attend_blocks(
        _cut(_grouped(query_BLND, key_BTUD.shape[2]), l),
        (_cut(key_BTUD, t), _cut(value_BTUD, t), _cut(asked, t, -1)),
        bias,
        _cut(asking, l, -2),
        ring,
    )
    return jnp.moveaxis(mixed, 0, 1).reshape(B, -1, N, D)[:, :L]


def _grouped(query_BLND: jax.Array, U: int) -> jax.Array:
    """Queries by the head of keys that they share, scaled: there are more scores."""
    B, L, N, D = query_BLND.shape
    return (query_BLND / D**0.5).reshape(B, L, U, N // U, D)


def _cut(x: jax.Array, block: int, padding: int = 0) -> jax.Array:
    """Cuts dimension 1 into blocks, a leading dimension; pads the last one."""
    missing = -x.shape[1] % block
    x = jnp.pad(
        x,
        [(0, missing if dim == 1 else 0) for dim in range(x.ndim)],
        constant_values=padding,
    )
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)
