"""Drawing continuations: one pass over the prompts, then token by token."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.model import stack
from moe.model.memories import Encoded, empty_memories, extend, grouped
from moe.model.transformer import Model

NEVER = -1e30  # a logit that is never drawn
# Lower temperatures are no float32 numbers or overflow; at this one already all
# probability is that of the likeliest.
COLDEST = 1e-30


class Begun(NamedTuple):
    """Prompts that were read.

    Attributes:
        logits_BV: logits of the token after each.
        memories: what every layer keeps, with room for what is drawn.
        first_B: int32, where each row begins.
        source: what the encoder was given, now remembered; None without one.
    """

    logits_BV: jax.Array
    memories: stack.Tree
    first_B: jax.Array
    source: Encoded | None


def begin(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length_B: jax.Array,
    source: Encoded | None,
    image_BN: jax.Array | None = None,
    *,
    num_tokens: int,
    whole_prompt: bool,
    start_id: int = 0,
) -> Begun:
    """Reads prompts, and what the encoder is given.

    Prompts are moved to the end of their rows, so that all continuations begin at the
    same place of the memory; the padding before them is seen by no token and takes no
    slot of an expert. Arguments are those of `generate`.
    """
    B, L = prompt_BL.shape
    source_room, remembered = 0, source
    if source is not None and source.id_BT is not None:
        source_room = source.id_BT.shape[1]
        remembered = dataclasses.replace(source, id_BT=None)
    # Inputs are the tokens shifted right: position 0 sees the start.
    first_B = L - prompt_length_B
    position_BL = jnp.arange(L + 1) - first_B[:, None]
    token_BL = jnp.take_along_axis(prompt_BL, jnp.maximum(position_BL - 1, 0), axis=1)
    logits_B1V, memories = extend(
        grouped(model, L + 1),
        params,
        jnp.where(position_BL > 0, token_BL, start_id),
        position_BL >= 0,
        jnp.int32(0),
        first_B,
        empty_memories(model, B, L + 1 + num_tokens, source_room),
        source,
        image_BN=image_BN,
        bidirectional=whole_prompt,
        last_only=True,
    )
    return Begun(logits_B1V[:, 0], memories, first_B, remembered)


def allowed(logits_BV: jax.Array, first_id: int, vocabulary_size: int) -> jax.Array:
    """Bars ids that stand for no token."""
    ids_V = jnp.arange(logits_BV.shape[-1])
    allowed_V = (ids_V >= first_id) & (ids_V < vocabulary_size)
    return jnp.where(allowed_V, logits_BV, NEVER)


def generate(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length_B: jax.Array,
    key: jax.Array,
    source: Encoded | None = None,
    image_BN: jax.Array | None = None,
    *,
    num_tokens: int,
    vocabulary_size: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    first_id: int = 1,
    eos_id: int = -1,
    whole_prompt: bool = False,
    start_id: int = 0,
) -> jax.Array:
    """Continues prompts, remembering what came before; by default nothing is dropped.

    Each row is continued as if it were alone.

    Args:
        model: the static description.
        params: parameters, as `inventory.draw` returns them.
        prompt_BL: int32 tokens of each row, padded with anything up to L.
        prompt_length_B: int32, tokens of each prompt, in [0, L]; -1 for an empty row,
            of which nothing is drawn.
        key: PRNG key of the draws; row b uses its own, whatever the mesh.
        source: what the encoder is given; None without one.
        image_BN: uint8, the image before each prompt, whose first tokens stand for its
            patches, whatever they are; None without.
        num_tokens: tokens to draw at most.
        vocabulary_size: ids from here on are never drawn.
        temperature: temperature of the softmax; 0 takes the likeliest token.
        top_k: draw from the k likeliest; 0 from all.
        top_p: draw from the smallest set that holds this probability
            (arXiv:1904.09751).
        first_id: ids before it are never drawn: 1 where 0 is padding.
        eos_id: id after which a row is done; -1 for none.
        whole_prompt: whether the tokens of a prompt, and the start before them, see one
            another whole, as those of SeqIO's `decoder_causal_attention`.
        start_id: what is read before a prompt.
    Returns:
        int32 tokens [B, num_tokens]; 0 after an end of sequence.
    """
    B, L = prompt_BL.shape
    begun = begin(
        model,
        params,
        prompt_BL,
        prompt_length_B,
        source,
        image_BN,
        num_tokens=num_tokens,
        whole_prompt=whole_prompt,
        start_id=start_id,
    )
    key_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))

    def draw(logits_BV: jax.Array, i: jax.Array) -> jax.Array:
        logits_BV = allowed(logits_BV, first_id, vocabulary_size)
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
            grouped(model, 1),
            params,
            token_B[:, None],
            ~done_B[:, None],
            L + 1 + i,
            begun.first_B,
            drawing.memories,
            begun.source,
        )
        token_BT = jax.lax.dynamic_update_slice_in_dim(
            drawing.token_BT, token_B[:, None], i, axis=1
        )
        return _Drawing(i + 1, logits_B1V[:, 0], memories, done_B, token_BT)

    start = _Drawing(
        i=jnp.int32(0),
        logits_BV=begun.logits_BV,
        memories=begun.memories,
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
