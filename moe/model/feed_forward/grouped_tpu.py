"""Products of sorted rows with their experts' matrices on TPU.

`jax.lax.ragged_dot` is a kernel there, forward and for the gradient of the rows. The
gradient of the weights, compiled, multiplies every row by every expert, so jax's own
kernel takes its place.
"""

import functools

import jax
import jax.numpy as jnp

from moe.model.feed_forward.grouped_rows import zero_past

# Of rows, inputs and outputs, in the kernel; tuned by nobody yet.
TILE = (512, 512, 1024)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    rows_RX: jax.Array, matrix_eXY: jax.Array, size_e: jax.Array, interpreted: bool
) -> jax.Array:
    """Multiplies rows by their experts' matrices; gradients cost as much again.

    Args:
        rows_RX: rows sorted by expert.
        matrix_eXY: matrices in the dtype of the rows.
        size_e: int32, rows of each expert; rows past their sum come out as anything.
        interpreted: whether to interpret the kernel, for tests.
    """
    del interpreted
    return jax.lax.ragged_dot(rows_RX, matrix_eXY, size_e)


def _forward(rows_RX, matrix_eXY, size_e, interpreted):
    y_RY = product(rows_RX, matrix_eXY, size_e, interpreted)
    return y_RY, (rows_RX, matrix_eXY, size_e)


def _backward(interpreted, saved, d_y_RY):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    rows_RX, matrix_eXY, size_e = saved
    d_y_RY = zero_past(d_y_RY, size_e)
    d_rows_RX = jax.lax.ragged_dot(d_y_RY, jnp.swapaxes(matrix_eXY, 1, 2), size_e)
    R, tile = rows_RX.shape[0], TILE[0]
    pad = ((0, -R % tile), (0, 0))
    d_matrix_eXY = tgmm(
        jnp.pad(rows_RX, pad).T,
        jnp.pad(d_y_RY, pad),
        size_e,
        preferred_element_type=jnp.float32,
        tiling=(tile, *map(min, TILE[1:], matrix_eXY.shape[1:])),
        interpret=interpreted,
    )
    return d_rows_RX, d_matrix_eXY.astype(matrix_eXY.dtype), None


product.defvjp(_forward, _backward)
