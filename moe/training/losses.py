"""Losses, each formed once, from sums merged over devices and microbatches.

A mean of means is wrong as soon as microbatches hold different numbers of tokens, and
a loss that is not linear in its sums, such as balance over the whole batch, has another
gradient when it is averaged. So the forward pass returns sums, and only this file
divides.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.model.embedding import Scores
from moe.routing.assignment import RouterSums
from moe.settings import LossSettings
from partitioning.grid import Grid
from partitioning.settings import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterTotals:
    """Router sums over all groups, per sparse layer: the ledger of every token.

    routed = computed + dropped + padding holds exactly, where routed counts the
    choices of real tokens and those that padding would have made.

    Attributes:
        tokens_P: real tokens.
        probability_PE: summed router probabilities.
        load_PE: summed chances of being chosen once more.
        first_PE: first choices.
        chosen_PE: choices made.
        kept_PE: choices that were computed.
        spilled_PE: of them, those that went to a token's next best expert.
        padding_P: choices of padding, which never take a slot.
        z_P: summed squared log-sum-exp.
        entropy_P: summed entropy in nats.
        square_P: summed mean squared logit.
        without_expert_P: tokens that no expert computed.
        excess_P: rows that devices had no room for.
        local_balance_P: the balance loss of each group, or of each sequence, times its
            tokens, summed; 0 where the loss is formed over the whole batch.
    """

    tokens_P: jax.Array
    probability_PE: jax.Array
    load_PE: jax.Array
    first_PE: jax.Array
    chosen_PE: jax.Array
    kept_PE: jax.Array
    spilled_PE: jax.Array
    padding_P: jax.Array
    z_P: jax.Array
    entropy_P: jax.Array
    square_P: jax.Array
    without_expert_P: jax.Array
    excess_P: jax.Array
    local_balance_P: jax.Array


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
    scores: Scores,
    target_BL: jax.Array,
    weight_BL: jax.Array,
    router: RouterSums | None,
    settings: LossSettings,
    join_sequence: Callable[[jax.Array], jax.Array] = lambda x: x,
    *,
    group_rows: int = 1,
) -> Sums:
    """Sums up a batch, a microbatch, or one device's part of it.

    Args:
        scores: what is known of each target's logits.
        target_BL: int32.
        weight_BL: 1 where the target counts, 0 elsewhere.
        router: sums per sparse layer and group.
        settings: which balance loss is formed.
        join_sequence: adds up over the devices that a sequence is cut over.
        group_rows: rows of a group.
    """
    weight_BL = weight_BL.astype(jnp.float32)
    log_z_BL = scores.log_z_BL
    totals = None
    if router is not None:
        totals = router_totals(
            router, len(target_BL), settings, join_sequence, group_rows=group_rows
        )
    return Sums(
        cross_entropy=jnp.sum(weight_BL * (log_z_BL - scores.target_logit_BL)),
        z=jnp.sum(weight_BL * log_z_BL**2),
        correct=jnp.sum(weight_BL * (scores.likeliest_BL == target_BL)),
        weight=jnp.sum(weight_BL),
        router=totals,
    )


def over_devices(sums: Sums, grid: Grid) -> Sums:
    """Merges the parts of all devices; those of `model` score the same targets."""
    cuts = (*BATCH_AXES, "context")
    router, rest = sums.router, dataclasses.replace(sums, router=None)
    merged = grid.sum(rest, cuts)
    if router is not None:
        router = grid.sum(router, (*cuts, "model"))
    return dataclasses.replace(merged, router=router)


def router_totals(
    router: RouterSums,
    num_sequences: int,
    settings: LossSettings,
    join_sequence: Callable[[jax.Array], jax.Array] = lambda x: x,
    *,
    group_rows: int = 1,
) -> RouterTotals:
    """Adds up the groups of sums that lead with layers, [P, G, ...].

    Args:
        router: sums per group, or per row of a group; see `RouterSums`.
        num_sequences: B.
        settings: which balance loss is formed.
        join_sequence: adds up over the devices that a sequence is cut over.
        group_rows: rows of a group.
    """

    def over_groups(sum_PG: jax.Array) -> jax.Array:
        return jnp.sum(sum_PG, axis=1)

    def per_group(sum_PG: jax.Array) -> jax.Array:
        P, _, *rest = sum_PG.shape
        return jnp.sum(sum_PG.reshape(P, -1, group_rows, *rest), axis=2)

    def per_sequence(sum_PG: jax.Array) -> jax.Array:
        P, _, *rest = sum_PG.shape
        blocks = num_sequences // group_rows
        sum_PBGr = sum_PG.reshape(P, blocks, -1, group_rows, *rest)
        return jnp.sum(sum_PBGr, axis=2).reshape(P, num_sequences, *rest)

    def joined(sum_PG: jax.Array) -> jax.Array:
        return join_sequence(per_sequence(sum_PG))

    local_balance_P = jnp.zeros(router.tokens_G.shape[0])
    if settings.balance_scope != "global":
        cut, unit = per_group, per_group
        if settings.balance_scope == "sequence":
            # The tokens of a sequence are shared out over its devices.
            cut, unit = per_sequence, joined
        first = settings.balance_counts == "first"
        number_GE = router.first_GE if first else router.chosen_GE
        balance_PG = balance(unit(number_GE), unit(router.probability_GE))
        local_balance_P = over_groups(cut(router.tokens_G) * balance_PG)
    return RouterTotals(
        tokens_P=over_groups(router.tokens_G),
        probability_PE=over_groups(router.probability_GE),
        load_PE=over_groups(router.load_GE),
        first_PE=over_groups(router.first_GE),
        chosen_PE=over_groups(router.chosen_GE),
        kept_PE=over_groups(router.kept_GE),
        spilled_PE=over_groups(router.spilled_GE),
        padding_P=over_groups(router.padding_G),
        z_P=over_groups(router.z_G),
        entropy_P=over_groups(router.entropy_G),
        square_P=over_groups(router.square_G),
        without_expert_P=over_groups(router.without_expert_G),
        excess_P=over_groups(router.excess_G),
        local_balance_P=local_balance_P,
    )


def balance(count_E: jax.Array, probability_E: jax.Array) -> jax.Array:
    """Load-balance loss, 1 when experts are used alike, 0 where nothing was counted.

    E·Σ_e f_e·P_e with f the fraction of choices and P the share of probability
    (arXiv:2101.03961, eq. 4); gradients flow through P alone.

    Args:
        count_E: choices of each expert; the last dimension is experts.
        probability_E: summed probability of each.
    """
    f_E = _share(count_E.astype(jnp.float32))
    return count_E.shape[-1] * jnp.sum(f_E * _share(probability_E), axis=-1)


def balance_P(router: RouterTotals, settings: LossSettings) -> jax.Array:
    """Load-balance loss of each layer, as scope and counts of the settings say.

    Args:
        router: totals of the whole batch, formed with the same settings.
        settings: "group" and "sequence" average the loss of each of these, weighted by
            its tokens; "global" forms one over the whole batch.
    """
    if settings.balance_scope == "global":
        first = settings.balance_counts == "first"
        count_PE = router.first_PE if first else router.chosen_PE
        return balance(count_PE, router.probability_PE)
    return _mean(router.local_balance_P, router.tokens_P)


def unevenness(sum_PE: jax.Array) -> jax.Array:
    """Squared coefficient of variation over the experts: variance / mean².

    Of probabilities it is V-MoE's importance loss, of chances its load loss
    (arXiv:2106.05974, appendix A.1 and A.2).
    """
    mean_P = jnp.mean(sum_PE, axis=-1)
    return _mean(jnp.var(sum_PE, axis=-1), mean_P**2)


def total(sums: Sums, settings: LossSettings) -> tuple[jax.Array, dict]:
    """Forms the loss that is differentiated, and its parts as metrics.

    Returns:
        A scalar, and a dict of scalars.
    """
    cross_entropy = _mean(sums.cross_entropy, sums.weight)
    z = _mean(sums.z, sums.weight)
    value = cross_entropy + settings.z_weight * z
    metrics = {
        "loss/nats_per_token": cross_entropy,
        "loss/output_z": z,
        "accuracy/fraction": _mean(sums.correct, sums.weight),
    }
    if sums.router is not None:
        terms, parts = _router_terms(sums.router, settings)
        value += terms
        metrics |= parts | ledger(sums.router)
    metrics["loss/total"] = value
    return value, metrics


def _router_terms(
    router: RouterTotals, settings: LossSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What routers add to the loss, and its parts as means over the layers."""
    terms = {
        "loss/balance": (
            settings.balance_weight,
            balance_P(router, settings),
        ),
        "loss/router_z": (
            settings.router_z_weight,
            _mean(router.z_P, router.tokens_P),
        ),
    }
    if settings.importance_weight:
        importance_P = unevenness(router.probability_PE)
        terms["loss/importance"] = (settings.importance_weight, importance_P)
    if settings.load_weight:
        terms["loss/load"] = (settings.load_weight, unevenness(router.load_PE))
    over_layers = jnp.sum if settings.over_layers == "sum" else jnp.mean
    value = sum(
        (weight * over_layers(loss_P) for weight, loss_P in terms.values()),
        start=jnp.zeros(()),
    )
    return value, {name: jnp.mean(loss_P) for name, (_, loss_P) in terms.items()}


def ledger(router: RouterTotals) -> dict[str, jax.Array]:
    """Accounts for every choice: fractions, and the counts of each layer."""
    chosen_P = jnp.sum(router.chosen_PE, axis=-1)
    kept_P = jnp.sum(router.kept_PE, axis=-1)
    # Over all layers int32 could overflow.
    chosen, spilled = (
        jnp.sum(count.astype(jnp.float32))
        for count in (router.chosen_PE, router.spilled_PE)
    )
    load_PE = router.chosen_PE / jnp.maximum(chosen_P, 1)[:, None]
    dropped_P = _mean(chosen_P - kept_P, chosen_P)
    num_experts = router.chosen_PE.shape[-1]
    entropy_P = _mean(router.entropy_P, router.tokens_P)
    return {
        "router/load": load_PE,
        "router/dropped_fraction_per_layer": dropped_P,
        "router/entropy_nats_per_layer": entropy_P,
        "router/dropped_fraction": _mean(
            jnp.sum((chosen_P - kept_P).astype(jnp.float32)), chosen
        ),
        "router/spilled_fraction": _mean(spilled, chosen),
        "router/tokens_without_expert_fraction": _mean(
            jnp.sum(router.without_expert_P.astype(jnp.float32)),
            jnp.sum(router.tokens_P.astype(jnp.float32)),
        ),
        "router/entropy_nats": jnp.mean(entropy_P),
        "router/logit_rms": jnp.sqrt(jnp.mean(_mean(router.square_P, router.tokens_P))),
        "router/max_violation": jnp.max(load_PE) * num_experts - 1,
        "router/dead_experts": jnp.sum(router.chosen_PE == 0),
        "router/over_budget_rows": jnp.sum(router.excess_P),
        **choices_per_layer(router),
    }


def choices_per_layer(router: RouterTotals) -> dict[str, jax.Array]:
    """Counts where choices went, exactly, whatever kind of arrays the totals are.

    routed = computed + dropped + padding; spilled are among the computed. Besides, the
    real tokens of which no choice was computed.
    """
    chosen_P, kept_P = router.chosen_PE.sum(axis=-1), router.kept_PE.sum(axis=-1)
    return {
        "ledger/routed_choices": chosen_P + router.padding_P,
        "ledger/computed_choices": kept_P,
        "ledger/spilled_choices": router.spilled_PE.sum(axis=-1),
        "ledger/dropped_choices": chosen_P - kept_P,
        "ledger/padding_choices": router.padding_P,
        "ledger/tokens_without_expert": router.without_expert_P,
    }


def _share(sum_E: jax.Array) -> jax.Array:
    """Divides by the sum over experts, which is a constant of the batch."""
    total_1 = jax.lax.stop_gradient(jnp.sum(sum_E, axis=-1, keepdims=True))
    return _mean(sum_E, total_1)


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divides, and gives 0 where nothing was counted."""
    return total / jnp.where(weight > 0, weight, 1)
