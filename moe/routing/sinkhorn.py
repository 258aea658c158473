"""Sinkhorn: assignments balanced by scaling rows and columns.

S-BASE (arXiv:2202.01169, section 4.1), which takes an entropy-regularised optimal
transport for the linear assignment of BASE (arXiv:2103.16716, section 3.1).
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
    """Assigns every real token to the K experts that its balanced row prefers.

    In training a group's softmax is scaled until every expert has the same mass;
    outside it, where one token must not depend on others, the largest logits win.

    Args:
        logits_GSE: float32.
        context: mask; keys mark training.
        settings: K, iterations, renormalisation, slot order.
        capacity: C, slots per expert per group.
    Returns:
        An Assignment with J = K. Gates are the plain softmax, with its gradient.
    """
    G, S, _ = logits_GSE.shape
    K = settings.num_selected
    probability_GSE = jax.nn.softmax(logits_GSE)
    wish_GSE = jax.lax.stop_gradient(logits_GSE)
    if context.key_G is not None:
        wish_GSE = jax.vmap(
            lambda logits_SE, mask_S: balanced(
                logits_SE, mask_S, settings.sinkhorn_iterations
            )
        )(wish_GSE, context.mask_GS)
    _, expert_GSK = jax.lax.top_k(wish_GSE, K)
    gate_GSK = pick(probability_GSE, expert_GSK)
    if settings.renormalize == "before_drop":
        gate_GSK = renormalized(gate_GSK)
    return assign(
        Choices(
            expert_GSJ=expert_GSK,
            active_GSJ=jnp.broadcast_to(context.mask_GS[..., None], (G, S, K)),
            first_GSJ=jnp.broadcast_to(jnp.arange(K) == 0, (G, S, K)),
            gate_GSJ=gate_GSK,
            probability_GSE=probability_GSE,
            priority_GS=priority(gate_GSK, settings),
        ),
        logits_GSE,
        context.mask_GS,
        settings,
        capacity=capacity,
    )


def balanced(logits_SE: jax.Array, mask_S: jax.Array, iterations: int) -> jax.Array:
    """Returns the logarithm of exp(logits), scaled to rows of 1 and even columns.

    Padding has no mass. Columns come last, so that they are even exactly.
    """
    num_experts = logits_SE.shape[-1]
    log_share = jnp.log(jnp.maximum(jnp.sum(mask_S), 1) / num_experts)
    real_S1 = mask_S[:, None]

    def scale(log_a: jax.Array, _: None) -> tuple[jax.Array, None]:
        log_a -= jax.nn.logsumexp(log_a, axis=1, keepdims=True)
        column_E = jax.nn.logsumexp(jnp.where(real_S1, log_a, -1e30), axis=0)
        return log_a + log_share - column_E, None

    return jax.lax.scan(scale, logits_SE, None, length=iterations)[0]
