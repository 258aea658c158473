"""Beam search: the likeliest continuations, kept side by side."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe.model import stack
from moe.model.decoding import NEVER, allowed, begin
from moe.model.memories import Encoded, extend, grouped
from moe.model.transformer import Model


def search(
    model: Model,
    params: Any,
    prompt_BL: jax.Array,
    prompt_length_B: jax.Array,
    source: Encoded | None = None,
    image_BN: jax.Array | None = None,
    *,
    num_beams: int,
    num_tokens: int,
    vocabulary_size: int,
    length_penalty: float,
    first_id: int = 1,
    eos_id: int = -1,
    whole_prompt: bool = False,
    start_id: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Finds continuations of high probability.

    As T5X does: of the 2K likeliest continuations of K beams, those that end compete
    for K finished places by their log-probability over ((5 + length) / 6)^penalty
    (arXiv:1609.08144, eq. 14, without coverage), the others for K places that go on.
    A row is done when no beam that goes on can become better than the worst finished.

    Args:
        model: the static description.
        params: parameters, as `inventory.draw` returns them.
        prompt_BL: int32 tokens of each row, padded with anything up to L.
        prompt_length_B: int32, tokens of each prompt; -1 for an empty row.
        source: what the encoder is given; None without one.
        image_BN: image before each prompt, as in `decoding.generate`.
        num_beams: K.
        num_tokens: tokens to draw at most.
        vocabulary_size: ids from here on are never drawn.
        length_penalty: exponent; 0 compares sums, more favours longer ones.
        first_id: ids before it are never drawn.
        eos_id: id that ends a continuation; -1 for none.
        whole_prompt: whether the tokens of a prompt see one another whole.
        start_id: what is read before a prompt.
    Returns:
        int32 tokens [B, K, num_tokens], the best first, 0 after an end of sequence; and
        their scores [B, K]. Where nothing ended, those that were cut off.
    """
    B, L = prompt_BL.shape
    K = num_beams
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

    def each_beam(array: Any) -> Any:
        return None if array is None else jnp.repeat(array, K, axis=0)

    first_N, source_N = each_beam(begun.first_B), jax.tree.map(each_beam, begun.source)

    def penalised(sum_BX: jax.Array, length: jax.Array | int) -> jax.Array:
        return sum_BX / ((5.0 + length) / 6.0) ** length_penalty

    def wanted(beams: _Beams) -> jax.Array:
        # A sum only falls; at its largest length it is penalised least.
        reach_B = penalised(beams.sum_BK[:, 0], num_tokens)
        better_B = reach_B > jnp.min(beams.finished_BK, axis=1)
        going_B = better_B & (prompt_length_B >= 0)
        return (beams.i < num_tokens) & jnp.any(going_B)

    def one_token(beams: _Beams) -> _Beams:
        i = beams.i
        log_p_NV = jax.nn.log_softmax(beams.logits_NV)
        log_p_NV = allowed(log_p_NV, first_id, vocabulary_size)
        sum_BC, from_BC, token_BC = _likeliest(beams.sum_BK, log_p_NV)
        row_BCT = _taken(beams.token_BKT, from_BC).at[:, :, i].set(token_BC)
        ends_BC = token_BC == eos_id

        ended_BC = jnp.where(ends_BC, penalised(sum_BC, i + 1), NEVER)
        both_BX = jnp.concatenate([beams.finished_BK, ended_BC], axis=1)
        finished_BK, place_BK = jax.lax.top_k(both_BX, K)
        all_BXT = jnp.concatenate([beams.ended_BKT, row_BCT], axis=1)

        going_BC = jnp.where(ends_BC, NEVER, sum_BC)
        sum_BK, going_BK = jax.lax.top_k(going_BC, K)
        token_BKT = _taken(row_BCT, going_BK)
        logits_N1V, memories = extend(
            grouped(model, 1),
            params,
            token_BKT[:, :, i].reshape(-1, 1),
            jnp.repeat(prompt_length_B >= 0, K)[:, None],
            L + 1 + i,
            first_N,
            _remembered(beams.memories, _taken(from_BC, going_BK)),
            source_N,
        )
        return _Beams(
            i + 1,
            logits_N1V[:, 0],
            memories,
            sum_BK,
            token_BKT,
            finished_BK,
            _taken(all_BXT, place_BK),
        )

    zeros_BKT = jnp.zeros((B, K, num_tokens), jnp.int32)
    beams = jax.lax.while_loop(
        wanted,
        one_token,
        _Beams(
            i=jnp.int32(0),
            logits_NV=each_beam(begun.logits_BV),
            memories=jax.tree.map(lambda x: jnp.repeat(x, K, axis=1), begun.memories),
            # All beams are alike at first: one of them is enough.
            sum_BK=jnp.full((B, K), NEVER).at[:, 0].set(0.0),
            token_BKT=zeros_BKT,
            finished_BK=jnp.full((B, K), NEVER),
            ended_BKT=zeros_BKT,
        ),
    )
    none_B1 = jnp.all(beams.finished_BK <= NEVER / 2, axis=1, keepdims=True)
    tokens_BKT = jnp.where(none_B1[..., None], beams.token_BKT, beams.ended_BKT)
    cut_off_BK = penalised(beams.sum_BK, num_tokens)
    return tokens_BKT, jnp.where(none_B1, cut_off_BK, beams.finished_BK)


class _Beams(NamedTuple):
    """What is carried from token to token; N are the beams of all rows."""

    i: jax.Array
    logits_NV: jax.Array
    memories: stack.Tree
    sum_BK: jax.Array
    token_BKT: jax.Array
    finished_BK: jax.Array
    ended_BKT: jax.Array


def _likeliest(
    sum_BK: jax.Array, log_p_NV: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The 2K likeliest continuations: sums, the beams they continue, and tokens."""
    (B, K), V = sum_BK.shape, log_p_NV.shape[-1]
    sum_BX = (sum_BK[..., None] + log_p_NV.reshape(B, K, V)).reshape(B, -1)
    sum_BC, choice_BC = jax.lax.top_k(sum_BX, 2 * K)
    return sum_BC, choice_BC // V, choice_BC % V


def _taken(array_BX: jax.Array, place_BK: jax.Array) -> jax.Array:
    """What is at these places of each row; dimensions behind them come along."""
    trailing = (1,) * (array_BX.ndim - 2)
    return jnp.take_along_axis(
        array_BX, place_BK.reshape(*place_BK.shape, *trailing), axis=1
    )


def _remembered(memories: stack.Tree, from_BK: jax.Array) -> stack.Tree:
    """Each beam's memory from the beam that it continues, within its own row."""
    B, K = from_BK.shape

    def one(array: jax.Array) -> jax.Array:
        by_row = array.reshape(array.shape[0], B, K, *array.shape[2:])
        return jax.vmap(_taken, (0, None))(by_row, from_BK).reshape(array.shape)

    return jax.tree.map(one, memories)
