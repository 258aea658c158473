"""Losses, each formed once, from sums merged over devices and microbatches.

A mean of means is wrong as soon as microbatches hold different numbers of tokens, and
a loss that is not linear in its sums, such as balance over the whole batch, has another
gradient when it is averaged. So the forward pass returns sums, and only this file
divides.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe.model.attention.attend import LargestLogits
from moe.model.head import TargetScores
from moe.routing.assignment import RouterSums
from moe.settings import LossSettings
from moe.training.ledger import RouterTotals, excess_rows, ledger, mean
from partitioning.grid import Grid
from partitioning.settings import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AheadSums:
    """What the losses of tokens after the next are made of, in training alone.

    Attributes:
        cross_entropy_D: nats, summed over target tokens, for each number of places
            that they are ahead.
        weight_D: target tokens.
        router: totals as in `Sums`, of the layers that predict them.
    """

    cross_entropy_D: jax.Array
    weight_D: jax.Array
    router: tuple[RouterTotals, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """All that the losses of a batch are made of; `merged` merges two batches.

    Attributes:
        cross_entropy: summed over target tokens, in nats.
        z: summed squared log of the output softmax's normaliser.
        correct: target tokens that were the likeliest.
        weight: target tokens.
        learnt: cross-entropy with smoothed labels, summed; without smoothing the same.
        router: totals of each sparse sublayer of each segment, whose number of experts
            may differ; empty in a dense model.
        ahead: sums of tokens after the next; None where there are none.
        logits: largest logits of each sublayer of attention, led by layers; empty where
            they are not measured. Of two batches the greater holds.
    """

    cross_entropy: jax.Array
    z: jax.Array
    correct: jax.Array
    weight: jax.Array
    learnt: jax.Array
    router: tuple[RouterTotals, ...]
    ahead: AheadSums | None = None
    logits: tuple[LargestLogits, ...] = ()

    @property
    def routers(self) -> tuple[RouterTotals, ...]:
        """Totals of all sparse sublayers, those of tokens after the next at the end."""
        return self.router + (self.ahead.router if self.ahead is not None else ())


def merged(one: Sums, other: Sums) -> Sums:
    """Merges the sums of two parts of a batch."""
    both = jax.tree.map(
        jnp.add, *(dataclasses.replace(each, logits=()) for each in (one, other))
    )
    logits = jax.tree.map(jnp.maximum, one.logits, other.logits)
    return dataclasses.replace(both, logits=logits)


def sums(
    scores: TargetScores,
    target_BL: jax.Array,
    weight_BL: jax.Array,
    router: Sequence[RouterSums],
    settings: LossSettings,
    join_sequence: Callable[[jax.Array], jax.Array] = lambda x: x,
    *,
    vocab_size: int = 0,
    group_rows: Sequence[int] = (),
) -> Sums:
    """Sums up a batch, a microbatch, or one device's part of it.

    Args:
        scores: what is known of each target's logits.
        target_BL: int32.
        weight_BL: 1 where the target counts, 0 elsewhere.
        router: sums of each sparse sublayer, per layer and group.
        settings: which balance loss is formed.
        join_sequence: adds up over the devices that a sequence is cut over.
        vocab_size: V, for smoothed labels.
        group_rows: rows of a group of each sparse sublayer; () if all have 1.
    """
    weight_BL = weight_BL.astype(jnp.float32)
    log_z_BL = scores.log_z_BL
    totals = tuple(
        router_totals(each, len(target_BL), settings, join_sequence, group_rows=rows)
        for each, rows in zip(router, group_rows or [1] * len(router), strict=True)
    )
    nats_BL = log_z_BL - scores.target_logit_BL
    learnt_BL = smoothed(nats_BL, scores, settings.label_smoothing, vocab_size)
    return Sums(
        cross_entropy=jnp.sum(weight_BL * nats_BL),
        z=jnp.sum(weight_BL * log_z_BL**2),
        correct=jnp.sum(weight_BL * (scores.likeliest_BL == target_BL)),
        weight=jnp.sum(weight_BL),
        learnt=jnp.sum(weight_BL * learnt_BL),
        router=totals,
    )


def ahead_sums(
    scores: Sequence[TargetScores],
    weights: Sequence[jax.Array],
    router: Sequence[RouterSums],
    settings: LossSettings,
    join_sequence: Callable[[jax.Array], jax.Array] = lambda x: x,
    *,
    group_rows: Sequence[int] = (),
) -> AheadSums:
    """Sums up what is predicted after the next token.

    Args:
        scores: what is known of the logits of each target, one place ahead and on.
        weights: [B, L] for each number of places, 1 where the target counts, else 0.
        router: sums of each sparse sublayer, per layer and group.
        settings: which balance loss is formed.
        join_sequence: adds up over the devices that a sequence is cut over.
        group_rows: rows of a group of each sparse sublayer.
    """
    weight_D = [jnp.asarray(weight_BL, jnp.float32) for weight_BL in weights]
    nats_D = [
        jnp.sum(weight_BL * (each.log_z_BL - each.target_logit_BL))
        for each, weight_BL in zip(scores, weight_D, strict=True)
    ]
    return AheadSums(
        cross_entropy_D=jnp.stack(nats_D),
        weight_D=jnp.stack([jnp.sum(weight_BL) for weight_BL in weight_D]),
        router=tuple(
            router_totals(each, len(weights[0]), settings, join_sequence, group_rows=n)
            for each, n in zip(router, group_rows, strict=True)
        ),
    )


def smoothed(
    nats_BL: jax.Array, scores: TargetScores, smoothing: float, vocab_size: int
) -> jax.Array:
    """Cross-entropy of labels of which the other tokens have a share, less its least.

    The target has 1 - α, each of the V - 1 others α / (V - 1). The entropy of these
    labels is taken off, so that 0 is perfect, as in T5X.
    """
    if not smoothing:
        return nats_BL
    assert scores.logit_sum_BL is not None
    others = vocab_size - 1
    own, other = 1 - smoothing, smoothing / others
    rest_BL = others * scores.log_z_BL - scores.logit_sum_BL + scores.target_logit_BL
    least = -own * math.log(own) - others * other * math.log(other)
    return own * nats_BL + other * rest_BL - least


def over_devices(sums: Sums, grid: Grid) -> Sums:
    """Merges the parts of all devices; those of `model` score the same targets."""
    cuts = (*BATCH_AXES, "context")

    def merged(part: Any) -> Any:
        whole = grid.sum(dataclasses.replace(part, router=()), cuts)
        router = grid.sum(part.router, (*cuts, "model"))
        return dataclasses.replace(whole, router=router)

    ahead = None if sums.ahead is None else merged(sums.ahead)
    logits = jax.tree.map(
        lambda most_PN: grid.gather(grid.max(most_PN, cuts), ["model"], 1),
        sums.logits,
    )
    rest = merged(dataclasses.replace(sums, ahead=None, logits=()))
    return dataclasses.replace(rest, ahead=ahead, logits=logits)


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
    added = {
        re.sub("_[G1]", "_P", field.name): over_groups(getattr(router, field.name))
        for field in dataclasses.fields(router)
        if field.name != "trace" and getattr(router, field.name) is not None
    }
    return RouterTotals(**added, local_balance_P=local_balance_P)


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
    return mean(router.local_balance_P, router.tokens_P)


def squared_variation(sum_PE: jax.Array) -> jax.Array:
    """Squared coefficient of variation over the experts: variance / mean².

    Of probabilities it is V-MoE's importance loss, of chances its load loss
    (arXiv:2106.05974, appendix A.1 and A.2).
    """
    mean_P = jnp.mean(sum_PE, axis=-1)
    return mean(jnp.var(sum_PE, axis=-1), mean_P**2)


def total(
    sums: Sums, settings: LossSettings, order: Sequence[int] = ()
) -> tuple[jax.Array, dict]:
    """Forms the loss that is differentiated, and its parts as metrics.

    Args:
        sums: sums of the whole batch.
        settings: weights of the losses.
        order: places of the layers, as in `ledger`.
    Returns:
        A scalar, and a dict of scalars.
    """
    cross_entropy = mean(sums.cross_entropy, sums.weight)
    z = mean(sums.z, sums.weight)
    by = settings.normalizing_factor or sums.weight
    value = mean(sums.learnt + settings.z_weight * sums.z, jnp.asarray(by))
    metrics = {
        "loss/nats_per_token": cross_entropy,
        "loss/output_z": z,
        "accuracy/fraction": mean(sums.correct, sums.weight),
    }
    if sums.ahead is not None:
        ahead = sums.ahead
        metrics["loss/ahead"] = jnp.mean(mean(ahead.cross_entropy_D, ahead.weight_D))
        by_D = settings.normalizing_factor or ahead.weight_D
        mean_D = mean(ahead.cross_entropy_D, jnp.asarray(by_D))
        value += settings.ahead_weight * jnp.mean(mean_D)
    if sums.router:
        _, parts = _router_terms(sums.router, settings)
        terms, _ = _router_terms(sums.routers, settings)
        value += terms
        metrics |= parts | ledger(sums.router, order)
        if sums.ahead is not None:
            metrics["router/over_budget_rows"] = excess_rows(sums.routers)
    metrics["loss/total"] = value
    return value, metrics


def _router_terms(
    router: Sequence[RouterTotals], settings: LossSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What routers add to the loss, and its parts as means over the layers."""
    terms = {
        "loss/balance": (
            settings.balance_weight,
            lambda totals: balance_P(totals, settings),
        ),
        "loss/router_z": (
            settings.router_z_weight,
            lambda totals: mean(totals.z_P, totals.tokens_P),
        ),
    }
    if settings.importance_weight:
        terms["loss/importance"] = (
            settings.importance_weight,
            lambda totals: squared_variation(totals.probability_PE),
        )
    if settings.load_weight:
        terms["loss/load"] = (
            settings.load_weight,
            lambda totals: squared_variation(totals.load_PE),
        )
    over_layers = jnp.sum if settings.over_layers == "sum" else jnp.mean
    value, parts = jnp.zeros(()), {}
    for name, (weight, loss_of) in terms.items():
        loss_P = jnp.concatenate([loss_of(totals) for totals in router])
        value += weight * over_layers(loss_P)
        parts[name] = jnp.mean(loss_P)
    return value, parts


def _share(sum_E: jax.Array) -> jax.Array:
    """Divides by the sum over experts, which is a constant of the batch."""
    total_1 = jax.lax.stop_gradient(jnp.sum(sum_E, axis=-1, keepdims=True))
    return mean(sum_E, total_1)
