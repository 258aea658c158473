"""Layers from the bottom up: each segment is one loop over its periods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Block, Stack
from moe.model import block
from moe.model.execution import Execution
from moe.model.products import gather_weights, gathers_weights
from moe.model.remat import rematerialised
from moe.model.view import View

# Per segment, per block of its period; arrays lead with the segment's repeats.
Tree = list[list[Any]]


def run(
    stack: Stack,
    w: dict[str, Any],
    x_BLM: jax.Array,
    view: View,
    memories: Tree | None,
    key: jax.Array | None,
    execution: Execution,
) -> tuple[jax.Array, Tree | None, tuple[Any, ...]]:
    """Sends the residual stream through all layers.

    Args:
        stack: what they are.
        w: their parameters, this device's pieces.
        x_BLM: this device's cut of the stream.
        view: who the tokens are.
        memories: what is left of the tokens before; None in training and scoring.
        key: PRNG key of the step; None outside training.
        execution: how it is computed.
    Returns:
        x_BLM, not yet normalised; the memories with the new tokens in them; and the
        sums of each sublayer that has some, led by the segment's repeats. They are in
        the order of `stack.sparse()`.
    """
    filled: Tree = []
    counted: list[Any] = []
    for s, segment in enumerate(stack.segments):
        layers = [_layer(each, stack, view, key, execution) for each in segment.blocks]

        def period(x_BLM: jax.Array, scanned: Any, layers: Any = layers) -> Any:
            arrays, numbers, memories = scanned
            kept, sums = [], []
            for i, layer in enumerate(layers):
                old = None if memories is None else memories[i]
                x_BLM, new, more = layer(x_BLM, arrays[i], numbers[i], old)
                kept.append(new)
                sums += more
            return x_BLM, (kept, sums)

        numbers = [
            jnp.array(segment.numbers(place)) for place in range(len(segment.blocks))
        ]
        old = None if memories is None else memories[s]
        x_BLM, (kept, sums) = jax.lax.scan(
            period,
            x_BLM,
            (w["layers"][s], numbers, old),
            unroll=not execution.settings.scan_layers,
        )
        filled.append(kept)
        counted += sums
    return x_BLM, None if memories is None else filled, tuple(counted)


def _layer(
    each: Block, stack: Stack, view: View, key: jax.Array | None, execution: Execution
) -> Callable[..., Any]:
    """Makes one layer a function of the stream, its arrays, its number, its memory."""
    described = block.specs(each, stack.width)

    def layer(x_BLM: jax.Array, arrays: Any, number: jax.Array, memories: Any) -> Any:
        weights = gather_weights(arrays, described, execution)
        return block.run(
            each, weights, x_BLM, view, memories, key, number, stack, execution
        )

    sparse = any(sublayer.kind == "sparse" for sublayer in each)
    return rematerialised(
        layer,
        execution.settings.remat_of(sparse=sparse),
        gathers_weights=gathers_weights(execution),
    )
