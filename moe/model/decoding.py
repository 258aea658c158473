"""Drawing continuations: one pass over the prompts, then token by token."""

import dataclasses
from typing import Any, NamedTuple

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

NEVER = -1e30  # a logit that is never drawn
# Lower temperatures are no float32 numbers or overflow; at this one already all
# probability is that of the likeliest.
COLDEST = 1e-30


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


def generate(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length_B: jax.Array,
    key: jax.Array,
    source: Encoded | None = None,
    *,
    num_tokens: int,
    vocabulary_size: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    first_id: int = 1,
    eos_id: int = -1,
    whole_prompt: bool = False,
) -> jax.Array:
    """Continues prompts, remembering what came before; by default nothing is dropped.

    Each row is continued as if it were alone. Prompts are moved to the end of their
    rows, so that all continuations begin at the same place of the memory; the padding
    before them is seen by no token and takes no slot of an expert.

    Args:
        model: the static description.
        params: parameters, as `inventory.draw` returns them.
        prompt_BL: int32 tokens of each row, padded with anything up to L.
        prompt_length_B: int32, tokens of each prompt, in [0, L]; -1 for an empty row,
            of which nothing is drawn.
        key: PRNG key of the draws; row b uses its own, whatever the mesh.
        source: what the encoder is given; None without one.
        num_tokens: tokens to draw at most.
        vocabulary_size: ids from here on are never drawn.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw from the k likeliest; 0 from all.
        top_p: draw from the smallest set that holds this probability
            (arXiv:1904.09751).
        first_id: ids before it are never drawn: 1 where 0 is padding.
        eos_id: id after which a row is done; -1 for none.
        whole_prompt: whether the tokens of a prompt, and the start before them, see one
            another whole, as those of SeqIO's `decoder_causal_attention`.
    Returns:
        int32 tokens [B, num_tokens]; 0 after an end of sequence.
    """
    B, L = prompt_BL.shape
    source_room, remembered = 0, source
    if source is not None and source.id_BT is not None:
        source_room = source.id_BT.shape[1]
        remembered = dataclasses.replace(source, id_BT=None)
    # Inputs are the tokens shifted right: position 0 sees the start, 0.
    first_B = L - prompt_length_B
    position_BL = jnp.arange(L + 1) - first_B[:, None]
    token_BL = jnp.take_along_axis(prompt_BL, jnp.maximum(position_BL - 1, 0), axis=1)
    logits_B1V, memories = extend(
        _grouped(model, L + 1),
        params,
        jnp.where(position_BL > 0, token_BL, 0),
        position_BL >= 0,
        jnp.int32(0),
        first_B,
        empty_memories(model, B, L + 1 + num_tokens, source_room),
        source,
        bidirectional=whole_prompt,
        last_only=True,
    )
    key_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def draw(logits_BV: jax.Array, i: jax.Array) -> jax.Array:
        ids_V = jnp.arange(logits_BV.shape[-1])
        allowed_V = (ids_V >= first_id) & (ids_V < vocabulary_size)
        logits_BV = jnp.where(allowed_V, logits_BV, NEVER)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        logits_BV -= jnp.max(logits_BV, axis=-1, keepdims=True)
        logits_BV /= max(temperature, COLDEST)
        likely_BV = keep_likely(logits_BV, top_k, top_p)
        step_key_B = jax.vmap(lambda k: jax.random.fold_in(k, i))(key_B)
        return jax.vmap(jax.random.categorical)(step_key_B, likely_BV).astype(jnp.int32)

    def wanted(drawing: _Drawing) -> jax.Array:
        return (drawing.i < num_tokens) & ~jnp.all(drawing.done_B)

    def one_token(drawing: _Drawing) -> _Drawing:
        i, done_B = drawing.i, drawing.done_B
        token_B = jnp.where(done_B, 0, draw(drawing.logits_BV, i))
        done_B |= token_B == eos_id
        logits_B1V, memories = extend(
            _grouped(model, 1),
            params,
            token_B[:, None],
            ~done_B[:, None],
            L + 1 + i,
            first_B,
            drawing.memories,
            remembered,
        )
        token_BT = jax.lax.dynamic_update_slice_in_dim(
            drawing.token_BT, token_B[:, None], i, axis=1
        )
        return _Drawing(i + 1, logits_B1V[:, 0], memories, done_B, token_BT)

    start = _Drawing(
        i=jnp.int32(0),
        logits_BV=logits_B1V[:, 0],
        memories=memories,
        done_B=prompt_length_B < 0,
        token_BT=jnp.zeros((B, num_tokens), jnp.int32),
    )
    return jax.lax.while_loop(wanted, one_token, start).token_BT


class _Drawing(NamedTuple):
    """What is carried from token to token."""

    i: jax.Array
    logits_BV: jax.Array
    memories: stack.Tree
    done_B: jax.Array
    token_BT: jax.Array


def keep_likely(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Bars all but the k likeliest tokens and the nucleus of probability `top_p`."""
    if not top_k and top_p == 1:
        return logits_BV
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # Sums round, so a nucleus of 1 is not looked for. The first is always kept.
    kept_BV = (before_BV < top_p) if top_p < 1 else jnp.ones(before_BV.shape, bool)
    if top_k:
        kept_BV &= jnp.arange(logits_BV.shape[-1]) < top_k
    rank_BV = jnp.argsort(order_BV, axis=-1)
    kept_BV = jnp.take_along_axis(kept_BV.at[:, 0].set(True), rank_BV, axis=-1)
    return jnp.where(kept_BV, logits_BV, NEVER)


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
        bidirectional: whether the new tokens are a prefix, and see one another whole.
        last_only: whether logits are wanted of the last token alone.
    Returns:
        logits_BLV, or those of the last token, [B, 1, V], and the memories with the new
        tokens in them.
    """
    model = _uncut(model)
    room, source_room = _rooms(model, memories)

    def on_device(params, id_BL, mask_BL, start, first_B, memories, source):
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
            bidirectional=bidirectional,
        )
        x_BLM, memories, _ = transformer.through_layers(
            model, "decoder", params, id_BL, seen, memories, None, last_only=last_only
        )
        output = head.projection(params, model.layers.embedding)
        return head.logits_of(output, x_BLM, model.execution), memories

    rows, by_row = rules.spec(["batch", None]), rules.spec(["batch"])
    cut, alone = _memory_specs(model), PartitionSpec()
    of_source = jax.tree.map(lambda x: rows if x.ndim > 1 else by_row, source)
    return model.grid.run(
        on_device,
        in_specs=(model.partition_specs, rows, rows, alone, by_row, cut, of_source),
        out_specs=(rules.spec(["batch", None, "vocab"]), cut),
    )(params, id_BL, mask_BL, start, first_B, memories, source)


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


def _memory(model: Model, room: int, source_room: int) -> Any:
    assert model.layers.decoder is not None
    return inventory.memory(model.layers.decoder, room, source_room)


def _memory_specs(model: Model) -> Any:
    """How memories are cut."""
    return jax.tree.map(
        lambda spec: rules.spec((spec.axes[0], "batch", *spec.axes[1:])),
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
    model = _grouped(model, stream.id_BL.shape[1])
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


def _grouped(model: Model, group_size: int) -> Model:
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
