"""The token ledger: where every choice went, and how even the loads are."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterTotals:
    """Router sums over all groups, per layer of a segment: the ledger of every token.

    routed = computed + dropped + padding holds exactly, where routed counts the
    choices of real tokens and those that padding would have made.

    All fields but one are those of `RouterSums`, added up over groups.

    Attributes:
        local_balance_P: the balance loss of each group, or of each sequence, times its
            tokens, summed; 0 where the loss is formed over the whole batch.
        needed_PEH: None unless biases are quantiles.
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
    needed_PEH: jax.Array | None = None


def ledger(
    router: Sequence[RouterTotals], order: Sequence[int] = ()
) -> dict[str, jax.Array]:
    """Accounts for every choice: fractions, and the counts of each layer.

    Args:
        router: totals of each sparse sublayer.
        order: place of each layer of the model, from the bottom up, among those of the
            totals one after the other; () where they are in this order already.
    Returns:
        Scalars and, of every layer, arrays that lead with layers. Where layers have
        different numbers of experts, loads of those that a layer has not are NaN.
    """
    counts = choices_per_layer(router, order)
    dropped_P = counts["ledger/dropped_choices"]
    chosen_P = dropped_P + counts["ledger/computed_choices"]

    def layers(number: Callable[[RouterTotals], jax.Array]) -> jax.Array:
        return per_layer(router, number, order)

    # Over all layers int32 could overflow.
    chosen, spilled, dropped, without, tokens = (
        jnp.sum(count_P.astype(jnp.float32))
        for count_P in (
            chosen_P,
            counts["ledger/spilled_choices"],
            dropped_P,
            counts["ledger/tokens_without_expert"],
            counts["ledger/tokens"],
        )
    )
    entropy_P = layers(lambda totals: mean(totals.entropy_P, totals.tokens_P))
    square_P = layers(lambda totals: mean(totals.square_P, totals.tokens_P))
    return {
        "router/load": layers(_load),
        "router/dropped_fraction_per_layer": mean(dropped_P, chosen_P),
        "router/entropy_nats_per_layer": entropy_P,
        "router/dropped_fraction": mean(dropped, chosen),
        "router/spilled_fraction": mean(spilled, chosen),
        "router/tokens_without_expert_fraction": mean(without, tokens),
        "router/entropy_nats": jnp.mean(entropy_P),
        "router/logit_rms": jnp.sqrt(jnp.mean(square_P)),
        "router/max_violation": jnp.max(
            jnp.stack([jnp.max(_load(t)) * t.chosen_PE.shape[-1] - 1 for t in router])
        ),
        "router/dead_experts": layers(
            lambda t: jnp.sum(t.chosen_PE == 0, axis=-1)
        ).sum(),
        "router/over_budget_rows": excess_rows(router),
        **counts,
    }


def excess_rows(router: Sequence[RouterTotals]) -> jax.Array:
    """Counts the rows that devices had no room for, in all layers."""
    return sum((jnp.sum(t.excess_P) for t in router), start=jnp.zeros((), jnp.int32))


def choices_per_layer(
    router: Sequence[RouterTotals], order: Sequence[int] = ()
) -> dict[str, jax.Array]:
    """Counts where choices went, exactly, whatever kind of arrays the totals are.

    routed = computed + dropped + padding; spilled are among the computed. Besides, the
    real tokens, and those of which no choice was computed.

    Args:
        router: totals of each sparse sublayer.
        order: places of the layers, as in `ledger`.
    """

    def layers(count: Callable[[RouterTotals], Any]) -> Any:
        return per_layer(router, count, order)

    chosen_P = layers(lambda totals: totals.chosen_PE.sum(axis=-1))
    kept_P = layers(lambda totals: totals.kept_PE.sum(axis=-1))
    padding_P = layers(lambda totals: totals.padding_P)
    return {
        "ledger/routed_choices": chosen_P + padding_P,
        "ledger/computed_choices": kept_P,
        "ledger/spilled_choices": layers(lambda totals: totals.spilled_PE.sum(axis=-1)),
        "ledger/dropped_choices": chosen_P - kept_P,
        "ledger/padding_choices": padding_P,
        "ledger/tokens": layers(lambda totals: totals.tokens_P),
        "ledger/tokens_without_expert": layers(lambda totals: totals.without_expert_P),
    }


def per_layer(
    router: Sequence[RouterTotals],
    number: Callable[[RouterTotals], Any],
    order: Sequence[int],
) -> Any:
    """Joins a number of each layer, or numbers of each expert, in the layers' order.

    Args:
        router: totals of each sparse sublayer.
        number: what is wanted of the totals, led by layers.
        order: places of the layers, as in `ledger`.
    Returns:
        An array of the kind that `number` returns.
    """
    parts = [number(totals) for totals in router]
    if len(parts) == 1 and not order:
        return parts[0]
    here = np if isinstance(parts[0], np.ndarray) else jnp
    if parts[0].ndim > 1:
        widest = max(part.shape[1] for part in parts)
        parts = [
            here.pad(
                part,
                ((0, 0), (0, widest - part.shape[1])),
                constant_values=here.nan,
            )
            if part.shape[1] < widest
            else part
            for part in parts
        ]
    joined = here.concatenate(parts)
    return joined[here.array(order)] if order else joined


def _load(totals: RouterTotals) -> jax.Array:
    """Share of a layer's choices that each expert has."""
    chosen_P1 = jnp.sum(totals.chosen_PE, axis=-1, keepdims=True)
    return totals.chosen_PE / jnp.maximum(chosen_P1, 1)


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Divides, and gives 0 where nothing was counted."""
    return total / jnp.where(weight > 0, weight, 1)
