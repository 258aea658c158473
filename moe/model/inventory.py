"""All parameters of a model: what they are, and how they start.

They are a tree of dicts and lists: tables and the output projection by name, and under
the name of a stack, "layers" the sublayers' by segment, by block of a period, by name.
Arrays of layers that repeat are stacked.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Block, Layers, Segment, Stack
from moe.model import block, embedding, multi_token, norms, parameters
from moe.model.attention.positions import table_spec
from moe.model.parameters import Spec


@functools.lru_cache(maxsize=64)
def specs(layers: Layers) -> Any:
    """Describes every parameter, in the tree that `draw` returns."""
    found = {
        **embedding.specs(layers.embedding),
        **{name: _stack_specs(stack) for name, stack in layers.stacks.items()},
    }
    if layers.ahead is not None:
        found["ahead"] = _specs_of_layers(layers.ahead) | multi_token.specs(
            layers.ahead
        )
    return found


def draw(layers: Layers, key: jax.Array, param_dtype: str) -> Any:
    """Draws every parameter; those of a layer by its number, wherever it stands."""
    embedding_key, stack_key = jax.random.split(key)
    described = embedding.specs(layers.embedding)
    found = parameters.draw(described, embedding_key, param_dtype)
    of_no_layer = len(layers.stacks[layers.scored].layers)
    for name, stack in layers.stacks.items():
        own_key = stack_key
        if name != layers.scored:
            own_key = jax.random.fold_in(stack_key, of_no_layer)
        found[name] = _draw_stack(stack, own_key, param_dtype)
    if layers.ahead is not None:
        own_key = jax.random.fold_in(stack_key, of_no_layer)
        joins = parameters.draw(multi_token.specs(layers.ahead), own_key, param_dtype)
        found["ahead"] = joins | _draw_layers(layers.ahead, stack_key, param_dtype)
    return found


def memory(stack: Stack, room: int, source_room: int) -> list[list[Any]]:
    """Describes what drawing keeps of a row, of every layer; see `block.memory`."""
    return [
        [
            parameters.stack(block.memory(each, room, source_room), segment.repeats)
            for each in segment.blocks
        ]
        for segment in stack.segments
    ]


def _stack_specs(stack: Stack) -> dict[str, Any]:
    """Those of each segment, of each block of its period; norm and bias on top."""
    found = _specs_of_layers(stack)
    if stack.norm is not None:
        found["norm"] = norms.specs(stack.norm, stack.width)
    if stack.shared_positions is not None:
        heads = stack.settings("heads")[0]
        found["distance"] = table_spec(
            stack.shared_positions, heads.num_heads, heads.init_scale
        )
    return found


def _specs_of_layers(stack: Stack) -> dict[str, Any]:
    return {
        "layers": [
            [_layers_specs(each, segment, stack.width) for each in segment.blocks]
            for segment in stack.segments
        ],
    }


def _layers_specs(each: Block, segment: Segment, width: int) -> Any:
    """Those of a block of every period; one of each that the periods share."""

    def one(spec: Spec) -> Spec:
        shared = segment.shared and not spec.per_layer
        return parameters.stack(spec, 1 if shared else segment.repeats)

    return jax.tree.map(one, block.specs(each, width))


def _draw_stack(stack: Stack, key: jax.Array, param_dtype: str) -> dict[str, Any]:
    described = _stack_specs(stack)
    return parameters.draw(
        {name: tree for name, tree in described.items() if name != "layers"},
        key,
        param_dtype,
    ) | _draw_layers(stack, key, param_dtype)


def _draw_layers(stack: Stack, key: jax.Array, param_dtype: str) -> dict[str, Any]:
    def layers(each: Block, segment: Segment, place: int) -> Any:
        described = block.specs(each, stack.width)
        numbers_P = jnp.array(segment.numbers(place))
        drawn = jax.vmap(
            lambda number: parameters.draw(
                described, jax.random.fold_in(key, number), param_dtype
            )
        )
        if not segment.shared:
            return drawn(numbers_P)
        kept = _layers_specs(each, segment, stack.width)  # those of the lowest layer
        first = drawn(numbers_P[:1])
        return jax.tree.map(
            lambda x, spec: jnp.broadcast_to(x, spec.shape), first, kept
        )

    return {
        "layers": [
            [layers(each, segment, place) for place, each in enumerate(segment.blocks)]
            for segment in stack.segments
        ]
    }
