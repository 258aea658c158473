"""Attention over blocks with a running softmax, round a ring of devices or at home.

The running softmax is algorithm 3 of arXiv:1805.02867; computing the scores of a block
again in the backward pass is arXiv:2205.14135, algorithm 4. Derivatives are written out
here, because those that jax would derive keep what passed by, all of it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.model.scores import LEAST, Bias, Seen, bias_of, scores, visible

# What is left for the backward pass beside the inputs; a remat policy may save both.
ATTENDED_NAMES = ("attended", "attended_log_total")


@dataclasses.dataclass(frozen=True)
class Ring:
    """Devices whose keys pass by.

    Attributes:
        axis: name of the mesh axis.
        axis_size: devices on it; 1 needs no mesh.
    """

    axis: str = ""
    axis_size: int = 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_blocks(
    query: jax.Array, held: Any, bias: Bias | None, queries: jax.Array, ring: Ring
) -> jax.Array:
    """Attends; everything is in blocks, along a leading dimension.

    Args:
        query: query_BlUnD of each block.
        held: of each block key_BtUD, value_BtUD and who the keys are, as `packed`.
        bias: added to the scores.
        queries: who the queries are, as `packed`.
        ring: whose keys pass by.
    Returns:
        mixed_BlUnD of each block, in the dtype of the values.
    """
    return _forward(query, held, bias, queries, ring)[0]


def _forward(
    query: jax.Array, held: Any, bias: Bias | None, queries: jax.Array, ring: Ring
) -> tuple[jax.Array, Any]:
    """Attends, and says what `_backward` needs."""
    blocks, B, l, U, n, D = query.shape  # noqa: E741
    state = (
        jnp.full((blocks, B, U, n, l), LEAST, jnp.float32),
        jnp.zeros((blocks, B, U, n, l), jnp.float32),
        jnp.zeros((blocks, B, l, U, n, D), jnp.float32),
    )

    def over_held(state: Any, held: Any) -> Any:
        def one_query_block(given: Any) -> Any:
            asking, state = given
            step = functools.partial(_add_block, asking, bias)
            return lax.scan(step, state, held)[0]

        return lax.map(one_query_block, ((query, queries), state))

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        state, here = carry
        coming = _pass_on(here, ring)  # while this one's are looked at
        return (over_held(state, here), coming), None

    here = held
    if ring.axis_size > 1:
        turns = ring.axis_size - 1
        (state, here), _ = lax.scan(turn, (state, here), length=turns)
    top, total, mixed = over_held(state, here)
    # A query that sees anything has a total of at least 1, its greatest weight.
    total = jnp.maximum(total, 0.5)
    mixed /= jnp.moveaxis(total, -1, 2)[..., None]
    mixed = checkpoint_name(mixed.astype(held[1].dtype), ATTENDED_NAMES[0])
    log_total = checkpoint_name(top + jnp.log(total), ATTENDED_NAMES[1])
    return mixed, (query, held, bias, queries, mixed, log_total)


def _add_block(asking, bias, state, held):
    """Adds one block of keys to the running softmax of one block of queries."""
    (query_BlUnD, queries), (key_BtUD, value_BtUD, keys) = asking, held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = visible(queries, keys)

    def add(state: Any) -> Any:
        top_BUnl, total_BUnl, mixed_BlUnD = state
        score_BUnlt = scores(query_BlUnD, key_BtUD, bias, queries, keys, visible_Blt)
        new_top_BUnl = jnp.maximum(top_BUnl, jnp.max(score_BUnlt, axis=-1))
        weight_BUnlt = jnp.exp(score_BUnlt - new_top_BUnl[..., None])
        shrink_BUnl = jnp.exp(top_BUnl - new_top_BUnl)
        total_BUnl = total_BUnl * shrink_BUnl + jnp.sum(weight_BUnlt, axis=-1)
        mixed_BlUnD *= jnp.moveaxis(shrink_BUnl, -1, 1)[..., None]
        mixed_BlUnD += jnp.einsum(
            "BUnlt,BtUD->BlUnD",
            weight_BUnlt.astype(value_BtUD.dtype),
            value_BtUD,
            preferred_element_type=jnp.float32,
        )
        return new_top_BUnl, total_BUnl, mixed_BlUnD

    return lax.cond(jnp.any(visible_Blt), add, lambda state: state, state), None


def _backward(ring: Ring, kept: Any, d_mixed: jax.Array) -> tuple[Any, ...]:
    """Sends gradients back over blocks, all sums in float32 (arXiv:2205.14135, B.4)."""
    query, held, bias, queries, mixed, log_total = kept
    # Of each query: its weights' gradients, averaged by the weights.
    mean = jnp.sum(d_mixed.astype(jnp.float32) * mixed, axis=-1)
    asked = query, queries, d_mixed, log_total, jnp.moveaxis(mean, 2, -1)

    def over_held(sums: Any, held: Any) -> tuple[Any, Any]:
        def one_key_block(sums: Any, held: Any) -> tuple[Any, Any]:
            d_query, d_bias = sums
            step = functools.partial(_add_gradients, held, bias)
            (d_held, d_bias), d_query = lax.scan(
                step, (_zeros(held[:2]), d_bias), (asked, d_query)
            )
            return (d_query, d_bias), d_held

        return lax.scan(one_key_block, sums, held)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        sums, d_held, here = carry
        d_held, coming = _pass_on((d_held, here), ring)  # while this one's are added
        sums, more = over_held(sums, here)
        return (sums, jax.tree.map(jnp.add, d_held, more), coming), None

    sums, d_held = over_held(_zeros((query, bias)), held)
    if ring.axis_size > 1:
        carry = sums, d_held, _pass_on(held, ring)
        (sums, d_held, _), _ = lax.scan(turn, carry, length=ring.axis_size - 1)
    (d_query, d_bias), (d_key, d_value) = jax.tree.map(
        lambda d, x: d.astype(x.dtype), (sums, d_held), ((query, bias), held[:2])
    )
    if ring.axis_size > 1:
        d_key, d_value = _pass_on((d_key, d_value), ring)  # home
    return d_query, (d_key, d_value, None), d_bias, None


attend_blocks.defvjp(_forward, _backward)


def _add_gradients(
    held: Any, bias: Bias | None, sums: Any, scanned: Any
) -> tuple[Any, jax.Array]:
    """Adds what one block of queries owes to one block of keys, and the reverse."""
    (query_BlUnD, queries, d_mixed_BlUnD, log_total_BUnl, mean_BUnl), d_query = scanned
    key_BtUD, value_BtUD, keys = held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = visible(queries, keys)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add(given: Any) -> Any:
        ((d_key, d_value), d_bias), d_query = given
        B, l, U, n, _ = query_BlUnD.shape  # noqa: E741
        score_BUnlt = scores(query_BlUnD, key_BtUD, bias, queries, keys, visible_Blt)
        weight_BUnlt = jnp.exp(score_BUnlt - log_total_BUnl[..., None])
        d_weight_BUnlt = product("BlUnD,BtUD->BUnlt", d_mixed_BlUnD, value_BtUD)
        d_score_BUnlt = weight_BUnlt * (d_weight_BUnlt - mean_BUnl[..., None])
        if bias is not None:
            d_score_BNlt = d_score_BUnlt.reshape(B, U * n, l, -1)
            _, transposed = jax.vjp(lambda b: bias_of(b, queries, keys), bias)
            d_bias = jax.tree.map(jnp.add, d_bias, *transposed(d_score_BNlt))
        weight_BUnlt = weight_BUnlt.astype(value_BtUD.dtype)
        d_score_BUnlt = d_score_BUnlt.astype(key_BtUD.dtype)
        d_key += product("BUnlt,BlUnD->BtUD", d_score_BUnlt, query_BlUnD)
        d_value += product("BUnlt,BlUnD->BtUD", weight_BUnlt, d_mixed_BlUnD)
        d_query += product("BUnlt,BtUD->BlUnD", d_score_BUnlt, key_BtUD)
        return ((d_key, d_value), d_bias), d_query

    return lax.cond(jnp.any(visible_Blt), add, lambda given: given, (sums, d_query))


def packed(seen: Seen) -> jax.Array:
    """Returns one array, so that it travels as one: fields are its last dimension."""
    fields = [seen.segment_BL, seen.place_BL, seen.position_BL, seen.prefix_BL]
    given = [field.astype(jnp.int32) for field in fields if field is not None]
    return jnp.stack(given, axis=-1)


def _unpacked(packed: jax.Array) -> Seen:
    """The reverse of `packed`."""
    segment, place, position, *prefix = jnp.unstack(packed, axis=-1)
    return Seen(place, position, segment, *prefix)


def _zeros(tree: Any) -> Any:
    """Zeros in float32 of the same shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _pass_on(tree: Any, ring: Ring) -> Any:
    """Sends everything to the next device of the ring."""
    size = ring.axis_size
    pairs = [(rank, (rank + 1) % size) for rank in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), tree)
