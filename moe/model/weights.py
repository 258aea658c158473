"""The weights of one layer as its products need them: whole, and in the right type."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe.settings import ModelSettings
from partitioning import rules
from partitioning.grid import Grid


def whole(arrays: Any, axes: Any, settings: ModelSettings, grid: Grid) -> Any:
    """Gathers what is fully sharded of some weights, in the type of the products.

    Called inside the layer scan and inside remat, so that only one layer's weights are
    ever whole: the backward pass gathers them again, and leaves each device its piece
    of the gradient.

    Args:
        arrays: this device's pieces.
        axes: their logical axes.
        settings: types of products and of sums of gradients.
        grid: the mesh.
    """
    table = grid.table

    def one(array: jax.Array, logical: tuple[str | None, ...]) -> jax.Array:
        types: tuple[str, str] = settings.dtype, settings.reduce_dtype
        if "routed" in logical:
            types = str(array.dtype), str(array.dtype)
        for dim, axis in enumerate(logical):
            if axis in rules.FULLY_SHARDED and grid.size(*table[axis]) > 1:
                return gathered(array, grid, table[axis], dim, *types)
        return array

    return jax.tree.map(one, arrays, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def gathered(
    piece: jax.Array,
    grid: Grid,
    axes: tuple[str, ...],
    dim: int,
    dtype: str,
    reduce_dtype: str,
) -> jax.Array:
    """Joins the pieces of a weight; the gradient is summed and cut the same way.

    Args:
        piece: this device's.
        grid: the mesh.
        axes: mesh axes it is cut over.
        dim: the dimension that is cut.
        dtype: of the result, and of what travels forward.
        reduce_dtype: in which the gradient travels and is summed.
    """
    del reduce_dtype
    return grid.gather(piece.astype(dtype), axes, dim)


def _gathered_forward(piece, grid, axes, dim, dtype, reduce_dtype):
    # The backward pass needs the type of the piece, and nothing else of it.
    like = jnp.zeros((0,), piece.dtype)
    return gathered(piece, grid, axes, dim, dtype, reduce_dtype), like


def _gathered_backward(grid, axes, dim, dtype, reduce_dtype, like, gradient):
    del dtype
    piece = grid.scatter_sum(gradient.astype(reduce_dtype), axes, dim)
    return (piece.astype(like.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)
