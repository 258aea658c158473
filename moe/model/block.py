"""A layer: sublayers that read the residual stream in turn and add to it."""

from typing import Any

import jax

from moe.layers import Block, Stack
from moe.model import norms, parameters, sparse
from moe.model.attention import cross, heads, latent
from moe.model.attention.attend import LargestLogits
from moe.model.dropout import dropout
from moe.model.execution import Execution
from moe.model.feed_forward import dense
from moe.model.view import View
from moe.routing.assignment import RouterSums

# Kinds of sublayers. Each is a file with `specs`, `memory` and `apply`; one that
# measures its logits has `with_logits_times` too.
KINDS: Any = {
    "heads": heads,
    "latent": latent,
    "cross": cross,
    "dense": dense,
    "sparse": sparse,
}

OF_SOURCE = ("cross",)  # of them, those that remember the other stack's tokens

Tree = dict[str, Any]  # by name of the sublayer
Counted = RouterSums | LargestLogits  # what a sublayer may return of its tokens


def specs(block: Block, width: int) -> Tree:
    """Describes the parameters of a layer."""
    return {
        each.name: {
            **{name: norms.specs(each.norm, width) for name in each.norm.names},
            **KINDS[each.kind].specs(each.settings, width),
        }
        for each in block
    }


def memory(block: Block, room: int, source_room: int) -> Tree:
    """Describes what drawing keeps of a row; sublayers that keep nothing are out.

    Args:
        block: the layer's sublayers.
        room: tokens of a row.
        source_room: those of the encoder.
    """
    kept = {}
    for each in block:
        if described := KINDS[each.kind].memory(each.settings):
            tokens = source_room if each.kind in OF_SOURCE else room
            kept[each.name] = parameters.stack(described, tokens, None)
    return kept


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
) -> tuple[jax.Array, Tree | None, list[Counted]]:
    """Adds what each sublayer makes of the stream, normalised where its norm says.

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
        x_BLM; the memories with the new tokens in them; and what sublayers counted, in
        their order.
    """
    kept, counted = {}, []
    for place, each in enumerate(block):
        own_key = drop_key = None
        if key is not None:
            layer_key = jax.random.fold_in(key, number)
            own_key, drop_key = jax.random.split(jax.random.fold_in(layer_key, place))
        own, norm = w[each.name], each.norm
        given_BLM = x_BLM
        if norm.place in ("before", "both"):
            given_BLM = norms.normalise(own["norm"], x_BLM, norm)
        y_BLM, memory, sums = KINDS[each.kind].apply(
            own,
            given_BLM,
            view,
            None if memories is None else memories.get(each.name),
            each.settings,
            own_key,
            number,
            execution,
        )
        if norm.place in ("output", "both"):
            y_BLM = norms.normalise(own["output_norm"], y_BLM, norm)
        row_B = view.routed.row_B
        y_BLM = dropout(y_BLM, stack.dropout, drop_key, row_B, execution)
        x_BLM = x_BLM + _scaled(y_BLM, stack.residual_scale)
        if norm.place == "after":
            x_BLM = norms.normalise(own["norm"], x_BLM, norm)
        if memory is not None:
            kept[each.name] = memory
        if sums is not None:
            counted.append(sums)
    return x_BLM, None if memories is None else kept, counted


def _scaled(y_BLM: jax.Array, scale: float) -> jax.Array:
    return y_BLM if scale == 1 else y_BLM * scale
