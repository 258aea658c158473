"""What a parameter is, before there is one: shape, axes, its matrix, its first values.

Everything that treats parameters by what they are reads this: initialisation, placement
on a mesh, decay, factored moments, counting.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

# The standard deviation of a unit normal truncated at ±2.
_TRUNCATED = 0.87962566


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter.

    Attributes:
        shape: sizes of its dimensions.
        axes: logical axis of each, for the one table of `partitioning/rules.py`.
        inputs: dimensions that a product sums over; none in a vector.
        outputs: dimensions of the product's result, or of a vector. Those that are in
            neither index separate matrices or vectors: layers, experts.
        stddev: standard deviation of its first values, a normal truncated at two of
            them; 0 starts it at `value`.
        value: what a parameter that is not drawn starts at.
        dtype: type that it is kept in; "" is that of the run.
        per_layer: whether each layer has its own, where layers share parameters.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    stddev: float = 0.0
    value: float = 0.0
    dtype: str = ""
    per_layer: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of them."""
        return bool(self.inputs)

    @property
    def stacked(self) -> tuple[int, ...]:
        """Dimensions that index separate matrices or vectors."""
        own = self.inputs + self.outputs
        return tuple(dim for dim in range(len(self.shape)) if dim not in own)


def matrix(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    scale: float = 1.0,
) -> Spec:
    """Describes a matrix that starts with variance scale / fan-in."""
    fan_in = math.prod(shape[dim] for dim in inputs)
    return Spec(shape, axes, inputs, outputs, stddev=math.sqrt(scale / fan_in))


def vector(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    value: float = 0.0,
    *,
    stacked: int = 0,
) -> Spec:
    """Describes numbers that start out equal; `stacked` leading dimensions index."""
    own = tuple(range(stacked, len(shape)))
    return Spec(shape, axes, outputs=own, value=value)


def stack(tree: Any, number: int, axis: str | None = "layers") -> Any:
    """Describes so many of each parameter of a tree, along a new first dimension."""

    def one(spec: Spec) -> Spec:
        return dataclasses.replace(
            spec,
            shape=(number, *spec.shape),
            axes=(axis, *spec.axes),
            inputs=tuple(dim + 1 for dim in spec.inputs),
            outputs=tuple(dim + 1 for dim in spec.outputs),
        )

    return jax.tree.map(one, tree)


def axes(tree: Any) -> Any:
    """Returns the logical axes of each parameter."""
    return jax.tree.map(lambda spec: spec.axes, tree)


def shapes(tree: Any, param_dtype: str) -> Any:
    """Returns a `jax.ShapeDtypeStruct` of each parameter."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype or param_dtype), tree
    )


def draw(tree: Any, key: jax.Array, param_dtype: str) -> Any:
    """Draws each parameter by its path in the tree, whatever else is there."""

    def one(path: Any, spec: Spec) -> jax.Array:
        dtype = spec.dtype or param_dtype
        if not spec.stddev:
            return jnp.full(spec.shape, spec.value, dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        unit = jax.random.truncated_normal(own_key, -2.0, 2.0, spec.shape)
        return (unit * (spec.stddev / _TRUNCATED)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, tree)
