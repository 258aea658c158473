"""Drawing a continuation: one pass over the prompt, then token by token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe.model import transformer
from moe.model.attention import NEVER, Cache
from moe.model.transformer import Model


def generate(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length: jax.Array,
    key: jax.Array,
    *,
    num_tokens: int,
    vocabulary_size: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Continues a prompt with a key-value cache; by default no token is dropped.

    Args:
        model: the static description.
        params: as `init_params` returns them.
        prompt_BL: int32 tokens, the same in every row, padded with 0 to any length.
        prompt_length: int32 scalar, tokens of the prompt; may be 0.
        key: of the draws; row b uses its own, whatever the mesh.
        num_tokens: tokens to draw.
        vocabulary_size: ids from here on are never drawn, nor is 0, padding.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: draw from the k likeliest; 0 from all.
        top_p: draw from the smallest set that holds this probability
            (arXiv:1904.09751).
    Returns:
        int32 tokens [B, num_tokens]; what follows an end-of-sequence id is noise.
    """
    B, L = prompt_BL.shape
    # Inputs are the tokens shifted right: position 0 sees the start, 0.
    input_BL = jnp.pad(prompt_BL, ((0, 0), (1, 0)))
    mask_BL = jnp.broadcast_to(jnp.arange(L + 1) <= prompt_length, input_BL.shape)
    logits_BLV, cache = transformer.forward_cached(
        _grouped(model, L + 1),
        params,
        input_BL,
        mask_BL,
        jnp.int32(0),
        empty_cache(model, B, L + 1 + num_tokens),
    )
    key_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(B))
    logits_BV = jnp.take(logits_BLV, prompt_length, axis=1)

    def draw(logits_BV: jax.Array, i: jax.Array) -> jax.Array:
        ids_V = jnp.arange(logits_BV.shape[-1])
        allowed_V = (ids_V > 0) & (ids_V < vocabulary_size)
        logits_BV = jnp.where(allowed_V, logits_BV, NEVER)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        likely_BV = keep_likely(logits_BV / temperature, top_k, top_p)
        step_key_B = jax.vmap(lambda k: jax.random.fold_in(k, i))(key_B)
        return jax.vmap(jax.random.categorical)(step_key_B, likely_BV).astype(jnp.int32)

    def one_token(carried: Any, i: jax.Array) -> tuple[Any, jax.Array]:
        logits_BV, cache = carried
        token_B = draw(logits_BV, i)
        logits_B1V, cache = transformer.forward_cached(
            _grouped(model, 1),
            params,
            token_B[:, None],
            jnp.ones((B, 1), bool),
            prompt_length + 1 + i,
            cache,
        )
        return (logits_B1V[:, 0], cache), token_B

    _, token_TB = jax.lax.scan(one_token, (logits_BV, cache), jnp.arange(num_tokens))
    return token_TB.T


def keep_likely(logits_BV: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Bars all but the k likeliest tokens and the nucleus of probability `top_p`."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = before_BV < top_p  # the first is always kept
    if top_k:
        kept_BV &= jnp.arange(logits_BV.shape[-1]) < top_k
    rank_BV = jnp.argsort(order_BV, axis=-1)
    kept_BV = jnp.take_along_axis(kept_BV.at[:, 0].set(True), rank_BV, axis=-1)
    return jnp.where(kept_BV, logits_BV, NEVER)


def empty_cache(model: Model, num_rows: int, room: int) -> tuple[Cache, ...]:
    """Allocates keys and values of all layers for `room` tokens."""
    settings = model.settings

    def zeros(periods: int, layers: int) -> Cache:
        shape = (periods, layers, num_rows, room, settings.num_heads, settings.head_dim)
        array = jnp.zeros(shape, settings.dtype)
        return Cache(key_BTND=array, value_BTND=array)

    dense = settings.first_dense_layers
    first = (zeros(dense, 1),) if dense else ()
    return (*first, zeros(settings.num_periods, max(settings.moe_every, 1)))


def _grouped(model: Model, group_size: int) -> Model:
    """The same model, routing the given tokens of each sequence together."""
    router = dataclasses.replace(
        model.router,
        group_size=group_size,
        min_capacity=max(model.router.min_capacity, 1),
    )
    return dataclasses.replace(model, router=router, in_rounds=True)
