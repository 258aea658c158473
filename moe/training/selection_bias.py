"""Balance without a loss: a bias on each expert's score, for selection alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Layers
from moe.routing.needed_bias import quantile
from moe.training.ledger import RouterTotals


def move_selection_biases(
    params: Any, router: Sequence[RouterTotals], layers: Layers
) -> Any:
    """Moves each expert's selection bias by what this batch chose, for those after it.

    "sign": b += rate · sign(mean load - load) (arXiv:2408.15664, algorithm 1);
    "quantile": b is what would have evened out this batch, but that thresholds of
    tokens are those under the bias before (`moe.routing.needed_bias`).

    Args:
        params: parameters, or a copy of them; None in place of those that are frozen.
        router: totals of each sparse sublayer, in the order of `Layers.sparse` and then
            `Layers.sparse_ahead`.
        layers: how each bias is moved.
    """
    params = jax.tree.map(lambda array: array, params)  # dicts of its own
    places = *layers.sparse(), *layers.sparse_ahead()
    for place, totals in zip(places, router, strict=True):
        settings = place.sublayer.settings.router
        blocks = params[place.stack]["layers"][place.segment]
        weights = blocks[place.block][place.sublayer.name]
        if weights.get("selection_bias") is not None:
            if settings.bias_update == "quantile":
                assert totals.needed_PEH is not None
                bias_PE = weights["selection_bias"]
                share = settings.num_selected / bias_PE.shape[-1]
                weights["selection_bias"] = jax.vmap(
                    lambda below_EH, bias_E, share=share: quantile(
                        below_EH, bias_E, share
                    )
                )(totals.needed_PEH, bias_PE)
                continue
            load_PE = totals.chosen_PE.astype(jnp.float32)
            below_PE = jnp.sign(jnp.mean(load_PE, axis=-1, keepdims=True) - load_PE)
            weights["selection_bias"] += settings.bias_update_rate * below_PE
    return params
