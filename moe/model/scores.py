"""Scores of queries and keys: who sees whom, products, and a bias by distance."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.model.positions import relative_bias

NEVER = -1e30  # the score of a key that must not be seen
# No maximum is lower. A query that sees nothing then has weights exp(NEVER - LEAST) = 0
# and the output 0, whichever blocks were skipped.
LEAST = NEVER / 2


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


def visible(queries: Seen, keys: Seen) -> jax.Array:
    """Returns visible_BLT: a query sees itself, the past, and its own prefix whole.

    Raises:
        ValueError: queries or keys have prefixes, and the others have not.
    """
    seen_BLT = queries.place_BL[:, :, None] >= keys.place_BL[:, None, :]
    if (queries.prefix_BL is None) != (keys.prefix_BL is None):
        raise ValueError("give prefix_BL of both queries and keys, or of neither")
    if queries.prefix_BL is not None and keys.prefix_BL is not None:
        in_prefix_BLT = queries.prefix_BL[:, :, None] > 0
        seen_BLT |= in_prefix_BLT & (keys.prefix_BL[:, None, :] > 0)
    return seen_BLT & (queries.segment_BL[:, :, None] == keys.segment_BL[:, None, :])


def scores(
    query_BLUnD: jax.Array,
    key_BTUD: jax.Array,
    bias: Bias | None,
    queries: Seen,
    keys: Seen,
    visible_BLT: jax.Array,
) -> jax.Array:
    """Returns score_BUnLT in float32; it is NEVER where nothing may be seen."""
    score_BUnLT = jnp.einsum(
        "BLUnD,BTUD->BUnLT",
        query_BLUnD,
        key_BTUD,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        score_BUnLT += bias_of(bias, queries, keys).reshape(score_BUnLT.shape)
    return jnp.where(visible_BLT[:, None, None], score_BUnLT, NEVER)


def bias_of(bias: Bias, queries: Seen, keys: Seen) -> jax.Array:
    """Returns bias_BNLT of these queries and keys."""
    return relative_bias(
        bias.table, queries.position_BL, keys.position_BL, bias.max_distance
    )
