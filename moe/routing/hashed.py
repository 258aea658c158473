"""Hash routing: a fixed random table from token id to expert (arXiv:2106.04426).

Section 3.2, balanced hashing: every expert gets the same number of ids. Nothing is
learnt, so there are no logits; or they only weigh, as in DeepSeek-V4's first layers.
"""

import jax
import jax.numpy as jnp

from moe.routing.assignment import (
    Assignment,
    Choices,
    RouterContext,
    assign,
    renormalized,
)
from moe.routing.token_choice import pick, priority, scores
from moe.settings import RouterSettings


def vocabulary_order(seed: int, layer: jax.Array, vocab_size: int) -> jax.Array:
    """Returns this layer's random order of the vocabulary, int32 [V].

    The same in training and after it: it depends on the layer and on HASH_SEED alone.
    """
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return jax.random.permutation(key, vocab_size).astype(jnp.int32)


def route(
    logits_GSE: jax.Array,
    context: RouterContext,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Assigns token id v, at place p of the vocabulary's order, to experts p + k mod E.

    Args:
        logits_GSE: float32, of which gates by scores are made; for even ones only
            their shape is looked at.
        context: mask, token ids and the order of the vocabulary.
        settings: K, gates, scores, renormalisation and slot order.
        capacity: C, slots per expert per group.
    Returns:
        An Assignment with J = K, and gates of 1/K or of the scores, with their
        gradient. Probabilities are 0, since no loss could even out a table; z is that
        of the logits, if they weigh.
    """
    G, S, E = logits_GSE.shape
    K = settings.num_selected
    assert context.order_V is not None  # the sparse layer gives both to it
    assert context.token_GS is not None
    place_GS = jnp.take(context.order_V, context.token_GS)
    expert_GSK = (place_GS[..., None] + jnp.arange(K)) % E
    weighs = settings.reads_logits
    gate_GSK = jnp.full((G, S, K), 1.0 / K)
    if weighs:
        gate_GSK = pick(scores(logits_GSE, settings)[0], expert_GSK)
        if settings.renormalize == "before_drop":
            gate_GSK = renormalized(gate_GSK)
    return assign(
        Choices(
            expert_GSJ=expert_GSK,
            active_GSJ=jnp.broadcast_to(context.mask_GS[..., None], (G, S, K)),
            first_GSJ=jnp.broadcast_to(jnp.arange(K) == 0, (G, S, K)),
            gate_GSJ=gate_GSK,
            probability_GSE=jnp.zeros((G, S, E)),
            priority_GS=priority(gate_GSK, settings),
        ),
        logits_GSE if weighs else None,
        context.mask_GS,
        settings,
        capacity=capacity,
    )
