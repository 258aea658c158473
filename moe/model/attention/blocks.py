"""Attention block by block, at home or round a ring of devices.

Neither pass holds an L × T array: scores are those of one block of queries and one of
keys, under a running softmax (arXiv:1805.02867, algorithm 3). The backward pass
computes them again, from the output and one number per query and head
(arXiv:2205.14135, algorithm 4). Derivatives are written out here, because those that
jax would derive keep what passed by, all of it.

Functions of local arrays; inside `shard_map` they need `check_vma=False`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.model.attention.mask import Who
from moe.model.attention.scoring import LEAST, Scoring, by_key_head, products, scores

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


def attend(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUX: jax.Array,
    queries: Who,
    keys: Who,
    scoring: Scoring,
    *,
    block: int,
    ring: Ring = Ring(),
) -> jax.Array:
    """Mixes values by a softmax over the scores, block by block.

    Pairs of blocks in which nothing is visible are skipped.

    With a ring, keys and values are this device's own, and go round (arXiv:2310.01889):
    `axis_size - 1` times to the next device. The backward pass sends them round again,
    all the way, and with them the sums of their gradients, in float32. A device holds
    its own and its neighbour's. Unlike there, blocks that nothing sees are skipped;
    devices with earlier tokens then wait for those with later ones.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BTUD: keys.
        value_BTUX: values, whose width X may be another.
        queries: who the queries are, by their places in the whole row.
        keys: who the keys are.
        scoring: what scores are made of.
        block: queries, and keys, of a block.
        ring: devices whose keys pass by.
    Returns:
        mixed_BLNX in the dtype of the values; 0 where a query sees nothing.
    """
    B, L, N, _ = query_BLND.shape
    l, t = min(block, L), min(block, key_BTUD.shape[1])  # noqa: E741
    # The mask is the same in every layer. Without this barrier XLA hoists it out of the
    # scan over layers, for all blocks at once: an L × T array.
    asking, asked = lax.optimization_barrier(
        (_packed(queries), _packed(keys), lax.stop_gradient(query_BLND))
    )[:2]
    # Queries of padding get segment -2 and keys -1, so that they never match.
    mixed = _attend_blocks(
        _cut(by_key_head(query_BLND, key_BTUD.shape[2], scoring), l),
        (_cut(key_BTUD, t), _cut(value_BTUX, t), _cut(asked, t, -1)),
        scoring,
        _cut(asking, l, -2),
        ring,
    )
    return jnp.moveaxis(mixed, 0, 1).reshape(B, -1, N, value_BTUX.shape[-1])[:, :L]


def largest(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    queries: Who,
    keys: Who,
    scoring: Scoring,
    *,
    block: int,
    ring: Ring = Ring(),
) -> jax.Array:
    """Returns largest_N, the greatest product of each head that a query sees.

    In float32 and scaled, before any bound or bias; LEAST where nothing is seen.
    Padding, of segment 0, sees nothing here. There is no gradient, and no L × T array
    is whole. On a ring the keys go round once.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BTUD: keys.
        queries: who the queries are.
        keys: who the keys are.
        scoring: the scale, and who sees whom.
        block: queries, and keys, of a block; 0 takes all at once.
        ring: devices whose keys pass by.
    """
    query_BLND, key_BTUD = lax.stop_gradient((query_BLND, key_BTUD))
    (_, L, N, _), (_, T, U, _) = query_BLND.shape, key_BTUD.shape
    l, t = min(block or L, L), min(block or T, T)  # noqa: E741
    asking = (
        _cut(by_key_head(query_BLND, U, scoring), l),
        _cut(_packed(queries), l, -2),
    )
    held = _cut(key_BTUD, t), _cut(_packed(keys), t, -1)

    def add(held: Any, most_Un: jax.Array, asking: Any) -> tuple[jax.Array, None]:
        (query_BlUnD, queries), (key_BtUD, keys) = asking, held
        queries, keys = _unpacked(queries), _unpacked(keys)
        visible_Blt = scoring.visible(queries, keys)
        visible_Blt &= queries.segment_BL[:, :, None] > 0

        def greater(most_Un: jax.Array) -> jax.Array:
            product_BUnlt = products(query_BlUnD, key_BtUD)
            seen = jnp.where(visible_Blt[:, None, None], product_BUnlt, LEAST)
            return jnp.maximum(most_Un, jnp.max(seen, axis=(0, 3, 4)))

        return lax.cond(jnp.any(visible_Blt), greater, lambda most: most, most_Un), None

    def over_held(most_Un: jax.Array, held: Any) -> jax.Array:
        def one_key_block(most_Un: jax.Array, held: Any) -> tuple[jax.Array, None]:
            return lax.scan(functools.partial(add, held), most_Un, asking)[0], None

        return lax.scan(one_key_block, most_Un, held)[0]

    most_Un = over_held(jnp.full((U, N // U), LEAST, jnp.float32), held)
    if ring.axis_size > 1:

        def turn(carry: Any, _: None) -> tuple[Any, None]:
            most_Un, here = carry
            here = _pass_on(here, ring)
            return (over_held(most_Un, here), here), None

        turns = ring.axis_size - 1
        (most_Un, _), _ = lax.scan(turn, (most_Un, held), length=turns)
    return most_Un.reshape(N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_blocks(
    query: jax.Array, held: Any, scoring: Scoring, queries: jax.Array, ring: Ring
) -> jax.Array:
    """Attends; everything is in blocks, along a leading dimension.

    Args:
        query: query_BlUnD of each block.
        held: keys of each block (key_BtUD, value_BtUX, and who the keys are, as
            `_packed`).
        scoring: what scores are made of.
        queries: who the queries are, as `_packed`.
        ring: devices whose keys pass by.
    Returns:
        mixed_BlUnX of each block, in the dtype of the values.
    """
    return _forward(query, held, scoring, queries, ring)[0]


def _forward(
    query: jax.Array, held: Any, scoring: Scoring, queries: jax.Array, ring: Ring
) -> tuple[jax.Array, Any]:
    """Attends, and says what `_backward` needs."""
    blocks, B, l, U, n, _ = query.shape  # noqa: E741
    top_Un1, of_sink = jnp.full((U, n, 1), LEAST, jnp.float32), 0.0
    if scoring.sink_N is not None:  # a score that every softmax has from the start
        top_Un1, of_sink = scoring.sink_N.astype(jnp.float32).reshape(U, n, 1), 1.0
    state = (
        jnp.broadcast_to(top_Un1, (blocks, B, U, n, l)),
        jnp.full((blocks, B, U, n, l), of_sink, jnp.float32),
        jnp.zeros((blocks, B, l, U, n, held[1].shape[-1]), jnp.float32),
    )

    def over_held(state: Any, held: Any) -> Any:
        def one_query_block(given: Any) -> Any:
            asking, state = given
            step = functools.partial(_add_block, asking, scoring)
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
    return mixed, (query, held, scoring, queries, mixed, log_total)


def _add_block(asking, scoring, state, held):
    """Adds one block of keys to the running softmax of one block of queries."""
    (query_BlUnD, queries), (key_BtUD, value_BtUX, keys) = asking, held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = scoring.visible(queries, keys)

    def add(state: Any) -> Any:
        top_BUnl, total_BUnl, mixed_BlUnX = state
        product_BUnlt = products(query_BlUnD, key_BtUD)
        score_BUnlt = scores(product_BUnlt, scoring, queries, keys, visible_Blt)
        new_top_BUnl = jnp.maximum(top_BUnl, jnp.max(score_BUnlt, axis=-1))
        weight_BUnlt = jnp.exp(score_BUnlt - new_top_BUnl[..., None])
        shrink_BUnl = jnp.exp(top_BUnl - new_top_BUnl)
        total_BUnl = total_BUnl * shrink_BUnl + jnp.sum(weight_BUnlt, axis=-1)
        mixed_BlUnX *= jnp.moveaxis(shrink_BUnl, -1, 1)[..., None]
        mixed_BlUnX += jnp.einsum(
            "BUnlt,BtUX->BlUnX",
            weight_BUnlt.astype(value_BtUX.dtype),
            value_BtUX,
            preferred_element_type=jnp.float32,
        )
        return new_top_BUnl, total_BUnl, mixed_BlUnX

    return lax.cond(jnp.any(visible_Blt), add, lambda state: state, state), None


def _backward(ring: Ring, kept: Any, d_mixed: jax.Array) -> tuple[Any, ...]:
    """Sends gradients back over blocks, all sums in float32 (arXiv:2205.14135, B.4)."""
    query, held, scoring, queries, mixed, log_total = kept
    # Of each query: its weights' gradients, averaged by the weights.
    mean = jnp.sum(d_mixed.astype(jnp.float32) * mixed, axis=-1)
    mean = jnp.moveaxis(mean, 2, -1)
    asked = query, queries, d_mixed, log_total, mean

    def over_held(sums: Any, held: Any) -> tuple[Any, Any]:
        def one_key_block(sums: Any, held: Any) -> tuple[Any, Any]:
            d_query, d_scoring = sums
            step = functools.partial(_add_gradients, held, scoring)
            (d_held, d_scoring), d_query = lax.scan(
                step, (_zeros(held[:2]), d_scoring), (asked, d_query)
            )
            return (d_query, d_scoring), d_held

        return lax.scan(one_key_block, sums, held)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        sums, d_held, here = carry
        d_held, coming = _pass_on((d_held, here), ring)  # while this one's are added
        sums, more = over_held(sums, here)
        return (sums, jax.tree.map(jnp.add, d_held, more), coming), None

    sums, d_held = over_held(_zeros((query, scoring)), held)
    if ring.axis_size > 1:
        carry = sums, d_held, _pass_on(held, ring)
        (sums, d_held, _), _ = lax.scan(turn, carry, length=ring.axis_size - 1)
    d_query, d_scoring = sums
    if scoring.sink_N is not None:
        sink_Un1 = scoring.sink_N.astype(jnp.float32).reshape(*query.shape[3:5], 1)
        d_sink_Un = -jnp.sum(jnp.exp(sink_Un1 - log_total) * mean, axis=(0, 1, -1))
        d_scoring = dataclasses.replace(d_scoring, sink_N=d_sink_Un.reshape(-1))
    (d_query, d_scoring), (d_key, d_value) = jax.tree.map(
        lambda d, x: d.astype(x.dtype),
        ((d_query, d_scoring), d_held),
        ((query, scoring), held[:2]),
    )
    if ring.axis_size > 1:
        d_key, d_value = _pass_on((d_key, d_value), ring)  # home
    return d_query, (d_key, d_value, None), d_scoring, None


_attend_blocks.defvjp(_forward, _backward)


def _add_gradients(
    held: Any, scoring: Scoring, sums: Any, scanned: Any
) -> tuple[Any, jax.Array]:
    """Adds what one block of queries owes to one block of keys, and the reverse."""
    (query_BlUnD, queries, d_mixed_BlUnX, log_total_BUnl, mean_BUnl), d_query = scanned
    key_BtUD, value_BtUX, keys = held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = scoring.visible(queries, keys)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add(given: Any) -> Any:
        ((d_key, d_value), d_scoring), d_query = given
        score_BUnlt, transposed = jax.vjp(
            lambda product, scoring: scores(
                product, scoring, queries, keys, visible_Blt
            ),
            products(query_BlUnD, key_BtUD),
            scoring,
        )
        weight_BUnlt = jnp.exp(score_BUnlt - log_total_BUnl[..., None])
        d_weight_BUnlt = product("BlUnX,BtUX->BUnlt", d_mixed_BlUnX, value_BtUX)
        d_score_BUnlt = weight_BUnlt * (d_weight_BUnlt - mean_BUnl[..., None])
        d_product_BUnlt, more = transposed(d_score_BUnlt)
        d_scoring = jax.tree.map(jnp.add, d_scoring, more)
        weight_BUnlt = weight_BUnlt.astype(value_BtUX.dtype)
        d_product_BUnlt = d_product_BUnlt.astype(key_BtUD.dtype)
        d_key += product("BUnlt,BlUnD->BtUD", d_product_BUnlt, query_BlUnD)
        d_value += product("BUnlt,BlUnX->BtUX", weight_BUnlt, d_mixed_BlUnX)
        d_query += product("BUnlt,BtUD->BlUnD", d_product_BUnlt, key_BtUD)
        return ((d_key, d_value), d_scoring), d_query

    return lax.cond(jnp.any(visible_Blt), add, lambda given: given, (sums, d_query))


def _packed(who: Who) -> jax.Array:
    """Makes one array [B, L, fields], so that it travels as one."""
    place_BL = jnp.broadcast_to(who.place_L, who.segment_BL.shape)
    fields = [who.segment_BL, place_BL, who.prefix_BL]
    given = [field.astype(jnp.int32) for field in fields if field is not None]
    return jnp.stack(given, axis=-1)


def _unpacked(packed: jax.Array) -> Who:
    """The reverse of `_packed`."""
    segment_BL, place_BL, *prefix = jnp.unstack(packed, axis=-1)
    return Who(place_BL[0], segment_BL, *prefix)


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


def _zeros(tree: Any) -> Any:
    """Zeros in float32 of the same shapes."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _pass_on(tree: Any, ring: Ring) -> Any:
    """Sends everything to the next device of the ring."""
    size = ring.axis_size
    pairs = [(rank, (rank + 1) % size) for rank in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, pairs), tree)
