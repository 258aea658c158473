"""Rows by index: the two local movements of every transport, gathers both ways.

A pair of maps that invert each other, choice -> row and row -> choice, makes the
transpose of a gather through one a gather through the other: nothing ever scatters.
Choices are numbered over all T tokens of the device, t·J + j; -1 stands for none.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.dispatch.room import Room

UNROLLED_CHOICES = 8  # beyond, a loop over the choices that are in use


@jax.custom_vjp
def seat(
    x_TM: jax.Array, choice_of_row_R: jax.Array, row_of_choice_TJ: jax.Array
) -> jax.Array:
    """Lays out rows[r] = x[token of the choice in row r], zero where there is none.

    Args:
        x_TM: tokens.
        choice_of_row_R: int32, or -1.
        row_of_choice_TJ: int32, or -1; its inverse.
    """
    num_choices = row_of_choice_TJ.shape[-1]
    return _rows(x_TM, choice_of_row_R // num_choices)  # -1 // J is -1


def _seat_forward(x_TM, choice_of_row_R, row_of_choice_TJ):
    return seat(x_TM, choice_of_row_R, row_of_choice_TJ), row_of_choice_TJ


def _seat_backward(row_of_choice_TJ, d_rows_RM):
    """dx[t] = Σ_j drows[row of choice (t, j)]."""
    d_x_TM = _sum_over_choices(
        row_of_choice_TJ, lambda j, row_T: _rows(d_rows_RM, row_T)
    )
    return d_x_TM.astype(d_rows_RM.dtype), None, None


seat.defvjp(_seat_forward, _seat_backward)


@jax.custom_vjp
def weigh(
    rows_RM: jax.Array,
    gate_TJ: jax.Array,
    choice_of_row_R: jax.Array,
    row_of_choice_TJ: jax.Array,
) -> jax.Array:
    """Sums y[t] = Σ_j gate[t, j] · rows[row of choice (t, j)], in float32.

    Rounds of a layer add up before anything is rounded, so the result is float32; its
    gradient is taken to be rounded to the rows' dtype already.

    Args:
        rows_RM: outputs of experts.
        gate_TJ: float32.
        choice_of_row_R: int32, or -1.
        row_of_choice_TJ: int32, or -1; its inverse.
    """

    def weighed(j, row_T):
        gate_T1 = jax.lax.dynamic_index_in_dim(gate_TJ, j, axis=1)
        return gate_T1 * _rows(rows_RM, row_T).astype(jnp.float32)

    return _sum_over_choices(row_of_choice_TJ, weighed)


def _weigh_forward(rows_RM, gate_TJ, choice_of_row_R, row_of_choice_TJ):
    y_TM = weigh(rows_RM, gate_TJ, choice_of_row_R, row_of_choice_TJ)
    return y_TM, (rows_RM, gate_TJ, choice_of_row_R, row_of_choice_TJ)


def _weigh_backward(saved, d_y_TM):
    """drows[r] = gate of its choice · dy[its token]; dgate = rows · dy, row by row."""
    rows_RM, gate_TJ, choice_of_row_R, row_of_choice_TJ = saved
    num_choices = gate_TJ.shape[-1]
    d_y_TM = d_y_TM.astype(rows_RM.dtype)  # half the bytes to gather
    d_y_RM = _rows(d_y_TM, choice_of_row_R // num_choices).astype(jnp.float32)
    gate_R1 = _rows(gate_TJ.reshape(-1, 1), choice_of_row_R)
    d_rows_RM = (gate_R1 * d_y_RM).astype(rows_RM.dtype)
    # A row without a choice may hold anything, but meets a zero and is never looked up.
    d_gate_R1 = jnp.sum(rows_RM.astype(jnp.float32) * d_y_RM, axis=-1, keepdims=True)
    d_gate_TJ = _rows(d_gate_R1, row_of_choice_TJ.reshape(-1)).reshape(gate_TJ.shape)
    return d_rows_RM, d_gate_TJ, None, None


weigh.defvjp(_weigh_forward, _weigh_backward)


def rounded(y_gSM: jax.Array, room: Room, dtype: str) -> jax.Array:
    """Rounds the sums of all rounds, where they are at home already.

    Args:
        y_gSM: float32 sums of this device's tokens.
        room: sizes of the exchange.
        dtype: type of the result.
    """
    del room
    return y_gSM.astype(dtype)


def _rows(source_RM: jax.Array, index_T: jax.Array) -> jax.Array:
    """Takes rows by index, zeros for -1."""
    taken_TM = source_RM.at[jnp.maximum(index_T, 0)].get(mode="promise_in_bounds")
    return jnp.where(index_T[:, None] >= 0, taken_TM, 0)


def _sum_over_choices(
    row_of_choice_TJ: jax.Array, term: Callable[[jax.Array | int, jax.Array], jax.Array]
) -> jax.Array:
    """Adds up term(j, rows of the j-th choices) in float32, over the j in use."""
    num_choices = row_of_choice_TJ.shape[-1]

    def add(j, total):
        row_T = jax.lax.dynamic_index_in_dim(row_of_choice_TJ, j, 1, keepdims=False)
        return total + term(j, row_T).astype(jnp.float32)

    if num_choices <= UNROLLED_CHOICES:
        return sum(
            (
                term(j, row_of_choice_TJ[:, j]).astype(jnp.float32)
                for j in range(num_choices)
            ),
            start=jnp.zeros((), jnp.float32),
        )
    shape = jax.eval_shape(lambda: term(0, row_of_choice_TJ[:, 0]))
    in_use_J = jnp.any(row_of_choice_TJ >= 0, axis=0)
    last = jnp.max(jnp.where(in_use_J, jnp.arange(num_choices), -1))
    return jax.lax.fori_loop(0, last + 1, add, jnp.zeros(shape.shape, jnp.float32))
