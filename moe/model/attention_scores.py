"""Attention of queries to keys and values: whole, block by block, or round a ring.

All three compute the same. `attend_whole` holds every score at once; the others hold
those of one block of queries and one of keys, forward and backward, and keep a running
softmax (arXiv:1805.02867, algorithm 3; arXiv:2205.14135). Keys and values may have
fewer heads than queries, each shared by as many neighbours (arXiv:2305.13245).

Functions of local arrays; inside `shard_map` they need `check_vma=False`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.model.positions import relative_bias

NEVER = -1e30  # the score of a key that must not be seen
# No maximum is lower. A query that sees nothing then has weights exp(NEVER - LEAST) = 0
# and the output 0, whichever blocks were skipped.
LEAST = NEVER / 2
# What the block-wise ways leave for their backward pass; a remat policy may save both.
ATTENDED_NAMES = ("attended", "attended_log_total")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """What decides who sees whom, of queries or of keys; each int32 [B, L].

    Attributes:
        place_BL: place in the whole row.
        position_BL: position in the segment; only a bias looks at it.
        segment_BL: segment; not negative.
        prefix_BL: above 0 for tokens of their segment's prefix; None if there is none.
    """

    place_BL: jax.Array
    position_BL: jax.Array
    segment_BL: jax.Array
    prefix_BL: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """A bias by bucket of distance, added to the scores.

    Attributes:
        table: [buckets, N].
        max_distance: beyond it all distances share the last bucket.
    """

    table: jax.Array
    max_distance: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How blocks are walked through; static."""

    max_distance: int
    axis: str = ""
    axis_size: int = 1


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
        query_BLND: queries; N is a multiple of U.
        key_BTUD: keys.
        value_BTUD: values.
        queries: who the queries are.
        keys: who the keys are.
        bias: added to the scores.
    Returns:
        mixed_BLND in the dtype of the values; 0 where a query sees nothing.
    """
    query_BLUnD = _grouped(query_BLND, key_BTUD.shape[2])
    visible_BLT = _visible(queries, keys)
    table = None if bias is None else bias.table
    walk = _Walk(0 if bias is None else bias.max_distance)
    score_BUnLT = _scores(
        query_BLUnD, key_BTUD, table, queries, keys, visible_BLT, walk
    )
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
        query_BLND: queries; N is a multiple of U.
        key_BTUD: keys.
        value_BTUD: values.
        queries: who the queries are.
        keys: who the keys are.
        bias: added to the scores.
        block: queries, and keys, of a block.
    Returns:
        mixed_BLND in the dtype of the values; 0 where a query sees nothing.
    """
    walk = _Walk(0 if bias is None else bias.max_distance)
    return _attend(query_BLND, key_BTUD, value_BTUD, queries, keys, bias, walk, block)


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
        query_BLND: this device's queries; N is a multiple of U.
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
    walk = _Walk(0 if bias is None else bias.max_distance, axis, axis_size)
    return _attend(query_BLND, key_BTUD, value_BTUD, queries, keys, bias, walk, block)


def _attend(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUD: jax.Array,
    queries: Seen,
    keys: Seen,
    bias: Bias | None,
    walk: _Walk,
    block: int,
) -> jax.Array:
    """Cuts everything into blocks, a leading dimension, and mends the cut."""
    B, L, N, D = query_BLND.shape
    l, t = min(block, L), min(block, key_BTUD.shape[1])  # noqa: E741
    # Padding is of segments that nobody has, and neither sees the other.
    mixed = _walk_blocks(
        _cut(_grouped(query_BLND, key_BTUD.shape[2]), l),
        (_cut(key_BTUD, t), _cut(value_BTUD, t), _cut(_packed(keys), t, -1)),
        None if bias is None else bias.table,
        _cut(_packed(queries), l, -2),
        walk,
    )
    return jnp.moveaxis(mixed, 0, 1).reshape(B, -1, N, D)[:, :L]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _walk_blocks(query, held, table, queries, walk):
    """Attends, over blocks; see `_forward`."""
    return _forward(query, held, table, queries, walk)[0]


def _forward(query, held, table, queries, walk: _Walk) -> tuple[jax.Array, Any]:
    """Attends, over blocks [blocks, B, l, …].

    Args:
        query: query_BlUnD of each block.
        held: key_BtUD, value_BtUD and who they are, of each block.
        table: of the bias, or None.
        queries: who the queries are.
        walk: what is static.
    Returns:
        mixed_BlUnD of each block, and what `_backward` needs.
    """
    blocks, B, l, U, n, D = query.shape  # noqa: E741
    state = (
        jnp.full((blocks, B, U, n, l), LEAST, jnp.float32),
        jnp.zeros((blocks, B, U, n, l), jnp.float32),
        jnp.zeros((blocks, B, l, U, n, D), jnp.float32),
    )

    def over_held(state, held):
        def one_query_block(given):
            asking, state = given
            step = functools.partial(_add_block, asking, table, walk)
            return lax.scan(step, state, held)[0]

        return lax.map(one_query_block, ((query, queries), state))

    def turn(carry, _):
        state, here = carry
        coming = _pass_on(here, walk)  # while this one's are looked at
        return (over_held(state, here), coming), None

    here = held
    if walk.axis_size > 1:
        turns = walk.axis_size - 1
        (state, here), _ = lax.scan(turn, (state, here), length=turns)
    top, total, mixed = over_held(state, here)
    # A query that sees anything has a total of at least 1, its greatest weight.
    total = jnp.maximum(total, 0.5)
    mixed /= jnp.moveaxis(total, -1, 2)[..., None]
    mixed = checkpoint_name(mixed.astype(held[1].dtype), ATTENDED_NAMES[0])
    log_total = checkpoint_name(top + jnp.log(total), ATTENDED_NAMES[1])
    return mixed, (query, held, table, queries, mixed, log_total)


def _add_block(asking, table, walk, state, held):
    """Adds one block of keys to the running softmax of one block of queries."""
    (query_BlUnD, queries), (key_BtUD, value_BtUD, keys) = asking, held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = _visible(queries, keys)

    def add(state):
        top_BUnl, total_BUnl, mixed_BlUnD = state
        score_BUnlt = _scores(
            query_BlUnD, key_BtUD, table, queries, keys, visible_Blt, walk
        )
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


def _backward(walk: _Walk, kept: Any, d_mixed: jax.Array) -> tuple[Any, ...]:
    """Sends gradients back over blocks, all sums in float32 (arXiv:2205.14135, B.4)."""
    query, held, table, queries, mixed, log_total = kept
    # Of each query: its weights' gradients, averaged by the weights.
    mean = jnp.sum(d_mixed.astype(jnp.float32) * mixed, axis=-1)
    asked = query, queries, d_mixed, log_total, jnp.moveaxis(mean, 2, -1)

    def over_held(sums: Any, held: Any) -> tuple[Any, Any]:
        def one_key_block(sums: Any, held: Any) -> tuple[Any, Any]:
            d_query, d_table = sums
            step = functools.partial(_add_gradients, held, table, walk)
            (d_held, d_table), d_query = lax.scan(
                step, (_zeros(held[:2]), d_table), (asked, d_query)
            )
            return (d_query, d_table), d_held

        return lax.scan(one_key_block, sums, held)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        sums, d_held, here = carry
        d_held, coming = _pass_on((d_held, here), walk)  # while this one's are added
        sums, more = over_held(sums, here)
        return (sums, jax.tree.map(jnp.add, d_held, more), coming), None

    sums, d_held = over_held(_zeros((query, table)), held)
    if walk.axis_size > 1:
        carry = sums, d_held, _pass_on(held, walk)
        (sums, d_held, _), _ = lax.scan(turn, carry, length=walk.axis_size - 1)
        d_held = _pass_on(d_held, walk)  # home
    (d_query, d_table), (d_key, d_value) = jax.tree.map(
        lambda d, x: d.astype(x.dtype), (sums, d_held), ((query, table), held[:2])
    )
    return d_query, (d_key, d_value, None), d_table, None


_walk_blocks.defvjp(_forward, _backward)


def _add_gradients(
    held: Any, table: jax.Array | None, walk: _Walk, sums: Any, scanned: Any
) -> tuple[Any, jax.Array]:
    """Adds what one block of queries owes to one block of keys, and the reverse."""
    (query_BlUnD, queries, d_mixed_BlUnD, log_total_BUnl, mean_BUnl), d_query = scanned
    key_BtUD, value_BtUD, keys = held
    queries, keys = _unpacked(queries), _unpacked(keys)
    visible_Blt = _visible(queries, keys)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def add(given: Any) -> Any:
        ((d_key, d_value), d_table), d_query = given
        score_BUnlt = _scores(
            query_BlUnD, key_BtUD, table, queries, keys, visible_Blt, walk
        )
        weight_BUnlt = jnp.exp(score_BUnlt - log_total_BUnl[..., None])
        d_weight_BUnlt = product("BlUnD,BtUD->BUnlt", d_mixed_BlUnD, value_BtUD)
        d_score_BUnlt = weight_BUnlt * (d_weight_BUnlt - mean_BUnl[..., None])
        if table is not None:
            look_up = functools.partial(_bias, queries=queries, keys=keys, walk=walk)
            _, transposed = jax.vjp(look_up, table.astype(jnp.float32))
            (more,) = transposed(_all_heads(d_score_BUnlt))
            d_table += more
        weight_BUnlt = weight_BUnlt.astype(value_BtUD.dtype)
        d_score_BUnlt = d_score_BUnlt.astype(key_BtUD.dtype)
        d_key += product("BUnlt,BlUnD->BtUD", d_score_BUnlt, query_BlUnD)
        d_value += product("BUnlt,BlUnD->BtUD", weight_BUnlt, d_mixed_BlUnD)
        d_query += product("BUnlt,BtUD->BlUnD", d_score_BUnlt, key_BtUD)
        return ((d_key, d_value), d_table), d_query

    return lax.cond(jnp.any(visible_Blt), add, lambda given: given, (sums, d_query))


def _scores(
    query_BLUnD: jax.Array,
    key_BTUD: jax.Array,
    table: jax.Array | None,
    queries: Seen,
    keys: Seen,
    visible_BLT: jax.Array,
    walk: _Walk,
) -> jax.Array:
    """Scores in float32, with the bias, and NEVER where nothing may be seen."""
    score_BUnLT = jnp.einsum(
        "BLUnD,BTUD->BUnLT",
        query_BLUnD,
        key_BTUD,
        preferred_element_type=jnp.float32,
    )
    if table is not None:
        bias_BNLT = _bias(table, queries, keys, walk)
        score_BUnLT += bias_BNLT.reshape(score_BUnLT.shape)
    return jnp.where(visible_BLT[:, None, None], score_BUnLT, NEVER)


def _bias(table: jax.Array, queries: Seen, keys: Seen, walk: _Walk) -> jax.Array:
    """The bias of these queries and keys, [B, N, L, T]."""
    return relative_bias(
        table, queries.position_BL, keys.position_BL, walk.max_distance
    )


def _visible(queries: Seen, keys: Seen) -> jax.Array:
    """Whether a query sees a key: itself, the past, and its own prefix whole.

    Raises:
        ValueError: queries or keys have prefixes, and the others have not.
    """
    seen_BLT = queries.place_BL[:, :, None] >= keys.place_BL[:, None, :]
    if queries.prefix_BL is not None and keys.prefix_BL is not None:
        in_prefix_BLT = queries.prefix_BL[:, :, None] > 0
        seen_BLT |= in_prefix_BLT & (keys.prefix_BL[:, None, :] > 0)
    elif queries.prefix_BL is not None or keys.prefix_BL is not None:
        raise ValueError("give prefix_BL of both queries and keys, or of neither")
    return seen_BLT & (queries.segment_BL[:, :, None] == keys.segment_BL[:, None, :])


def _grouped(query_BLND: jax.Array, U: int) -> jax.Array:
    """Queries by the head of keys that they share, scaled: there are more scores."""
    B, L, N, D = query_BLND.shape
    return (query_BLND / D**0.5).reshape(B, L, U, N // U, D)


def _all_heads(score_BUnLT: jax.Array) -> jax.Array:
    """Scores of heads in one dimension, [B, N, L, T]."""
    B, _, _, L, T = score_BUnLT.shape
    return score_BUnLT.reshape(B, -1, L, T)


def _packed(seen: Seen) -> jax.Array:
    """One array, so that it travels as one: the fields are its last dimension."""
    fields = [seen.segment_BL, seen.place_BL, seen.position_BL, seen.prefix_BL]
    fields = [field for field in fields if field is not None]
    return jnp.stack([field.astype(jnp.int32) for field in fields], axis=-1)


def _unpacked(packed: jax.Array) -> Seen:
    """The reverse of `_packed`."""
    segment, place, position, *prefix = jnp.unstack(packed, axis=-1)
    return Seen(place, position, segment, *prefix)


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


def _pass_on(tree: Any, walk: _Walk) -> Any:
    """Sends everything to the next device of the ring."""
    size = walk.axis_size
    pairs = [(rank, (rank + 1) % size) for rank in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, walk.axis, pairs), tree)
