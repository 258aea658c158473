"""A layer: sublayers that read the residual stream in turn and add to it."""

from typing import Any

import jax

from moe.layers import Block, Stack
from moe.model import norms, sparse
from moe.model.attention import heads
from moe.model.dropout import dropout
from moe.model.execution import Execution
from moe.model.feed_forward import dense
from moe.model.view import View

# Kinds of sublayers. Each is a file with `specs`, `memory` and `apply`.
KINDS: dict[str, Any] = {"heads": heads, "dense": dense, "sparse": sparse}

Tree = dict[str, Any]  # by name of the sublayer


def specs(block: Block, width: int) -> Tree:
    """Describes the parameters of a layer."""
    return {
        each.name: {
            "norm": norms.specs(each.norm, width),
            **KINDS[each.kind].specs(each.settings, width),
        }
        for each in block
    }


def memory(block: Block) -> Tree:
    """Describes what drawing keeps of a token; sublayers that keep nothing are out."""
    kept = {each.name: KINDS[each.kind].memory(each.settings) for each in block}
    return {name: described for name, described in kept.items() if described}


def run(
    block: Block,
    w: Tree,
    x_BLM: jax.Array,
    view: View,
    memories: Tree | None,
    key: jax.Array | None,
    number: jax.Array,
    stack: Stack,
    execution: Execution,
) -> tuple[jax.Array, Tree | None, list[Any]]:
    """Adds what each sublayer makes of the normalised stream.

    Args:
        block: the layer's sublayers.
        w: their weights.
        x_BLM: this device's cut of the residual stream.
        view: who the tokens are.
        memories: what is left of the tokens before; None in training and scoring.
        key: PRNG key of the step; None outside training.
        number: the layer's number.
        stack: the layers around it, for dropout.
        execution: how it is computed.
    Returns:
        x_BLM; the memories with the new tokens in them; and the sums of each sublayer
        that has some, in their order.
    """
    kept, counted = {}, []
    for place, each in enumerate(block):
        own_key = drop_key = None
        if key is not None:
            layer_key = jax.random.fold_in(key, number)
            own_key, drop_key = jax.random.split(jax.random.fold_in(layer_key, place))
        y_BLM, memory, sums = KINDS[each.kind].apply(
            w[each.name],
            norms.normalise(w[each.name]["norm"], x_BLM, each.norm),
            view,
            None if memories is None else memories.get(each.name),
            each.settings,
            own_key,
            number,
            execution,
        )
        row_B = view.routed.row_B
        x_BLM = x_BLM + dropout(y_BLM, stack.dropout, drop_key, row_B, execution)
        if memory is not None:
            kept[each.name] = memory
        if sums is not None:
            counted.append(sums)
    return x_BLM, None if memories is None else kept, counted
