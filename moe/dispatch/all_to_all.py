"""The portable default: gather into fixed-capacity slots, exchange, and gather back.

Both local movements are gathers in both directions: the transpose of a gather through
one map of an Assignment is a gather through the other, so nothing ever scatters.
"""

import jax
import jax.numpy as jnp

from moe.dispatch.exchange import from_experts, to_experts
from moe.routing.assignment import Assignment


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, axis_size: int
) -> tuple[jax.Array, None, None]:
    """Lays tokens out as rows of their experts and sends the rows there.

    Args:
        x_gSM: this device's groups of tokens.
        assignment: who sits where, for the same groups.
        axis_size: size of the mesh axis `expert`.
    Returns:
        rows_eRM, zero where a slot is empty; sizes, None: every row of the rectangle
        counts; and the plan of the way back, None: the assignment is enough.
    """
    g, E, C = assignment.choice_of_slot_GEC.shape
    slots_gTM = _seat(
        x_gSM,
        assignment.choice_of_slot_GEC.reshape(g, E * C),
        assignment.slot_of_choice_GSJ,
    )
    return to_experts(slots_gTM.reshape(g, E, C, -1), axis_size), None, None


def combine(
    rows_eRM: jax.Array, assignment: Assignment, plan: None, axis_size: int
) -> jax.Array:
    """Brings the rows home and sums each token's expert outputs by its gates.

    Args:
        rows_eRM: outputs of this device's experts, in the order of `dispatch`.
        assignment: the one that was dispatched.
        plan: what `dispatch` returned.
        axis_size: size of the mesh axis `expert`.
    Returns:
        y_gSM in the rows' dtype, summed in float32; zero for a token that has no slot.
    """
    del plan
    g, E, C = assignment.choice_of_slot_GEC.shape
    slots_gECM = from_experts(rows_eRM, g, axis_size)
    return _weigh(
        slots_gECM.reshape(g, E * C, -1),
        assignment.gate_GSJ,
        assignment.choice_of_slot_GEC.reshape(g, E * C),
        assignment.slot_of_choice_GSJ,
    )


def _rows(source_gRM: jax.Array, index: jax.Array) -> jax.Array:
    """Takes rows of each group by index, zeros for -1. index is [g, ...]."""
    flat_gT = index.reshape(index.shape[0], -1)
    taken_gTM = jax.vmap(lambda rows, at: rows.at[at].get(mode="promise_in_bounds"))(
        source_gRM, jnp.maximum(flat_gT, 0)
    )
    taken_gTM = jnp.where(flat_gT[..., None] >= 0, taken_gTM, 0)
    return taken_gTM.reshape(*index.shape, source_gRM.shape[-1])


@jax.custom_vjp
def _seat(
    x_gSM: jax.Array, choice_of_slot_gT: jax.Array, slot_of_choice_gSJ: jax.Array
) -> jax.Array:
    """slots[t] = x[token of the choice in slot t]."""
    num_choices = slot_of_choice_gSJ.shape[-1]
    return _rows(x_gSM, choice_of_slot_gT // num_choices)  # -1 // J is -1


def _seat_forward(x_gSM, choice_of_slot_gT, slot_of_choice_gSJ):
    slots_gTM = _seat(x_gSM, choice_of_slot_gT, slot_of_choice_gSJ)
    return slots_gTM, slot_of_choice_gSJ


def _seat_backward(slot_of_choice_gSJ, d_slots_gTM):
    """dx[s] = Σ_j dslots[slot of choice (s, j)]."""
    d_x_gSM = sum(
        (
            _rows(d_slots_gTM, slot_of_choice_gSJ[..., j]).astype(jnp.float32)
            for j in range(slot_of_choice_gSJ.shape[-1])
        ),
        start=jnp.zeros((), jnp.float32),
    )
    return d_x_gSM.astype(d_slots_gTM.dtype), None, None


_seat.defvjp(_seat_forward, _seat_backward)


@jax.custom_vjp
def _weigh(
    slots_gTM: jax.Array,
    gate_gSJ: jax.Array,
    choice_of_slot_gT: jax.Array,
    slot_of_choice_gSJ: jax.Array,
) -> jax.Array:
    """y[s] = Σ_j gate[s, j] · slots[slot of choice (s, j)]."""
    y_gSM = sum(
        (
            gate_gSJ[..., j, None] * _rows(slots_gTM, slot_of_choice_gSJ[..., j])
            for j in range(gate_gSJ.shape[-1])
        ),
        start=jnp.zeros((), jnp.float32),
    )
    return y_gSM.astype(slots_gTM.dtype)


def _weigh_forward(slots_gTM, gate_gSJ, choice_of_slot_gT, slot_of_choice_gSJ):
    y_gSM = _weigh(slots_gTM, gate_gSJ, choice_of_slot_gT, slot_of_choice_gSJ)
    return y_gSM, (slots_gTM, gate_gSJ, choice_of_slot_gT, slot_of_choice_gSJ)


def _weigh_backward(saved, d_y_gSM):
    """dslots[t] = gate of the choice in t · dy[its token]; dgate[s, j] = slots · dy."""
    slots_gTM, gate_gSJ, choice_of_slot_gT, slot_of_choice_gSJ = saved
    g, _, J = gate_gSJ.shape
    gate_of_slot_gT = _rows(gate_gSJ.reshape(g, -1, 1), choice_of_slot_gT)
    d_y_of_slot_gTM = _rows(d_y_gSM, choice_of_slot_gT // J)
    d_slots_gTM = (gate_of_slot_gT * d_y_of_slot_gTM).astype(slots_gTM.dtype)
    d_gate_gSJ = jnp.stack(
        [
            jnp.sum(
                _rows(slots_gTM, slot_of_choice_gSJ[..., j]).astype(jnp.float32)
                * d_y_gSM,
                axis=-1,
            )
            for j in range(J)
        ],
        axis=-1,
    )
    return d_slots_gTM, d_gate_gSJ, None, None


_weigh.defvjp(_weigh_forward, _weigh_backward)
