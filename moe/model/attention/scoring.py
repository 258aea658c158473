"""From products of queries and keys to the scores that a softmax takes."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.model.attention.mask import Who, visible
from moe.model.attention.positions import Bias

NEVER = -1e30  # the score of a key that must not be seen
# No maximum is lower. A query that sees nothing then has weights exp(NEVER - LEAST) = 0
# and the output 0, whichever blocks were skipped.
LEAST = NEVER / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scoring:
    """What scores are made of beside queries and keys.

    Attributes:
        scale: factor of the products; it is applied to the queries.
        window: places that a query sees back; 0 sets no bound.
        cap: bound of the scores, which come as cap·tanh(score / cap) (Gemma 2,
            arXiv:2408.00118, section 2); 0 sets none.
        bias: added after that; None without.
        sink_N: score of each head that no key has, in every softmax (arXiv:2309.17453,
            section 3.3, as one learned number); None without.
        causal: whether a query sees nothing that follows it.
    """

    scale: float = dataclasses.field(metadata={"static": True})
    window: int = dataclasses.field(default=0, metadata={"static": True})
    cap: float = dataclasses.field(default=0.0, metadata={"static": True})
    bias: Bias | None = None
    sink_N: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    def visible(self, queries: Who, keys: Who) -> jax.Array:
        """Returns visible_BLT."""
        return visible(queries, keys, self.window, causal=self.causal)


def products(query_BLUnD: jax.Array, key_BTUD: jax.Array) -> jax.Array:
    """Returns product_BUnLT in float32, of queries by the head of keys they share."""
    return jnp.einsum(
        "BLUnD,BTUD->BUnLT",
        query_BLUnD,
        key_BTUD,
        preferred_element_type=jnp.float32,
    )


def scores(
    product_BUnLT: jax.Array,
    scoring: Scoring,
    queries: Who,
    keys: Who,
    visible_BLT: jax.Array,
) -> jax.Array:
    """Returns score_BUnLT in float32; it is NEVER where nothing may be seen."""
    _, U, n, L, T = product_BUnLT.shape
    score_BUnLT = product_BUnLT
    if scoring.cap:
        score_BUnLT = scoring.cap * jnp.tanh(score_BUnLT / scoring.cap)
    if scoring.bias is not None:
        bias_NLT = scoring.bias.of(queries.place_L, keys.place_L)
        score_BUnLT += bias_NLT.reshape(U, n, L, T)
    return jnp.where(visible_BLT[:, None, None], score_BUnLT, NEVER)


def by_key_head(query_BLND: jax.Array, U: int, scoring: Scoring) -> jax.Array:
    """Returns query_BLUnD, scaled: there are more scores than queries."""
    B, L, N, D = query_BLND.shape
    scaled_BLND = query_BLND.astype(jnp.float32) * scoring.scale
    return scaled_BLND.astype(query_BLND.dtype).reshape(B, L, U, N // U, D)
