"""The only place where a weight meets activations.

A layer's weights are made whole first, in the type of the products; then they are
multiplied. The experts' products are in `feed_forward/`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe.model.execution import Execution
from moe.model.parameters import Spec
from partitioning import rules
from partitioning.grid import Grid


def product(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None = None,
    *,
    inputs: int = 1,
    precision: Any = None,
    result: Any = None,
) -> jax.Array:
    """Multiplies activations with a weight, in the type of the activations.

    Args:
        x: [..., *inputs].
        w: [*inputs, *outputs].
        bias: [*outputs]; None adds none.
        inputs: dimensions that are summed over.
        precision: precision of the product, as in `jax.lax.dot_general`.
        result: type of the result; None is that of x.
    Returns:
        [..., *outputs].
    """
    y = jnp.tensordot(
        x,
        w.astype(x.dtype),
        axes=inputs,
        precision=precision,
        preferred_element_type=result,
    )
    return y if bias is None else y + bias.astype(y.dtype)


def product_made_again(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies as `product` does; REMAT = "minimal" keeps nothing of it.

    For products that are wide and made of something narrow. That policy keeps those
    without batch dimensions: this one has one, of size 1 (`test_latent.py`).

    Args:
        x: [..., inputs].
        w: [inputs, *outputs].
    """
    axes = (((x.ndim,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(x[None], w[None].astype(x.dtype), axes)[0]


def product_by_head(x_BLNI: jax.Array, w_INO: jax.Array) -> jax.Array:
    """Multiplies each head's activations with its own matrix; returns y_BLNO."""
    return jnp.einsum("BLNI,INO->BLNO", x_BLNI, w_INO.astype(x_BLNI.dtype))


def gather_weights(arrays: Any, specs: Any, execution: Execution) -> Any:
    """Gathers what is fully sharded of one layer, in the type of the products.

    Called inside the layer scan and inside remat, so that only one layer's weights are
    ever whole: the backward pass gathers them again, and leaves each device its piece
    of the gradient.

    Args:
        arrays: this device's pieces.
        specs: what they are, one layer's.
        execution: types of products and of sums of gradients, and the mesh.
    """
    grid, settings = execution.grid, execution.settings
    table = grid.table

    def one(array: jax.Array, spec: Spec) -> jax.Array:
        types: tuple[str, str] = settings.dtype, settings.reduce_dtype
        if "routed" in spec.axes:  # a router has a type of its own
            types = str(array.dtype), str(array.dtype)
        for dim, axis in enumerate(spec.axes):
            if axis in rules.FULLY_SHARDED and grid.size(*table[axis]) > 1:
                return gather(array, grid, table[axis], dim, *types)
        return array

    return jax.tree.map(one, arrays, specs)


def gathers_weights(execution: Execution) -> bool:
    """Whether weights are fully sharded, and so must be gathered."""
    grid = execution.grid
    return any(grid.size(*grid.table[axis]) > 1 for axis in rules.FULLY_SHARDED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def gather(
    piece: jax.Array,
    grid: Grid,
    axes: tuple[str, ...],
    dim: int,
    dtype: str,
    reduce_dtype: str,
) -> jax.Array:
    """Joins the pieces of a weight; the gradient is summed and cut the same way.

    Args:
        piece: this device's piece.
        grid: the mesh.
        axes: mesh axes it is cut over.
        dim: the dimension that is cut.
        dtype: type of the result, and of what travels forward.
        reduce_dtype: type in which the gradient travels and is summed.
    """
    del reduce_dtype
    return grid.gather(piece.astype(dtype), axes, dim)


def _gather_forward(piece, grid, axes, dim, dtype, reduce_dtype):
    # The backward pass needs the type of the piece, and nothing else of it.
    like = jnp.zeros((0,), piece.dtype)
    return gather(piece, grid, axes, dim, dtype, reduce_dtype), like


def _gather_backward(grid, axes, dim, dtype, reduce_dtype, like, gradient):
    del dtype
    piece = grid.scatter_sum(gradient.astype(reduce_dtype), axes, dim)
    return (piece.astype(like.dtype),)


gather.defvjp(_gather_forward, _gather_backward)
