"""The portable default: gather into fixed-capacity slots, exchange, and gather back."""

import jax
import jax.numpy as jnp

from moe.dispatch.exchange import from_experts, to_experts
from moe.dispatch.gathers import rounded, seat, weigh
from moe.dispatch.room import Room
from moe.routing.assignment import Assignment


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, room: Room, first_row: jax.Array | int = 0
) -> tuple[jax.Array, None, None]:
    """Lays tokens out as rows of their experts and sends the rows there.

    Args:
        x_gSM: this device's groups of tokens.
        assignment: who sits where, for the same groups.
        room: size of the mesh axis `expert`.
        first_row: start of the round; ignored, as every row passes in the first.
    Returns:
        rows_eRM, zero where a slot is empty; sizes, None: every row of the rectangle
        counts; and the plan of the way back, None: the assignment is enough.
    """
    del first_row
    _, E, _ = assignment.choice_of_slot_GEC.shape
    rows_TM = seat(x_gSM.reshape(-1, x_gSM.shape[-1]), *_maps(assignment))
    rows_ERM = rows_TM.reshape(E, -1, x_gSM.shape[-1])
    return to_experts(rows_ERM, room.axis_size), None, None


def combine(
    rows_eRM: jax.Array, assignment: Assignment, plan: None, room: Room
) -> jax.Array:
    """Brings the rows home and sums each token's expert outputs by its gates.

    Args:
        rows_eRM: outputs of this device's experts, in the order of `dispatch`.
        assignment: the one that was dispatched.
        plan: what `dispatch` returned.
        room: size of the mesh axis `expert`.
    Returns:
        y_gSM in float32, zero for a token that has no slot; `finish` rounds it.
    """
    del plan
    g, S, J = assignment.gate_GSJ.shape
    rows_ERM = from_experts(rows_eRM, room.axis_size)
    M = rows_ERM.shape[-1]
    gate_TJ = assignment.gate_GSJ.reshape(g * S, J)
    y_TM = weigh(rows_ERM.reshape(-1, M), gate_TJ, *_maps(assignment))
    return y_TM.reshape(g, S, M)


finish = rounded


def _maps(assignment: Assignment) -> tuple[jax.Array, jax.Array]:
    """The two maps with rows in the order expert, group, slot."""
    g, _, C = assignment.choice_of_slot_GEC.shape
    _, S, J = assignment.slot_of_choice_GSJ.shape
    group_g11 = jnp.arange(g, dtype=jnp.int32)[:, None, None]
    choice_gEC = assignment.choice_of_slot_GEC
    choice_gEC = jnp.where(choice_gEC >= 0, choice_gEC + group_g11 * (S * J), -1)
    slot_gSJ = assignment.slot_of_choice_GSJ
    row_gSJ = (slot_gSJ // C * g + group_g11) * C + slot_gSJ % C
    row_gSJ = jnp.where(slot_gSJ >= 0, row_gSJ, -1)
    return choice_gEC.swapaxes(0, 1).reshape(-1), row_gSJ.reshape(g * S, J)
