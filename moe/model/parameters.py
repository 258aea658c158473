"""How a parameter is declared: its initial values and its logical axes.

NNX modules are containers here: `nnx.split` once, pure functions after.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def normal(
    key: jax.Array, shape: Sequence[int], axes: Sequence[str | None], *, stddev: float
) -> nnx.Param:
    """Declares a float32 parameter drawn from N(0, stddev²), truncated at 2 stddev."""
    draw = jax.random.truncated_normal(key, -2.0, 2.0, tuple(shape), jnp.float32)
    # The standard deviation of a unit normal truncated at ±2 is 0.8796.
    return nnx.Param(draw * (stddev / 0.87962566), axes=tuple(axes))


def scaled(
    key: jax.Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    *,
    fan_in: float,
    scale: float = 1.0,
) -> nnx.Param:
    """Declares a float32 parameter of variance scale / fan_in."""
    return normal(key, shape, axes, stddev=math.sqrt(scale / fan_in))


def constant(
    shape: Sequence[int], axes: Sequence[str | None], value: float
) -> nnx.Param:
    """Declares a float32 parameter that starts out equal everywhere."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=tuple(axes))


def logical_axes(container: nnx.Module) -> Any:
    """Returns the pure dict of logical axes, one tuple per array of the container.

    A parameter with one dimension more than it declared is stacked over layers.
    """

    def axes_of(parameter: nnx.Variable) -> tuple[str | None, ...]:
        declared = parameter.get_metadata("axes")
        stacked = len(parameter.shape) == len(declared) + 1
        return ("layers", *declared) if stacked else declared

    return nnx.to_pure_dict(nnx.state(container), extract_fn=axes_of)
