"""Who sees whom."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Who:
    """What decides who sees whom, of queries or of keys; int32.

    Attributes:
        place_L: places in the whole row, one after the other.
        segment_BL: segment; not negative.
        prefix_BL: above 0 for tokens of their segment's prefix; None if there is none.
    """

    place_L: jax.Array
    segment_BL: jax.Array
    prefix_BL: jax.Array | None = None


def visible(
    queries: Who, keys: Who, window: int = 0, *, causal: bool = True
) -> jax.Array:
    """Returns visible_BLT: a query sees itself, the past, and its own prefix whole.

    Args:
        queries: who the queries are.
        keys: who the keys are.
        window: places, a query's own among them, that it sees back, and in its prefix
            ahead; 0 sets no bound.
        causal: whether it does not see what follows; else all of its segment.
    Raises:
        ValueError: queries or keys have prefixes, and the others have not.
    """
    seen_BLT = (queries.place_L[:, None] >= keys.place_L)[None] | (not causal)
    if causal and (queries.prefix_BL is None) != (keys.prefix_BL is None):
        raise ValueError("give prefix_BL of both queries and keys, or of neither")
    if causal and queries.prefix_BL is not None and keys.prefix_BL is not None:
        in_prefix_BLT = queries.prefix_BL[:, :, None] > 0
        seen_BLT |= in_prefix_BLT & (keys.prefix_BL[:, None, :] > 0)
    if window:
        seen_BLT &= jnp.abs(queries.place_L[:, None] - keys.place_L) < window
    return seen_BLT & (queries.segment_BL[:, :, None] == keys.segment_BL[:, None, :])
