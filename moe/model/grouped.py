"""The experts' feed-forward over rows sorted by expert: no capacity, no padding.

On TPU and GPU the products are `jax.lax.ragged_dot`. On TPU the gradient of the weights
is not: compiled, it multiplies every row by every expert, so there jax's own kernel
takes its place. On CPU all of them would, so there loops go over the experts that have
rows and take their rows in blocks; what they cost does not depend on the experts that
have none.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.model.feed_forward import GATED, PLAIN

Method = Literal["ragged_dot", "tpu", "tpu_interpreted", "blocked"]
Weights = dict[str, jax.Array]

# Rows of a block. An expert's first block is the smallest that leaves a whole number of
# the largest, which follow; smaller steps would waste fewer rows and compile longer.
BLOCK_ROWS = (16, 32, 64, 128, 192, 256, 320, 384, 448, 512)

# Of rows, inputs and outputs, in the kernel of TPUs; tuned by nobody yet.
TPU_TILE = (512, 512, 1024)

# Without this option jax multiplies densely on GPU too. It is part of what `jit` keys
# its programs by, so it is set before anything is traced; who exported it is heard.
GPU_OPTION = "jax_ragged_dot_use_gpu_pallas_triton_lowering"
if hasattr(jax.config, GPU_OPTION) and GPU_OPTION.upper() not in os.environ:
    jax.config.update(GPU_OPTION, True)


def grouped_feed_forward(
    w: Weights,
    rows_RM: jax.Array,
    size_e: jax.Array,
    activation: str,
    *,
    method: Method,
) -> jax.Array:
    """Applies each expert to its own rows, which lie together, expert after expert.

    Inside `shard_map` it needs `check_vma=False`.

    Args:
        w: "up" [e, M, F] or, if gated, [e, M, 2, F]: first what goes through the
            non-linearity, then what that is multiplied by; "down" [e, F, M]; and maybe
            "up_bias" [e, F] or [e, 2, F] and "down_bias" [e, M]. Used in the dtype of
            the rows, with sums and gradients in float32.
        rows_RM: the first size_e[0] rows are of expert 0, and so on. Rows past the last
            expert's may hold anything.
        size_e: int32, rows of each expert; their sum is at most R.
        activation: name of the non-linearity.
        method: "ragged_dot" for GPUs, "tpu", "blocked" for CPUs; "tpu_interpreted" is
            what TPUs do, for tests.
    Returns:
        rows_RM, zero past the last expert's. Its inputs to the non-linearity are saved
        for the way back under the name "expert_hidden".
    """
    w = {name: _flat(name, array) for name, array in w.items()}
    if method != "blocked":
        return _ragged_dot(w, rows_RM, size_e, activation, method)
    return _blocked(w, rows_RM, size_e, activation)


def _flat(name: str, array: jax.Array) -> jax.Array:
    """Makes "up" [e, M, U] and its bias [e, U]; U is F, or 2F of a gated layer.

    In products of two dimensions only, XLA on CPU copies nothing.
    """
    kept = {"up": 2, "up_bias": 1}.get(name, array.ndim - 1)
    return array.reshape(*array.shape[:kept], -1)


def _ragged_dot(
    w: Weights, rows_RM: jax.Array, size_e: jax.Array, activation: str, method: Method
) -> jax.Array:
    """Two ragged products; their kernels leave rows of no expert unwritten."""
    w = {name: array.astype(rows_RM.dtype) for name, array in w.items()}
    place_R = jnp.arange(rows_RM.shape[0])
    expert_R = jnp.searchsorted(jnp.cumsum(size_e), place_R, side="right")
    expert_R = jnp.minimum(expert_R, size_e.shape[0] - 1)

    def product(rows_RX: jax.Array, matrix_eXY: jax.Array, bias: str) -> jax.Array:
        if method == "ragged_dot":
            y_RY = jax.lax.ragged_dot(rows_RX, matrix_eXY, size_e)
        else:
            interpreted = method == "tpu_interpreted"
            y_RY = _tpu_product(rows_RX, matrix_eXY, size_e, interpreted)
        if bias in w:
            y_RY += w[bias][expert_R]
        return _zero_past(y_RY, size_e)

    rows_RM = _zero_past(rows_RM, size_e)
    up_RU = checkpoint_name(product(rows_RM, w["up"], "up_bias"), "expert_hidden")
    hidden_RF = _activate(activation, *_inputs(activation, up_RU))
    return product(hidden_RF, w["down"], "down_bias")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tpu_product(
    rows_RX: jax.Array, matrix_eXY: jax.Array, size_e: jax.Array, interpreted: bool
) -> jax.Array:
    """A ragged product whose gradients are as cheap as itself on TPU."""
    del interpreted
    return jax.lax.ragged_dot(rows_RX, matrix_eXY, size_e)


def _tpu_product_forward(rows_RX, matrix_eXY, size_e, interpreted):
    y_RY = _tpu_product(rows_RX, matrix_eXY, size_e, interpreted)
    return y_RY, (rows_RX, matrix_eXY, size_e)


def _tpu_product_backward(interpreted, saved, d_y_RY):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_RX, matrix_eXY, size_e = saved
    d_y_RY = _zero_past(d_y_RY, size_e)
    d_rows_RX = jax.lax.ragged_dot(d_y_RY, jnp.swapaxes(matrix_eXY, 1, 2), size_e)
    R, tile = rows_RX.shape[0], TPU_TILE[0]
    pad = ((0, -R % tile), (0, 0))
    d_matrix_eXY = tgmm(
        jnp.pad(rows_RX, pad).T,
        jnp.pad(d_y_RY, pad),
        size_e,
        preferred_element_type=jnp.float32,
        tiling=(tile, *map(min, TPU_TILE[1:], matrix_eXY.shape[1:])),
        interpret=interpreted,
    )
    return d_rows_RX, d_matrix_eXY.astype(matrix_eXY.dtype), None


_tpu_product.defvjp(_tpu_product_forward, _tpu_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked(
    w: Weights, rows_RM: jax.Array, size_e: jax.Array, activation: str
) -> jax.Array:
    """One expert after the other, block by block; every buffer is updated in place."""
    return _blocked_forward(w, rows_RM, size_e, activation)[0]


def _blocked_forward(
    w: Weights, rows_RM: jax.Array, size_e: jax.Array, activation: str
) -> tuple[jax.Array, Any]:
    R = rows_RM.shape[0]
    x_RM = _zero_past(rows_RM, size_e, pad=_overshoot(R))

    def forward(carried: Any, own: Weights, block: Block) -> Any:
        y_RM, up_RU = carried
        up_rU = _product("rM,MU->rU", block.read(x_RM), own["up"])
        up_rU += own.get("up_bias", 0)
        hidden_rF = _activate(activation, *_inputs(activation, up_rU))
        y_rM = _product("rF,FM->rM", hidden_rF, own["down"])
        y_rM += own.get("down_bias", 0)
        return block.write(y_RM, y_rM), block.write(up_RU, up_rU)

    zeros = (
        jnp.zeros_like(x_RM),
        jnp.zeros((x_RM.shape[0], w["up"].shape[2]), x_RM.dtype),
    )
    y_RM, up_RU = _each_block(forward, w, x_RM, size_e, R, zeros)
    up_RU = checkpoint_name(up_RU, "expert_hidden")
    return _zero_past(y_RM[:R], size_e), (w, rows_RM, size_e, up_RU)


def _blocked_backward(
    activation: str, saved: Any, dy_RM: jax.Array
) -> tuple[Weights, jax.Array, None]:
    w, rows_RM, size_e, up_RU = saved
    R = rows_RM.shape[0]
    x_RM = _zero_past(rows_RM, size_e, pad=_overshoot(R))
    dy_RM = _zero_past(dy_RM, size_e, pad=_overshoot(R))

    def backward(carried: Any, own: Weights, block: Block) -> Any:
        dx_RM, dw = carried
        # Rows of a block that are not its expert's enter every sum through this zero.
        dy_rM = jnp.where(block.mask_r1, block.read(dy_RM), 0)
        x_rM, up_rU = block.read(x_RM), block.read(up_RU)
        hidden_rF, back = jax.vjp(
            functools.partial(_activate, activation), *_inputs(activation, up_rU)
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
    return dw, _zero_past(dx_RM[:R], size_e), None


_blocked.defvjp(_blocked_forward, _blocked_backward)


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


def _zero_past(x_RX: jax.Array, size_e: jax.Array, pad: int = 0) -> jax.Array:
    """Zeroes rows of no expert, and appends `pad` zero rows."""
    real_R1 = jnp.arange(x_RX.shape[0])[:, None] < jnp.sum(size_e)
    return jnp.pad(jnp.where(real_R1, x_RX, 0), ((0, pad), (0, 0)))


def _inputs(activation: str, up_RU: jax.Array) -> list[jax.Array]:
    """Splits [R, U] into the inputs of the activation, each [R, F]."""
    return jnp.split(up_RU, 2, axis=1) if activation in GATED else [up_RU]


def _activate(activation: str, *inputs: jax.Array) -> jax.Array:
    if activation in GATED:
        return GATED[activation](inputs[0]) * inputs[1]
    return PLAIN[activation](inputs[0])


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return _sum_product(spec, left, right).astype(left.dtype)


def _sum_product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # XLA on CPU would convert bfloat16 itself, where it can multiply it at all.
    return jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32))
