"""Exactly the rows that there are: sorted by expert and exchanged in runs.

`lax.ragged_all_to_all` where the backend has it. On CPU the same offsets drive a
padded exchange, so that every test run exercises them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.dispatch.exchange import Route, all_maps, exchange_rows
from moe.dispatch.gathers import rounded, seat, weigh
from moe.dispatch.room import Room
from moe.dispatch.sorted_rows import sorted_maps
from moe.routing.assignment import Assignment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The way back.

    Attributes:
        choice_of_row_L: choice in each row, from this device's tokens, sorted by
            expert.
        row_of_choice_TJ: its inverse.
        route: offsets of the exchange; None on an axis of 1.
        arrival_of_row_R: where each sorted row arrived.
        row_of_arrival_R: its inverse.
        excess: rows that this window and those before it had no room for.
    """

    choice_of_row_L: jax.Array
    row_of_choice_TJ: jax.Array
    route: Route | None
    arrival_of_row_R: jax.Array | None
    row_of_arrival_R: jax.Array | None
    excess: jax.Array


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, room: Room, first_row: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, Plan]:
    """Sorts the tokens by expert, sends them, and sorts what arrives.

    Args:
        x_gSM: this device's groups of tokens.
        assignment: who sits where, for the same groups.
        room: size of the axis, and R.
        first_row: start of this round, among all rows that come to a device.
    Returns:
        rows_RM sorted by expert, size_e, and the plan of the way back.
    """
    g, E, C = assignment.choice_of_slot_GEC.shape
    _, S, J = assignment.slot_of_choice_GSJ.shape
    num_sent = min(g * S * min(J, E), g * E * C)
    choice_of_row_L, row_of_choice_TJ, size_E, _ = sorted_maps(
        assignment.choice_of_slot_GEC, assignment.slot_of_choice_GSJ, num_sent, 0
    )
    x_TM = x_gSM.reshape(g * S, -1)
    if room.axis_size == 1:
        rows_LM = seat(x_TM, choice_of_row_L, row_of_choice_TJ)
        rows_LM = checkpoint_name(rows_LM, "dispatched_rows")
        none = jnp.zeros((), jnp.int32)
        plan = Plan(choice_of_row_L, row_of_choice_TJ, None, None, None, none)
        return rows_LM, size_E, plan

    size_iE = all_maps(size_E)
    route, leaves_L = _route(size_iE, num_sent, room.num_rows, first_row)
    choice_of_row_L = jnp.where(leaves_L, choice_of_row_L, -1)
    leaves_TJ = leaves_L[jnp.maximum(row_of_choice_TJ, 0)]
    row_of_choice_TJ = jnp.where(leaves_TJ, row_of_choice_TJ, -1)
    rows_LM = seat(x_TM, choice_of_row_L, row_of_choice_TJ)
    arrived_RM = exchange_rows(rows_LM, route, room.num_rows, room.platform)
    arrived_RM = checkpoint_name(arrived_RM, "dispatched_rows")

    size_ie = _of_this_device(size_iE)
    arrival_R, row_R, size_e = _by_expert(size_ie, room.num_rows, first_row)
    excess = jnp.maximum(jnp.sum(size_ie) - first_row - room.num_rows, 0)
    plan = Plan(choice_of_row_L, row_of_choice_TJ, route, arrival_R, row_R, excess)
    return seat(arrived_RM, arrival_R, row_R[:, None]), size_e, plan


def combine(
    rows_RM: jax.Array, assignment: Assignment, plan: Plan, room: Room
) -> jax.Array:
    """Puts the rows back in order of arrival, returns them, and sums by the gates.

    Returns:
        y_gSM in float32, zero for a token that has no row in this round; `finish`
        rounds the sum of all rounds.
    """
    g, S, J = assignment.gate_GSJ.shape
    rows_LM = rows_RM
    if plan.route is not None:
        assert plan.arrival_of_row_R is not None
        assert plan.row_of_arrival_R is not None
        leaving_RM = seat(
            rows_RM, plan.row_of_arrival_R, plan.arrival_of_row_R[:, None]
        )
        num_sent = plan.choice_of_row_L.shape[0]
        rows_LM = exchange_rows(
            leaving_RM, plan.route.reversed(), num_sent, room.platform
        )
    rows_LM = checkpoint_name(rows_LM, "returned_rows")
    gate_TJ = assignment.gate_GSJ.reshape(g * S, J)
    y_TM = weigh(rows_LM, gate_TJ, plan.choice_of_row_L, plan.row_of_choice_TJ)
    return y_TM.reshape(g, S, -1)


finish = rounded


def _of_this_device(size_iE: jax.Array) -> jax.Array:
    """The columns of this device's experts."""
    axis_size, E = size_iE.shape
    size_ije = size_iE.reshape(axis_size, axis_size, E // axis_size)
    return size_ije[:, lax.axis_index("expert")]


def _route(
    size_iE: jax.Array, num_sent: int, num_rows: int, first_row: jax.Array | int
) -> tuple[Route, jax.Array]:
    """Offsets of the exchange, cut to a window of every receiver's rows.

    Args:
        size_iE: rows that device i has for expert E.
        num_sent: L, rows of an operand.
        num_rows: R, rows of the window.
        first_row: where it begins.
    Returns:
        The route, and which of this device's rows it takes.
    """
    axis_size, me = size_iE.shape[0], lax.axis_index("expert")
    size_ij = jnp.sum(size_iE.reshape(axis_size, axis_size, -1), axis=-1)
    source_ij = jnp.cumsum(size_ij, axis=1) - size_ij  # in the sender's operand
    target_ij = jnp.cumsum(size_ij, axis=0) - size_ij  # among the receiver's rows
    begin_ij = jnp.clip(target_ij - first_row, 0, num_rows)
    end_ij = jnp.clip(target_ij + size_ij - first_row, 0, num_rows)
    cut_ij = end_ij - begin_ij
    # Only a run that the window begins within loses rows at its head.
    source_cut_ij = source_ij + jnp.clip(first_row - target_ij, 0, size_ij)

    row_L = jnp.arange(num_sent)
    to_L = jnp.sum(row_L[:, None] >= source_ij[me], axis=1) - 1
    in_run_L = row_L - source_cut_ij[me][to_L]
    leaves_L = (in_run_L >= 0) & (in_run_L < cut_ij[me][to_L])
    route = Route(
        input_offset_j=source_cut_ij[me],
        send_size_j=cut_ij[me],
        output_offset_j=begin_ij[me],
        recv_size_i=cut_ij[:, me],
        recv_offset_i=begin_ij[:, me],
        source_offset_i=source_cut_ij[:, me],
    )
    return route, leaves_L


def _by_expert(
    size_ie: jax.Array, num_rows: int, first_row: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reorders arrivals, (sender, expert), to rows, (expert, sender).

    Returns:
        arrival_of_row_R and row_of_arrival_R, -1 beyond the last row, and size_e.
    """
    axis_size, e = size_ie.shape
    end_ie = jnp.cumsum(size_ie.reshape(-1)).reshape(axis_size, e)
    begin_ie = jnp.clip(end_ie - size_ie - first_row, 0, num_rows)
    cut_ie = jnp.clip(end_ie - first_row, 0, num_rows) - begin_ie
    row_end_ei = jnp.cumsum(cut_ie.T.reshape(-1)).reshape(e, axis_size)
    row_begin_ei = row_end_ei - cut_ie.T

    def moved(end: jax.Array, begin: jax.Array, to: jax.Array) -> jax.Array:
        """Where each of R places goes, given its blocks' ends and their new begins."""
        place_R = jnp.arange(num_rows, dtype=jnp.int32)
        block_R = jnp.searchsorted(end.reshape(-1), place_R, side="right")
        block_R = jnp.minimum(block_R, end.size - 1)
        there_R = to.reshape(-1)[block_R] + place_R - begin.reshape(-1)[block_R]
        return jnp.where(place_R < end.reshape(-1)[-1], there_R, -1)

    arrival_R = moved(row_end_ei, row_begin_ei, begin_ie.T)
    row_R = moved(begin_ie + cut_ie, begin_ie, row_begin_ei.T)
    return arrival_R, row_R, jnp.sum(cut_ie, axis=0)
