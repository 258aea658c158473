"""Dropout on the residual path."""

import jax
import jax.numpy as jnp

from moe.model.execution import Execution


def dropout(
    x_BLM: jax.Array,
    rate: float,
    key: jax.Array | None,
    row_B: jax.Array,
    execution: Execution,
) -> jax.Array:
    """Zeroes activations; draws depend on the global row and place of a token alone.

    Args:
        x_BLM: this device's cut of what a sublayer adds to the stream.
        rate: probability of zeroing each.
        key: PRNG key of the sublayer and step; None outside training.
        row_B: int32, global row numbers.
        execution: the mesh.
    """
    if key is None or rate == 0:
        return x_BLM
    grid, length = execution.grid, x_BLM.shape[1]
    axes = ("context", "model") if grid.cuts_sequence else ("context",)
    place_L = grid.index(*axes) * length + jnp.arange(length)

    def keep(row: jax.Array, place: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), place)
        return jax.random.bernoulli(token_key, 1 - rate, x_BLM.shape[2:])

    keep_BLM = jax.vmap(jax.vmap(keep, (None, 0)), (0, None))(row_B, place_L)
    return jnp.where(keep_BLM, x_BLM / (1 - rate), 0).astype(x_BLM.dtype)
