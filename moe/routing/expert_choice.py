"""Expert choice: every expert picks its C best tokens (arXiv:2202.09368).

Loads are even by construction. A token may be taken by several experts, or by none,
and whether it is taken depends on the other tokens of its group.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routing.assignment import Assignment, Choices, RouterContext, assign
from moe.routing.token_choice import pick
from moe.settings import RouterSettings

ENTROPY_WEIGHT = 0.001  # λ of section 3.3
PROJECTIONS = 100  # of Dykstra's algorithm, as in appendix B.1
# λ falls from this to that: a hundred projections at 0.001 alone end far from the
# optimum, and keep less than cutting off what exceeds the cap.
FIRST_ENTROPY_WEIGHT = 0.1


def route(
    logits_GSE: jax.Array,
    context: RouterContext,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Lets every expert take the C tokens of a group that score highest with it.

    With a cap on the experts of a token, the choice is made from the solution of the
    entropy-regularised linear program of section 3.3; the few tokens that it leaves
    above the cap lose their lowest scores, and these choices are counted as dropped.

    Args:
        logits_GSE: float32.
        context: the mask.
        settings: the cap.
        capacity: C, tokens per expert and group.
    Returns:
        An Assignment with J = the cap, or E without one; a token's choices are in
        the order of their gates. Gates are the softmax over the experts.
    """
    _, S, E = logits_GSE.shape
    J = settings.num_choices(E)
    mask_GS1 = context.mask_GS[..., None]
    probability_GSE = jax.nn.softmax(logits_GSE)
    wish_GSE = jax.lax.stop_gradient(probability_GSE)
    if J < E:
        wish_GSE = jax.vmap(
            lambda score_SE, mask_S: _capped(score_SE, mask_S, capacity, J)
        )(wish_GSE, context.mask_GS)
    wish_GES = jnp.where(mask_GS1, wish_GSE, -1.0).swapaxes(1, 2)
    _, token_GEC = jax.lax.top_k(wish_GES, min(capacity, S))
    is_token_GECS = token_GEC[..., None] == jnp.arange(S)
    taken_GSE = jnp.any(is_token_GECS, axis=2).swapaxes(1, 2) & mask_GS1

    rank_GSE = jnp.where(taken_GSE, jax.lax.stop_gradient(probability_GSE), -1.0)
    best_GSJ, expert_GSJ = jax.lax.top_k(rank_GSE, J)
    assignment = assign(
        Choices(
            expert_GSJ=expert_GSJ,
            active_GSJ=best_GSJ >= 0,
            first_GSJ=best_GSJ >= 0,
            gate_GSJ=pick(probability_GSE, expert_GSJ),
            probability_GSE=probability_GSE,
        ),
        logits_GSE,
        context.mask_GS,
        settings,
        capacity=capacity,
    )
    return _counting_all(assignment, taken_GSE, settings)


def _capped(
    score_SE: jax.Array, mask_S: jax.Array, capacity: int, cap: int
) -> jax.Array:
    """Solves max ⟨score, A⟩ + λ·H(A), 0 ≤ A ≤ 1, columns C and rows at most the cap.

    Dykstra's alternating projections in the Kullback-Leibler divergence, in logarithms.
    """
    real_S1 = mask_S[:, None]
    start_SE = jnp.where(real_S1, score_SE / FIRST_ENTROPY_WEIGHT, -jnp.inf)
    log_cap = jnp.log(float(cap))
    log_column = jnp.log(jnp.minimum(capacity, jnp.sum(mask_S)).astype(jnp.float32))

    def finite(x: jax.Array) -> jax.Array:
        return jnp.where(real_S1, x, 0.0)

    def project(carried: tuple, sharper: jax.Array) -> tuple[tuple, None]:
        # A smaller λ multiplies scores and prices in these logarithms alike.
        log_a, over_row, over_one = (x * sharper for x in carried)
        log_a += log_column - jax.nn.logsumexp(log_a, axis=0)
        # Inequalities remember what they took away, and give it back first.
        wanted = log_a + over_row
        excess = jax.nn.logsumexp(wanted, axis=1, keepdims=True) - log_cap
        log_a = wanted - jnp.maximum(finite(excess), 0.0)
        over_row = finite(wanted - log_a)
        wanted = log_a + over_one
        log_a = jnp.minimum(wanted, 0.0)
        over_one = finite(wanted - log_a)
        return (log_a, over_row, over_one), None

    zeros_SE = jnp.zeros_like(score_SE)
    falls = PROJECTIONS * 9 // 10
    ratio = (FIRST_ENTROPY_WEIGHT / ENTROPY_WEIGHT) ** (1 / falls)
    sharper = jnp.where(jnp.arange(PROJECTIONS) < falls, ratio, 1.0)
    (log_a, _, _), _ = jax.lax.scan(project, (start_SE, zeros_SE, zeros_SE), sharper)
    return jnp.exp(log_a)


def _counting_all(
    assignment: Assignment, taken_GSE: jax.Array, settings: RouterSettings
) -> Assignment:
    """Counts as chosen what the experts took, also above the cap, row by row."""
    G, S, E = taken_GSE.shape
    by_row = taken_GSE.reshape(G * settings.group_rows, S // settings.group_rows, E)
    chosen_GE = jnp.sum(by_row, axis=1, dtype=jnp.int32)
    sums = dataclasses.replace(assignment.sums, chosen_GE=chosen_GE, first_GE=chosen_GE)
    return dataclasses.replace(assignment, sums=sums)
