"""Experts over sorted rows on CPU: loops over the experts that have rows.

What they cost does not depend on the experts that have none. Every expert takes its
rows in blocks, and every buffer is updated in place.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.model.feed_forward.grouped_rows import activate, split_inputs, zero_past

Weights = dict[str, jax.Array]

# Rows of a block. An expert's first block is the smallest that leaves a whole number of
# the largest, which follow; smaller steps would waste fewer rows and compile longer.
BLOCK_ROWS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked(
    w: Weights, rows_RM: jax.Array, size_e: jax.Array, activation: str
) -> jax.Array:
    """One expert after the other, block by block; every buffer is updated in place."""
    return _blocked_forward(w, rows_RM, size_e, activation)[0]


def _blocked_forward(
    w: Weights, rows_RM: jax.Array, size_e: jax.Array, activation: str
) -> tuple[jax.Array, Any]:
    R = rows_RM.shape[0]
    x_RM = zero_past(rows_RM, size_e, pad=_overshoot(R))

    def forward(carried: Any, own: Weights, block: Block) -> Any:
        y_RM, up_RU = carried
        up_rU = _product("rM,MU->rU", block.read(x_RM), own["up"])
        up_rU += own.get("up_bias", 0)
        hidden_rF = activate(activation, *split_inputs(activation, up_rU))
        y_rM = _product("rF,FM->rM", hidden_rF, own["down"])
        y_rM += own.get("down_bias", 0)
        return block.write(y_RM, y_rM), block.write(up_RU, up_rU)

    zeros = (
        jnp.zeros_like(x_RM),
        jnp.zeros((x_RM.shape[0], w["up"].shape[2]), x_RM.dtype),
    )
    y_RM, up_RU = _each_block(forward, w, x_RM, size_e, R, zeros)
    up_RU = checkpoint_name(up_RU, "expert_hidden")
    return zero_past(y_RM[:R], size_e), (w, rows_RM, size_e, up_RU)


def _blocked_backward(
    activation: str, saved: Any, dy_RM: jax.Array
) -> tuple[Weights, jax.Array, None]:
    w, rows_RM, size_e, up_RU = saved
    R = rows_RM.shape[0]
    x_RM = zero_past(rows_RM, size_e, pad=_overshoot(R))
    dy_RM = zero_past(dy_RM, size_e, pad=_overshoot(R))

    def backward(carried: Any, own: Weights, block: Block) -> Any:
        dx_RM, dw = carried
        # Rows of a block that are not its expert's enter every sum through this zero.
        dy_rM = jnp.where(block.mask_r1, block.read(dy_RM), 0)
        x_rM, up_rU = block.read(x_RM), block.read(up_RU)
        hidden_rF, back = jax.vjp(
            functools.partial(activate, activation), *split_inputs(activation, up_rU)
        )
        dhidden_rF = _product("rM,FM->rF", dy_rM, own["down"])
        dup_rU = jnp.concatenate(back(dhidden_rF), axis=1)
        dx_rM = _product("rU,MU->rM", dup_rU, own["up"])
        terms = {
            "up": lambda: _sum_product("rM,rU->MU", x_rM, dup_rU),
            "down": lambda: _sum_product("rF,rM->FM", hidden_rF, dy_rM),
            "up_bias": lambda: jnp.sum(dup_rU, axis=0, dtype=jnp.float32),
            "down_bias": lambda: jnp.sum(dy_rM, axis=0, dtype=jnp.float32),
        }
        dw = {name: block.add(dw[name], terms[name]()) for name in dw}
        return block.write(dx_RM, dx_rM), dw

    zeros = (
        jnp.zeros_like(x_RM),
        {name: jnp.zeros(array.shape, jnp.float32) for name, array in w.items()},
    )
    dx_RM, dw = _each_block(backward, w, x_RM, size_e, R, zeros)
    dw = {name: array.astype(w[name].dtype) for name, array in dw.items()}
    return dw, zero_past(dx_RM[:R], size_e), None


blocked.defvjp(_blocked_forward, _blocked_backward)


@dataclasses.dataclass(frozen=True)
class Block:
    """Some rows of one expert.

    Attributes:
        expert: its index.
        start: the first row.
        mask_r1: False for rows at the end that are not the expert's.
        first: whether it is the first block of its expert.
    """

    expert: jax.Array
    start: jax.Array
    mask_r1: jax.Array
    first: bool

    def read(self, x_R: jax.Array) -> jax.Array:
        """Takes the block's rows."""
        r = self.mask_r1.shape[0]
        return jax.lax.dynamic_slice_in_dim(x_R, self.start, r)

    def write(self, x_R: jax.Array, rows_r: jax.Array) -> jax.Array:
        """Replaces the block's rows, masked ones too: a later block will again."""
        return jax.lax.dynamic_update_slice_in_dim(x_R, rows_r, self.start, axis=0)

    def add(self, sum_e: jax.Array, term: jax.Array) -> jax.Array:
        """Adds to the expert's sum; the first block need not read it."""
        if not self.first:
            term = (
                jax.lax.dynamic_index_in_dim(sum_e, self.expert, keepdims=False) + term
            )
        return jax.lax.dynamic_update_index_in_dim(sum_e, term, self.expert, axis=0)


def _each_block(
    step: Callable[[Any, Weights, Block], Any],
    w: Weights,
    x_RM: jax.Array,
    size_e: jax.Array,
    num_rows: int,
    carried: Any,
) -> Any:
    """Calls carried = step(carried, weights of the expert, block), in order of rows."""
    start_e = jnp.cumsum(size_e) - size_e
    with_rows_first_e = jnp.argsort(size_e == 0, stable=True)
    block_rows = _block_rows(num_rows)

    def one_expert(n: jax.Array, carried: Any) -> Any:
        e = with_rows_first_e[n]
        own = {
            name: jax.lax.dynamic_index_in_dim(array, e, keepdims=False).astype(
                x_RM.dtype
            )
            for name, array in w.items()
        }
        largest = block_rows[-1]
        in_first = (size_e[e] - 1) % largest + 1
        # A loop of no or one round is a branch whose buffers stay where they are. What
        # does not depend on the round would be moved out of it, and always computed.
        for smaller, r in itertools.pairwise((0, *block_rows)):
            fits = (smaller < in_first) & (in_first <= r)

            def first_block(i: jax.Array, carried: Any, r: int = r) -> Any:
                mask_r1 = jnp.arange(r)[:, None] < in_first
                block = Block(e, start_e[e] + i * r, mask_r1, first=True)
                return step(carried, own, block)

            carried = jax.lax.fori_loop(0, fits.astype(jnp.int32), first_block, carried)

        def next_block(i: jax.Array, carried: Any) -> Any:
            start = start_e[e] + in_first + i * largest
            every_r1 = jnp.ones((largest, 1), bool)
            return step(carried, own, Block(e, start, every_r1, first=False))

        return jax.lax.fori_loop(0, (size_e[e] - 1) // largest, next_block, carried)

    return jax.lax.fori_loop(0, jnp.sum(size_e > 0), one_expert, carried)


def _block_rows(R: int) -> tuple[int, ...]:
    """The sizes worth having for R rows."""
    return tuple(r for i, r in enumerate(BLOCK_ROWS) if i == 0 or BLOCK_ROWS[i - 1] < R)


def _overshoot(R: int) -> int:
    """Rows by which the last block can reach past the last row."""
    return max(r - smaller for smaller, r in itertools.pairwise((0, *_block_rows(R))))


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return _sum_product(spec, left, right).astype(left.dtype)


def _sum_product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # XLA on CPU would convert bfloat16 itself, where it can multiply it at all.
    return jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32))
