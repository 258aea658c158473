"""The body that all kinds of attention share: remember, expand, ask, mix."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.model.attention import blocks, kernel_method, whole
from moe.model.attention.mask import Who
from moe.model.attention.scoring import Scoring
from moe.model.execution import Execution
from moe.model.products import product
from moe.model.view import Source, View

OUTPUT_NAME = "attention_output"  # kept by remat, so that no sum over devices repeats

Weights = dict[str, Any]  # arrays, and the weights of norms by name
Memory = dict[str, jax.Array]  # each [B, T, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LargestLogits:
    """What attention returns beside its output, if the pass measures logits.

    Attributes:
        logit_N: float32, the largest product of each of this device's heads that a
            query sees, scaled, before any bound or bias. Of two passes the greater
            holds.
    """

    logit_N: jax.Array


class Kind(NamedTuple):
    """What kinds of attention differ in.

    Attributes:
        ask: (weights, x_BLM, position_BL, settings) to query_BLND.
        remember: function of the same to what later tokens need of these.
        expand: (weights, memory, settings) to key_BTUD and value_BTUX.
        scoring: (weights, view, reach, settings) to what scores are made of.
        finish: (weights, mixed_BLNX, x_BLM, settings) to what the output is made of;
            None where that is mixed_BLNX.
    """

    ask: Callable[..., jax.Array]
    remember: Callable[..., Memory]
    expand: Callable[..., tuple[jax.Array, jax.Array]]
    scoring: Callable[..., Scoring]
    finish: Callable[..., jax.Array] | None = None


def attend(
    kind: Kind,
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: Memory | None,
    settings: Any,
    execution: Execution,
    source: Source | None = None,
) -> tuple[jax.Array, Memory | None, LargestLogits | None]:
    """Attends within each segment, to the tokens themselves or to others.

    Args:
        kind: what is remembered, and what is asked.
        w: the sublayer's weights, whole but for heads, which are cut over `model`.
        x_BLM: this device's cut of the residual stream, normalised; the result has its
            dtype and cut, scores are float32.
        view: who the tokens are.
        memory: what is left of the tokens before; None in training and scoring.
        settings: record of the kind.
        execution: blocks, and the mesh.
        source: another stack's tokens, which are seen instead.
    Returns:
        y_BLM; the memory with the new tokens in it, or the source; and the largest
        logits, if the pass measures them.
    """
    grid = execution.grid
    x_BLM = grid.enter(x_BLM)
    query_BLND = kind.ask(w, x_BLM, view.position_BL, settings)
    if source is not None:
        view = dataclasses.replace(view, keys=source.keys)
    elif settings.chunk:
        view = _in_chunks(view, settings.chunk, execution)
    told_BTM = x_BLM if source is None else source.x_BTM
    held: Memory
    if told_BTM is None:  # the source is remembered
        assert memory is not None
        held = memory
    else:
        held = fresh = kind.remember(w, told_BTM, view.position_BL, settings)
        if source is None and memory is not None and view.start is not None:
            start = view.start
            held = {
                name: lax.dynamic_update_slice_in_dim(memory[name], new, start, 1)
                for name, new in fresh.items()
            }
    # As far as tokens of a row are apart, and what pads the last block.
    reach = jax.tree.leaves(held)[0].shape[1] * grid.size("context")
    reach += execution.settings.attention_block
    if _is_cut(view, execution) and not _goes_round(execution):
        held = {name: grid.gather(x, ["context"], 1) for name, x in held.items()}
    key_BTUD, value_BTUX = kind.expand(w, held, settings)
    scoring = kind.scoring(w, view, reach, settings)
    given = query_BLND, key_BTUD, value_BTUX, view, scoring, execution
    mixed_BLNX, largest = mix(*given)
    if kind.finish is not None:
        mixed_BLNX = kind.finish(w, mixed_BLNX, x_BLM, settings)
    if "gate" in w:
        mixed_BLNX *= jax.nn.sigmoid(product(x_BLM, w["gate"]))
    y_BLM = grid.leave(product(mixed_BLNX, w["output"], inputs=2))
    y_BLM = checkpoint_name(y_BLM, OUTPUT_NAME)
    if "output_bias" in w:
        y_BLM += w["output_bias"].astype(y_BLM.dtype)
    return y_BLM, None if memory is None else held, largest


def _in_chunks(view: View, chunk: int, execution: Execution) -> View:
    """Makes each piece of a segment a segment of its own, for all who see."""
    place_T, position_BL = view.keys.place_L, view.position_BL
    if view.start is not None:  # a memory: places count from the same first token
        position_BT = place_T + (position_BL[:, :1] - view.queries.place_L[0])
    elif view.keys is view.queries:
        position_BT = position_BL
    else:
        position_BT = execution.grid.gather(position_BL, ["context"], 1)
    whole = len(place_T) * execution.grid.size("context")  # the longest row
    pieces = whole // chunk + 1

    def cut(who: Who, position: jax.Array) -> Who:
        piece = jnp.maximum(position, 0) // chunk
        return dataclasses.replace(who, segment_BL=who.segment_BL * pieces + piece)

    queries = keys = cut(view.queries, position_BL)
    if view.keys is not view.queries:
        keys = cut(view.keys, position_BT)
    return dataclasses.replace(view, queries=queries, keys=keys)


def mix(
    query_BLND: jax.Array,
    key_BTUD: jax.Array,
    value_BTUX: jax.Array,
    view: View,
    scoring: Scoring,
    execution: Execution,
) -> tuple[jax.Array, LargestLogits | None]:
    """Mixes values by the way that suits the pass; returns mixed_BLNX.

    Logits are measured apart, whichever way that is: libraries' kernels tell none.
    """
    grid, block = execution.grid, execution.settings.attention_block
    who, ring = (view.queries, view.keys, scoring), blocks.Ring()

    def measured(key_BTUD: jax.Array, ring: blocks.Ring) -> LargestLogits | None:
        if not execution.measures_logits:
            return None
        return LargestLogits(
            blocks.largest(query_BLND, key_BTUD, *who, block=block, ring=ring)
        )

    method = _kernel(query_BLND, value_BTUX, view, scoring, execution)
    if method is not None:  # imported here: it may be of no other platform
        from moe.model.attention import kernel

        given = query_BLND, key_BTUD, value_BTUX, *who
        return kernel.attend(*given, method=method), measured(key_BTUD, ring)
    if _is_cut(view, execution) and _goes_round(execution):
        ring = blocks.Ring("context", grid.size("context"))
        block = block or key_BTUD.shape[1]
        mixed_BLNX = blocks.attend(
            query_BLND, key_BTUD, value_BTUX, *who, block=block, ring=ring
        )
        return mixed_BLNX, measured(key_BTUD, ring)
    # A memory has room for more tokens than there are yet.
    tokens = key_BTUD.shape[1] if view.start is None else query_BLND.shape[1]
    if 0 < block <= tokens:
        mixed_BLNX = blocks.attend(query_BLND, key_BTUD, value_BTUX, *who, block=block)
    else:
        mixed_BLNX = whole.attend(query_BLND, key_BTUD, value_BTUX, *who)
    return mixed_BLNX, measured(key_BTUD, ring)


def _is_cut(view: View, execution: Execution) -> bool:
    """Whether devices of `context` have pieces of every sequence."""
    whole = view.start is not None or execution.tokens_replicated
    return not whole and execution.grid.size("context") > 1


def _goes_round(execution: Execution) -> bool:
    """Whether keys of a sequence that is cut go round, instead of being gathered."""
    return execution.grid.partition.context_attention == "ring"


def _kernel(
    query_BLND: jax.Array,
    value_BTUX: jax.Array,
    view: View,
    scoring: Scoring,
    execution: Execution,
) -> kernel_method.Kernel | None:
    """Asks for a library's kernel; memories are attended without one."""
    if execution.settings.attention_kernel == "off" or view.start is not None:
        return None
    device = execution.mesh.devices.flat[0]
    method, _ = kernel_method.pick(
        device.platform,
        device.device_kind,
        query_BLND.dtype.name,
        length=query_BLND.shape[1],
        width=query_BLND.shape[-1],
        value_width=value_BTUX.shape[-1],
        # A token of the same row is seen by itself, as kernels need it.
        whole=view.keys is view.queries and execution.grid.size("context") == 1,
        bias=scoring.bias is not None,
        prefix=view.queries.prefix_BL is not None,
        sink=scoring.sink_N is not None,
        cap=scoring.cap > 0,
    )
    return method
