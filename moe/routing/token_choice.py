"""Token choice: every token picks its K best experts.

Switch top-1 (arXiv:2101.03961, section 2.1); GShard's and GLaM's top-2 with
renormalised gates and a random second expert (arXiv:2006.16668, Algorithm 1;
arXiv:2112.06905, section 4); Mixtral's top-k, whose softmax over the selected logits
is a renormalised softmax (arXiv:2401.04088, section 2.1); V-MoE's noisy top-k with
batch priority (arXiv:2106.05974); DeepSeek-V3's sigmoid scores, selection bias and
limited groups (arXiv:2412.19437, eqs. 12-16); DeepSeek-V4's √softplus scores.
"""

import jax
import jax.numpy as jnp

from moe.routing import needed_bias
from moe.routing.assignment import (
    Assignment,
    Choices,
    RouterContext,
    assign,
    over_sum,
)
from moe.settings import RouterSettings

BARRED = -1e30  # the score of an expert that may not be chosen


def route(
    logits_GSE: jax.Array,
    context: RouterContext,
    settings: RouterSettings,
    *,
    capacity: int,
) -> Assignment:
    """Assigns every real token to its K best experts, as capacity allows.

    Equal scores go to the expert with the lower index.

    Args:
        logits_GSE: float32, unnormalised; padding tokens may hold anything finite.
        context: mask and keys; a bias on the scores; the logits before noise.
        settings: K, scores, groups of experts, renormalisation, second-expert policy,
            slot order and overflow.
        capacity: C, slots per expert per group.
    Returns:
        An Assignment with J = K. Gradients reach the logits through the gates and
        through the probability, load and z sums, never through the selection.
    """
    G, S, _ = logits_GSE.shape
    K = settings.num_selected
    score_GSE, probability_GSE = scores(logits_GSE, settings)
    selection_GSE = jax.lax.stop_gradient(score_GSE)
    if context.bias_E is not None:
        selection_GSE += jax.lax.stop_gradient(context.bias_E)
    selection_GSE = limit_to_groups(selection_GSE, settings)
    spills = settings.overflow == "spill"
    ranks = 2 * K if spills else K
    needed_1EH = None
    by_quantile = settings.bias_update == "quantile" and context.key_G is not None
    if by_quantile and context.bias_E is not None:
        best_GSK, ranked_GSK = jax.lax.top_k(selection_GSE, max(ranks, K + 1))
        needed_1EH = needed_bias.counted(
            score_GSE, best_GSK[..., K], context.bias_E, context.mask_GS
        )
        ranked_GSK = ranked_GSK[..., :ranks]
    else:
        _, ranked_GSK = jax.lax.top_k(selection_GSE, ranks)
    expert_GSK = ranked_GSK[..., :K]

    gate_GSK = pick(score_GSE, ranked_GSK)
    if settings.renormalize == "before_drop":
        gate_GSK = over_sum(gate_GSK, gate_GSK[..., :K])

    active_GSK = jnp.broadcast_to(context.mask_GS[..., None], (G, S, K))
    if settings.second_policy == "random" and context.key_G is not None:
        draw_GS = jax.vmap(lambda key: jax.random.uniform(key, (S,)))(context.key_G)
        keeps_GS = draw_GS < 2.0 * gate_GSK[..., 1]
        active_GSK = active_GSK.at[..., 1].set(active_GSK[..., 1] & keeps_GS)

    return assign(
        Choices(
            expert_GSJ=expert_GSK,
            active_GSJ=active_GSK,
            first_GSJ=jnp.broadcast_to(jnp.arange(K) == 0, (G, S, K)),
            gate_GSJ=gate_GSK[..., :K],
            probability_GSE=probability_GSE,
            load_GSE=chances(logits_GSE, context, settings),
            spill_GSJ=(ranked_GSK[..., K:], gate_GSK[..., K:]) if spills else None,
            priority_GS=priority(gate_GSK[..., :K], settings),
            needed_1EH=needed_1EH,
        ),
        logits_GSE,
        context.mask_GS,
        settings,
        capacity=capacity,
    )


def scores(
    logits_GSE: jax.Array, settings: RouterSettings
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores that choose and weigh, and probabilities that sum to 1."""
    if settings.scores == "softmax":
        probability_GSE = jax.nn.softmax(logits_GSE)
        return probability_GSE, probability_GSE
    # Each over the sum of all, in logarithms, where no sum is 0.
    if settings.scores == "sigmoid":
        probability_GSE = jax.nn.softmax(jax.nn.log_sigmoid(logits_GSE))
        return jax.nn.sigmoid(logits_GSE), probability_GSE
    log_score_GSE = _log_softplus(logits_GSE) / 2
    return jnp.exp(log_score_GSE), jax.nn.softmax(log_score_GSE)


def _log_softplus(x: jax.Array) -> jax.Array:
    """Returns ln ln(1 + eˣ), which is x where eˣ is nothing beside 1."""
    above = jnp.log(jax.nn.softplus(jnp.maximum(x, -18.0)))
    return jnp.where(x > -17.0, above, x)


def limit_to_groups(score_GSE: jax.Array, settings: RouterSettings) -> jax.Array:
    """Bars experts outside each token's best groups of neighbouring experts.

    Groups may be the experts of a node: then a token visits at most
    `num_selected_groups` nodes (DeepSeek-V3, section 2.1.2).
    """
    groups, selected = settings.num_expert_groups, settings.num_selected_groups
    if selected == groups:
        return score_GSE
    by_group = score_GSE.reshape(*score_GSE.shape[:-1], groups, -1)
    num_best = 1 if settings.group_score == "max" else 2
    best, _ = jax.lax.top_k(by_group, num_best)
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), selected)
    allowed = jnp.any(chosen[..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(allowed[..., None], by_group, BARRED).reshape(score_GSE.shape)


def pick(score_GSE: jax.Array, expert_GSJ: jax.Array) -> jax.Array:
    """Takes the scores of the given experts.

    A comparison instead of a gather: its transpose is not a scatter.
    """
    is_expert_GSJE = expert_GSJ[..., None] == jnp.arange(score_GSE.shape[-1])
    return jnp.sum(jnp.where(is_expert_GSJE, score_GSE[:, :, None, :], 0.0), axis=-1)


def priority(gate_GSJ: jax.Array, settings: RouterSettings) -> jax.Array | None:
    """A token's largest gate, if the surest tokens come first (V-MoE, section 4.1)."""
    if settings.slot_order != "batch_priority":
        return None
    return jax.lax.stop_gradient(jnp.max(gate_GSJ, axis=-1))


def chances(
    logits_GSE: jax.Array, context: RouterContext, settings: RouterSettings
) -> jax.Array | None:
    """Chance of each expert to be among the K best if its noise were drawn again.

    1 - Φ((threshold - clean logit) / σ), with the K-th largest noisy logit as the
    threshold (V-MoE, arXiv:2106.05974, appendix A.2).
    """
    if context.clean_logits_GSE is None:
        return None
    best_GSK, _ = jax.lax.top_k(logits_GSE, settings.num_selected)
    deviation = settings.logit_noise / logits_GSE.shape[-1]
    needed_GSE = (best_GSK[..., -1:] - context.clean_logits_GSE) / deviation
    return jax.scipy.special.ndtr(-needed_GSE)
