"""Drawing continuations: one pass over the prompts, then token by token."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.layers import with_routers
from moe.model import head, inventory, stack, transformer, view
from moe.model.transformer import Model
from partitioning import rules

NEVER = -1e30  # a logit that is never drawn
# Lower temperatures are no float32 numbers or overflow; at this one already all
# probability is that of the likeliest.
COLDEST = 1e-30


def generate(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length_B: jax.Array,
    key: jax.Array,
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
        empty_memories(model, B, L + 1 + num_tokens),
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
        bidirectional: whether the new tokens are a prefix, and see one another whole.
        last_only: whether logits are wanted of the last token alone.
    Returns:
        logits_BLV, or those of the last token, [B, 1, V], and the memories with the new
        tokens in them.
    """
    uncut = dataclasses.replace(model.execution.partition, sequence_parallel=False)
    execution = dataclasses.replace(
        model.execution, partition=uncut, tokens_replicated=True
    )
    model = dataclasses.replace(model, execution=execution)
    (room,) = {array.shape[2] for array in jax.tree.leaves(memories)}

    def on_device(params, id_BL, mask_BL, start, first_B, memories):
        seen = view.into_memory(
            id_BL,
            mask_BL,
            start,
            first_B,
            room,
            params["decoder"].get("distance"),
            execution,
            bidirectional=bidirectional,
        )
        x_BLM, memories, _ = transformer.through_layers(
            model, params, id_BL, seen, memories, None, last_only=last_only
        )
        head_mv = head.projection(params, model.layers.embedding)
        return head.logits_of(head_mv, x_BLM, execution), memories

    rows, cut = rules.spec(["batch", None]), _memory_specs(model)
    return model.grid.run(
        on_device,
        in_specs=(
            model.partition_specs,
            rows,
            rows,
            PartitionSpec(),
            rules.spec(["batch"]),
            cut,
        ),
        out_specs=(rules.spec(["batch", None, "vocab"]), cut),
    )(params, id_BL, mask_BL, start, first_B, memories)


def empty_memories(model: Model, num_rows: int, room: int) -> stack.Tree:
    """Allocates what every layer keeps, for `room` tokens of each row."""
    dtype = model.execution.settings.dtype
    return jax.tree.map(
        lambda spec: jnp.zeros((spec.shape[0], num_rows, room, *spec.shape[1:]), dtype),
        inventory.memory(model.layers.decoder),
    )


def _memory_specs(model: Model) -> Any:
    """How memories are cut."""
    return jax.tree.map(
        lambda spec: rules.spec((spec.axes[0], "batch", None, *spec.axes[1:])),
        inventory.memory(model.layers.decoder),
    )


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
