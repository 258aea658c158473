"""Losses, each formed once, from sums merged over devices and microbatches.

A mean of means is wrong as soon as microbatches hold different numbers of tokens, and
a loss that is not linear in its sums, such as balance over the whole batch, has another
gradient when it is averaged. So the forward pass returns sums, and only this file
divides.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.routing.assignment import RouterSums
from moe.settings import LossSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterTotals:
    """Router sums over all groups, per sparse layer: the ledger of every token.

    routed = computed + dropped + padding holds exactly, where routed counts the
    choices of real tokens and those that padding would have made.

    Attributes:
        tokens_P: real tokens.
        probability_PE: summed router probabilities.
        first_PE: first choices.
        chosen_PE: choices made.
        kept_PE: choices that were computed.
        padding_P: choices of padding, which never take a slot.
        z_P: summed squared log-sum-exp.
        entropy_P: summed entropy in nats.
        group_balance_P: balance loss of each group times its tokens, summed.
    """

    tokens_P: jax.Array
    probability_PE: jax.Array
    first_PE: jax.Array
    chosen_PE: jax.Array
    kept_PE: jax.Array
    padding_P: jax.Array
    z_P: jax.Array
    entropy_P: jax.Array
    group_balance_P: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """All that the losses of a batch are made of; adding two merges two batches.

    Attributes:
        cross_entropy: summed over target tokens, in nats.
        z: summed squared log of the output softmax's normaliser.
        correct: target tokens that were the likeliest.
        weight: target tokens.
        router: None in a dense model.
    """

    cross_entropy: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array
    router: RouterTotals | None


def sums(
    logits_BLV: jax.Array,
    target_BL: jax.Array,
    weight_BL: jax.Array,
    router: RouterSums | None,
) -> Sums:
    """Sums up a batch or microbatch.

    Args:
        logits_BLV: float32.
        target_BL: int32.
        weight_BL: 1 where the target counts, 0 elsewhere.
        router: sums per sparse layer and group.
    """
    weight_BL = weight_BL.astype(jnp.float32)
    log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    # A comparison instead of a gather: its transpose is not a scatter over V.
    is_target_BLV = target_BL[..., None] == jnp.arange(logits_BLV.shape[-1])
    target_logit_BL = jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)
    likeliest_BL = jnp.argmax(jax.lax.stop_gradient(logits_BLV), axis=-1)
    return Sums(
        cross_entropy=jnp.sum(weight_BL * (log_z_BL - target_logit_BL)),
        z=jnp.sum(weight_BL * log_z_BL**2),
        correct=jnp.sum(weight_BL * (likeliest_BL == target_BL)),
        weight=jnp.sum(weight_BL),
        router=None if router is None else router_totals(router),
    )


def router_totals(router: RouterSums) -> RouterTotals:
    """Adds up the groups of sums that lead with layers, [P, G, ...]."""
    num_experts = router.first_GE.shape[-1]
    agreement_PG = jnp.sum(router.first_GE * router.probability_GE, axis=-1)
    tokens_PG = jnp.maximum(router.tokens_G, 1)
    return RouterTotals(
        tokens_P=jnp.sum(router.tokens_G, axis=1),
        probability_PE=jnp.sum(router.probability_GE, axis=1),
        first_PE=jnp.sum(router.first_GE, axis=1),
        chosen_PE=jnp.sum(router.chosen_GE, axis=1),
        kept_PE=jnp.sum(router.kept_GE, axis=1),
        padding_P=jnp.sum(router.padding_G, axis=1),
        z_P=jnp.sum(router.z_G, axis=1),
        entropy_P=jnp.sum(router.entropy_G, axis=1),
        group_balance_P=num_experts * jnp.sum(agreement_PG / tokens_PG, axis=1),
    )


def balance_P(router: RouterTotals, scope: str) -> jax.Array:
    """Load-balance loss of each layer, 1 when experts are used alike.

    E·Σ_e f_e·P_e with f the fraction of first choices and P the mean probability
    (arXiv:2101.03961, eq. 4); gradients flow through P alone.

    Args:
        router: totals of the whole batch.
        scope: "group" averages the loss of every group, weighted by its tokens;
            "global" takes f and P over the whole batch.
    """
    tokens_P = jnp.maximum(router.tokens_P, 1)
    if scope == "group":
        return router.group_balance_P / tokens_P
    num_experts = router.first_PE.shape[-1]
    agreement_P = jnp.sum(router.first_PE * router.probability_PE, axis=-1)
    return num_experts * agreement_P / tokens_P.astype(jnp.float32) ** 2


def total(sums: Sums, settings: LossSettings) -> tuple[jax.Array, dict]:
    """Forms the loss that is differentiated, and its parts as metrics.

    Balance and router z-losses are added up over the sparse layers, as in
    arXiv:2101.03961; the metrics show their mean over layers.

    Returns:
        A scalar, and a dict of scalars.
    """
    cross_entropy = _mean(sums.cross_entropy, sums.weight)
    z = _mean(sums.z, sums.weight)
    value = cross_entropy + settings.z_weight * z
    metrics = {
        "loss/nats_per_token": cross_entropy,
        "accuracy/fraction": _mean(sums.correct, sums.weight),
    }
    if sums.router is not None:
        router_z_P = _mean(sums.router.z_P, sums.router.tokens_P)
        layer_balance_P = balance_P(sums.router, settings.balance_scope)
        value += settings.balance_weight * jnp.sum(layer_balance_P)
        value += settings.router_z_weight * jnp.sum(router_z_P)
        metrics["loss/balance"] = jnp.mean(layer_balance_P)
        metrics["loss/router_z"] = jnp.mean(router_z_P)
        metrics |= ledger(sums.router)
    metrics["loss/total"] = value
    return value, metrics


def ledger(router: RouterTotals) -> dict[str, jax.Array]:
    """Accounts for every choice, per layer and in all.

    `ledger/*_choices` are exact counts over all layers.
    """
    chosen_P = jnp.sum(router.chosen_PE, axis=-1)
    kept_P = jnp.sum(router.kept_PE, axis=-1)
    load_PE = router.chosen_PE / jnp.maximum(chosen_P, 1)[:, None]
    dropped_P = _mean(chosen_P - kept_P, chosen_P)
    num_experts = router.chosen_PE.shape[-1]
    entropy_P = _mean(router.entropy_P, router.tokens_P)
    return {
        "router/load": load_PE,
        "router/dropped_fraction_per_layer": dropped_P,
        "router/entropy_nats_per_layer": entropy_P,
        "router/dropped_fraction": _mean(jnp.sum(chosen_P - kept_P), jnp.sum(chosen_P)),
        "router/entropy_nats": jnp.mean(entropy_P),
        "router/max_violation": jnp.max(load_PE) * num_experts - 1,
        "router/dead_experts": jnp.sum(router.chosen_PE == 0),
        "ledger/routed_choices": jnp.sum(chosen_P) + jnp.sum(router.padding_P),
        "ledger/computed_choices": jnp.sum(kept_P),
        "ledger/dropped_choices": jnp.sum(chosen_P - kept_P),
        "ledger/padding_choices": jnp.sum(router.padding_P),
    }


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divides, and gives 0 where nothing was counted."""
    return total / jnp.where(weight > 0, weight, 1)
