"""The readable oracle: gathers written as products with one-hot matrices.

Costs S·E·C·M per group and direction where a gather costs E·C·M (the formulation of
GShard, arXiv:2006.16668, Algorithm 2, from the two maps of an Assignment).
"""

import jax
import jax.numpy as jnp

from moe.dispatch.exchange import from_experts, to_experts
from moe.dispatch.gathers import rounded
from moe.dispatch.room import Room
from moe.routing.assignment import Assignment


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, room: Room, first_row: jax.Array | int = 0
) -> tuple[jax.Array, None, None]:
    """Lays tokens out as rows of their experts; see `all_to_all.dispatch`."""
    del first_row
    _, S, M = x_gSM.shape
    E, J = assignment.choice_of_slot_GEC.shape[1], assignment.gate_GSJ.shape[-1]
    # A one-hot of a negative index is all zeros: an empty slot holds a zero row.
    token_gEC = assignment.choice_of_slot_GEC // J
    seated_gECS = jax.nn.one_hot(token_gEC, S, dtype=x_gSM.dtype)
    rows_EgCM = jnp.einsum(
        "gECS,gSM->EgCM", seated_gECS, x_gSM, precision=jax.lax.Precision.HIGHEST
    )
    return to_experts(rows_EgCM.reshape(E, -1, M), room.axis_size), None, None


def combine(
    rows_eRM: jax.Array, assignment: Assignment, plan: None, room: Room
) -> jax.Array:
    """Sums each token's expert outputs by its gates; see `all_to_all.combine`."""
    del plan
    g, E, C = assignment.choice_of_slot_GEC.shape
    rows_ERM = from_experts(rows_eRM, room.axis_size)
    rows_EgCM = rows_ERM.reshape(E, g, C, -1).astype(jnp.float32)
    seat_gSJT = jax.nn.one_hot(assignment.slot_of_choice_GSJ, E * C)
    weight_gST = jnp.einsum(
        "gSJT,gSJ->gST",
        seat_gSJT,
        assignment.gate_GSJ,
        precision=jax.lax.Precision.HIGHEST,
    )
    y_gSM = jnp.einsum(
        "gSEC,EgCM->gSM",
        weight_gST.reshape(g, -1, E, C),
        rows_EgCM,
        precision=jax.lax.Precision.HIGHEST,
    )
    return y_gSM


finish = rounded
