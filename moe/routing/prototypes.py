"""Prototypes: experts in Z groups, and K choices in each (M6-T, arXiv:2105.15082).

Section 3.3: k top-1 is Z = k prototypes with K = 1; the outputs of all are summed.
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
from moe.routing.token_choice import pick, priority
from moe.settings import RouterSettings


def route(
    logits_GSE: jax.Array,
    context: RouterContext,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Assigns every real token to its K most probable experts of every prototype.

    Args:
        logits_GSE: float32; prototype z is experts [z·E/Z, (z+1)·E/Z), with a softmax
            of its own.
        context: the mask.
        settings: Z, K, renormalisation within a prototype, slot order.
        capacity: C, slots per expert per group.
    Returns:
        An Assignment with J = Z·K, prototype by prototype. Probabilities sum to Z.
    """
    G, S, E = logits_GSE.shape
    Z, K = settings.num_prototypes, settings.num_selected
    shape_GSZk = (G, S, Z, E // Z)
    logits_GSZk = logits_GSE.reshape(shape_GSZk)
    probability_GSZk = jax.nn.softmax(logits_GSZk)
    _, place_GSZK = jax.lax.top_k(jax.lax.stop_gradient(probability_GSZk), K)
    expert_GSZK = place_GSZK + jnp.arange(Z)[:, None] * (E // Z)
    expert_GSJ = expert_GSZK.reshape(G, S, Z * K)

    gate_GSJ = pick(probability_GSZk.reshape(G, S, E), expert_GSJ)
    if settings.renormalize == "before_drop":
        gate_GSJ = renormalized(gate_GSJ.reshape(G, S, Z, K)).reshape(G, S, Z * K)

    return assign(
        Choices(
            expert_GSJ=expert_GSJ,
            active_GSJ=jnp.broadcast_to(context.mask_GS[..., None], (G, S, Z * K)),
            first_GSJ=jnp.broadcast_to(jnp.arange(Z * K) % K == 0, (G, S, Z * K)),
            gate_GSJ=gate_GSJ,
            probability_GSE=probability_GSZk.reshape(G, S, E),
            priority_GS=priority(gate_GSJ, settings),
        ),
        logits_GSZk,
        context.mask_GS,
        settings,
        capacity=capacity,
    )
