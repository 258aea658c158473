"""Every device gathers all tokens of its expert axis and computes its experts' share.

All-gather, then reduce-scatter: axis_size·T rows travel each way whatever K is, where
an exchange sends K·T; best on small axes and for many choices. Rows are not padded to
a capacity.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.dispatch.exchange import all_maps
from moe.dispatch.gathers import seat, weigh
from moe.dispatch.room import Room
from moe.dispatch.sorted_rows import sorted_maps
from moe.routing.assignment import Assignment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The way back.

    Attributes:
        choice_of_row_R: choice in each row, from all tokens on the axis, for this
            device's experts.
        row_of_choice_TJ: its inverse.
        gate_TJ: gates of all tokens on the axis.
        excess: rows that this window and those before it had no room for.
    """

    choice_of_row_R: jax.Array
    row_of_choice_TJ: jax.Array
    gate_TJ: jax.Array
    excess: jax.Array


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, room: Room, first_row: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, Plan]:
    """Gathers the tokens and lays out those of this device's experts.

    Args:
        x_gSM: this device's groups of tokens.
        assignment: who sits where, for the same groups.
        room: size of the axis, and R.
        first_row: start of this round, among the rows sorted by expert.
    Returns:
        rows_RM sorted by expert, size_e, and the plan of the way back.
    """
    _, E, C = assignment.choice_of_slot_GEC.shape
    J, M = assignment.gate_GSJ.shape[-1], x_gSM.shape[-1]
    x_GSM, gate_GSJ = x_gSM, assignment.gate_GSJ
    choice_GeC, slot_GSJ = assignment.choice_of_slot_GEC, assignment.slot_of_choice_GSJ
    if room.axis_size > 1:
        local = E // room.axis_size
        x_GSM = lax.all_gather(x_gSM, "expert", tiled=True)
        x_GSM = checkpoint_name(x_GSM, "dispatched_rows")
        gate_GSJ = all_maps(gate_GSJ).reshape(*x_GSM.shape[:2], J)
        slot_GSJ = all_maps(slot_GSJ).reshape(*x_GSM.shape[:2], J)
        choice_GeC = lax.all_to_all(
            choice_GeC, "expert", split_axis=1, concat_axis=0, tiled=True
        )
        choice_GeC = checkpoint_name(choice_GeC, "exchanged_maps")
        slot_GSJ -= lax.axis_index("expert") * (local * C)
        slot_GSJ = jnp.where((slot_GSJ >= 0) & (slot_GSJ < local * C), slot_GSJ, -1)
    choice_of_row_R, row_of_choice_TJ, size_e, total = sorted_maps(
        choice_GeC, slot_GSJ, room.num_rows, first_row
    )
    plan = Plan(
        choice_of_row_R,
        row_of_choice_TJ,
        gate_GSJ.reshape(-1, J),
        jnp.maximum(total - first_row - room.num_rows, 0),
    )
    rows_RM = seat(x_GSM.reshape(-1, M), choice_of_row_R, row_of_choice_TJ)
    return rows_RM, size_e, plan


def combine(
    rows_RM: jax.Array, assignment: Assignment, plan: Plan, room: Room
) -> jax.Array:
    """Sums this device's share of every token on the axis.

    Returns:
        y_GSM in float32, zero for a token that has no row here in this round; `finish`
        adds up the shares.
    """
    del room
    S = assignment.gate_GSJ.shape[1]
    y_TM = weigh(rows_RM, plan.gate_TJ, plan.choice_of_row_R, plan.row_of_choice_TJ)
    return y_TM.reshape(-1, S, y_TM.shape[-1])


def finish(y_GSM: jax.Array, room: Room, dtype: str) -> jax.Array:
    """Adds up the devices' shares, which travel in the type of the result.

    Args:
        y_GSM: float32 shares of all tokens on the axis, of all rounds.
        room: size of the axis.
        dtype: type of the result.
    Returns:
        y_gSM of this device's tokens.
    """
    y_gSM = y_GSM.astype(dtype)
    if room.axis_size > 1:
        y_gSM = lax.psum_scatter(y_gSM, "expert", tiled=True)
        y_gSM = checkpoint_name(y_gSM, "returned_rows")
    return y_gSM
