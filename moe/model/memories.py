"""New tokens after those that are remembered: the model as drawing runs it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.layers import with_routers
from moe.model import head, inventory, stack, transformer, view
from moe.model.attention.mask import Who
from moe.model.transformer import Model
from moe.model.view import Source, Stream
from partitioning import rules
from partitioning.settings import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """What an encoder is given of each row.

    Attributes:
        length_B: int32, tokens.
        id_BT: int32, the tokens, padded with anything; None once they are remembered.
    """

    length_B: jax.Array
    id_BT: jax.Array | None


def extend(
    model: Model,
    params: Any,
    id_BL: jax.Array,
    mask_BL: jax.Array,
    start: jax.Array | int,
    first_B: jax.Array,
    memories: stack.Tree,
    source: Encoded | None = None,
    *,
    image_BN: jax.Array | None = None,
    bidirectional: bool = False,
    last_only: bool = False,
) -> tuple[jax.Array, stack.Tree]:
    """Computes logits of L new tokens after `start` tokens already in memory.

    No sequence is cut: devices along `context` do the same, those along `model` their
    heads and widths.

    Args:
        model: the static description; its groups are the L tokens of one sequence.
        params: parameters, as `inventory.draw` returns them.
        id_BL: the new tokens.
        mask_BL: False for padding, which takes no slot of an expert.
        start: int32 scalar, where the first of them goes.
        first_B: int32, where the first token of each row is; before it is padding.
        memories: what `empty_memories` returns, or what came back; overwritten
            from `start` on.
        source: what the encoder is given; None without one.
        image_BN: uint8, the image whose patches are each row's first tokens, all of
            them among the new ones; None without.
        bidirectional: whether the new tokens are a prefix, and see one another whole;
            of those after an image its patches alone.
        last_only: whether logits are wanted of the last token alone.
    Returns:
        logits_BLV, or those of the last token, [B, 1, V], and the memories with the new
        tokens in them.
    """
    model = _uncut(model)
    room, source_room = _rooms(model, memories)
    patches = 0 if image_BN is None else model.layers.embedding.num_patches

    def on_device(params, id_BL, mask_BL, start, first_B, memories, source, image_BN):
        seen_source = None
        if source is not None:
            stream = _encoder_stream(source, source_room, model)
            x_BTM = None
            if source.id_BT is not None:
                x_BTM = _encoded(model, params, stream)
            who = Who(jnp.arange(source_room), stream.segment_BL)
            seen_source = Source(who, x_BTM)
        seen = view.into_memory(
            id_BL,
            mask_BL,
            start,
            first_B,
            room,
            params["decoder"].get("distance"),
            model.execution,
            seen_source,
            image_BN,
            bidirectional=bidirectional,
            prefix_tokens=patches,
        )
        x_BLM, memories, _ = transformer.through_layers(
            model, "decoder", params, id_BL, seen, memories, None, last_only=last_only
        )
        output = head.projection(params, model.layers.embedding)
        return head.logits_of(output, x_BLM, model.execution), memories

    rows, by_row = rules.spec(["batch", None]), rules.spec(["batch"])
    cut, alone = _memory_specs(model), PartitionSpec()
    of_source = jax.tree.map(lambda x: rows if x.ndim > 1 else by_row, source)
    of_image = None if image_BN is None else rows
    return model.grid.run(
        on_device,
        in_specs=(
            *(model.partition_specs, rows, rows, alone, by_row, cut),
            *(of_source, of_image),
        ),
        out_specs=(rules.spec(["batch", None, "vocab"]), cut),
    )(params, id_BL, mask_BL, start, first_B, memories, source, image_BN)


def empty_memories(
    model: Model, num_rows: int, room: int, source_room: int = 0
) -> stack.Tree:
    """Allocates what every layer keeps.

    Args:
        model: the static description.
        num_rows: B.
        room: tokens of each row.
        source_room: tokens of the encoder, of each row.
    """
    dtype = model.execution.settings.dtype
    return jax.tree.map(
        lambda spec: jnp.zeros((spec.shape[0], num_rows, *spec.shape[1:]), dtype),
        _memory(model, room, source_room),
    )


def grouped(model: Model, group_size: int) -> Model:
    """The same model, routing the given tokens of each sequence together."""
    layers = with_routers(
        model.layers,
        lambda router: dataclasses.replace(
            router,
            group_size=group_size,
            group_rows=1,
            min_capacity=max(router.min_capacity, 1),
        ),
    )
    execution = dataclasses.replace(model.execution, in_rounds=True)
    return Model(layers, execution)


def _memory(model: Model, room: int, source_room: int) -> Any:
    assert model.layers.decoder is not None
    return inventory.memory(model.layers.decoder, room, source_room)


def _memory_specs(model: Model) -> Any:
    """How memories are cut."""
    table = model.grid.table
    return jax.tree.map(
        lambda spec: rules.spec((spec.axes[0], "batch", *spec.axes[1:]), table),
        _memory(model, 1, 1),
    )


def _rooms(model: Model, memories: stack.Tree) -> tuple[int, int]:
    """How many tokens of a row, and of the encoder, memories have room for."""
    arrays = jax.tree.leaves(memories)

    def of(marked: Any) -> int:
        found = {
            array.shape[2]
            for array, spec in zip(arrays, jax.tree.leaves(marked), strict=True)
            if spec.shape[1]
        }
        return found.pop() if found else 0

    return of(_memory(model, 1, 0)), of(_memory(model, 0, 1))


def _encoder_stream(source: Encoded, room: int, model: Model) -> Stream:
    """The encoder's tokens; their padding is of no segment."""
    rows, place_T = len(source.length_B), jnp.arange(room, dtype=jnp.int32)
    segment_BT = (place_T < source.length_B[:, None]).astype(jnp.int32)
    id_BT = segment_BT if source.id_BT is None else source.id_BT * segment_BT
    return Stream(
        id_BL=id_BT,
        position_BL=place_T * segment_BT,
        segment_BL=segment_BT,
        prefix_BL=None,
        row_B=model.grid.index(*BATCH_AXES) * rows + jnp.arange(rows),
    )


def _encoded(model: Model, params: Any, stream: Stream) -> jax.Array:
    """The encoder's output; it routes the tokens of each row together."""
    model = grouped(model, stream.id_BL.shape[1])
    table = params["encoder"].get("distance")
    seen = view.of_stream(stream, table, model.execution)
    x_BTM, _, _ = transformer.through_layers(
        model, "encoder", params, stream.id_BL, seen, None, None
    )
    return x_BTM


def _uncut(model: Model) -> Model:
    """The same model where every device of `context` and `model` has all tokens."""
    uncut = dataclasses.replace(model.execution.partition, sequence_parallel=False)
    execution = dataclasses.replace(
        model.execution, partition=uncut, tokens_replicated=True
    )
    return dataclasses.replace(model, execution=execution)
