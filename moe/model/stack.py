"""Layers from the bottom up: each segment is one loop over its periods."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Block, Segment, Stack
from moe.model import block
from moe.model.execution import Execution
from moe.model.products import gather_weights, gathers_weights
from moe.model.remat import rematerialised
from moe.model.view import View

# Per segment, per block of its period; arrays lead with the segment's repeats, or with
# 1 where all periods share them.
Tree = list[list[Any]]


def run(
    stack: Stack,
    w: dict[str, Any],
    x_BLM: jax.Array,
    view: View,
    memories: Tree | None,
    key: jax.Array | None,
    execution: Execution,
) -> tuple[jax.Array, Tree | None, tuple[block.Counted, ...]]:
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
        x_BLM, not yet normalised; the memories with the new tokens in them; and what
        sublayers counted, led by the segment's repeats, in the order of
        `Layers.places`.
    """
    filled: Tree = []
    counted: list[Any] = []
    for s, segment in enumerate(stack.segments):
        layers = [_layer(each, stack, view, key, execution) for each in segment.blocks]

        own, arrays_of = _by_period(w["layers"][s], segment)

        def period(
            x_BLM: jax.Array,
            scanned: Any,
            layers: Any = layers,
            arrays_of: Any = arrays_of,
        ) -> Any:
            own, numbers, memories = scanned
            arrays = arrays_of(own)
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
            (own, numbers, old),
            unroll=not execution.settings.scan_layers,
        )
        filled.append(kept)
        counted += sums
    return x_BLM, None if memories is None else filled, tuple(counted)


def _by_period(
    arrays: Any, segment: Segment
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """Parts the arrays that a loop runs over from those that all periods share.

    Returns:
        The former, led by the segment's repeats; and what makes a period's arrays of
        one period's share of them.
    """
    leaves, structure = jax.tree.flatten(arrays)
    shared = [segment.shared and x.shape[0] == 1 for x in leaves]
    fixed = [x[0] for x, same in zip(leaves, shared, strict=True) if same]

    def of_period(own: list[jax.Array]) -> Any:
        parts = {True: iter(fixed), False: iter(own)}
        return jax.tree.unflatten(structure, [next(parts[same]) for same in shared])

    own = [x for x, same in zip(leaves, shared, strict=True) if not same]
    return own, of_period


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
