"""Experts that get more rows than they have room for, in as many rounds as it takes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe.dispatch.room import Room
from moe.routing.assignment import Assignment
from partitioning.grid import Grid


def in_rounds(
    one_round: Callable[..., tuple[jax.Array, jax.Array]],
    x_GSM: jax.Array,
    assignment: Assignment,
    room: Room,
    grid: Grid,
) -> jax.Array:
    """Computes R rows at a time, as many times as the fullest device needs.

    Each round keeps nothing for the backward pass but its inputs, so memory is that of
    one round; the static number of rounds is that of the worst assignment, and those
    that no device needs are skipped. Outputs, and the gradients of tokens, are summed
    over the rounds in float32, as within one.
    """
    wide_GSM = x_GSM.astype(jnp.float32)
    size_E = jnp.sum(assignment.sums.kept_GE, axis=0)
    size_E = lax.psum(size_E, "expert")
    fullest = jnp.max(jnp.sum(size_E.reshape(room.axis_size, -1), axis=1))
    fullest = grid.max(fullest)

    def output(first_row: jax.Array) -> jax.Array:
        return one_round(wide_GSM.astype(x_GSM.dtype), first_row)[0]

    @jax.checkpoint
    def add_round(y_GSM: jax.Array, first_row: jax.Array) -> tuple[jax.Array, None]:
        more_GSM = lax.cond(
            fullest > first_row,
            lambda: output(first_row),
            lambda: jnp.zeros_like(y_GSM),
        )
        return y_GSM + more_GSM, None

    first_rows = jnp.arange(room.num_rounds, dtype=jnp.int32) * room.num_rows
    shape = jax.eval_shape(output, first_rows[0]).shape
    return lax.scan(add_round, jnp.zeros(shape, jnp.float32), first_rows)[0]
