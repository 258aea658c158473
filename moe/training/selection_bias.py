"""Balance without a loss: a bias on each expert's score, for selection alone."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Layers
from moe.training.losses import RouterTotals


def move_selection_biases(
    params: Any, router: Sequence[RouterTotals], layers: Layers
) -> Any:
    """Moves each expert's selection bias against its load in this batch.

    b += rate · sign(mean load - load) (arXiv:2408.15664, algorithm 1).

    Args:
        params: parameters, or a copy of them.
        router: totals of each sparse sublayer, in the order of `Layers.sparse`.
        layers: which of them have biases.
    """
    params = jax.tree.map(lambda array: array, params)  # dicts of its own
    for place, totals in zip(layers.sparse(), router, strict=True):
        settings = place.sublayer.settings.router
        if settings.selection_bias:
            blocks = params[place.stack]["layers"][place.segment]
            weights = blocks[place.block][place.sublayer.name]
            load_PE = totals.chosen_PE.astype(jnp.float32)
            below_PE = jnp.sign(jnp.mean(load_PE, axis=-1, keepdims=True) - load_PE)
            weights["selection_bias"] += settings.bias_update_rate * below_PE
    return params
