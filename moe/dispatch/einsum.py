"""The readable oracle: gathers written as products with one-hot matrices.

Costs S·E·C·M per group and direction where a gather costs E·C·M (the formulation of
GShard, arXiv:2006.16668, Algorithm 2, from the two maps of an Assignment).
"""

import jax
import jax.numpy as jnp

from moe.dispatch.exchange import from_experts, to_experts
from moe.routing.assignment import Assignment


def dispatch(
    x_gSM: jax.Array, assignment: Assignment, axis_size: int
) -> tuple[jax.Array, None, None]:
    """Lays tokens out as rows of their experts; see `all_to_all.dispatch`."""
    num_choices = assignment.slot_of_choice_GSJ.shape[-1]
    # A one-hot of a negative index is all zeros: an empty slot holds a zero row.
    token_gEC = assignment.choice_of_slot_GEC // num_choices
    seated_gECS = jax.nn.one_hot(token_gEC, x_gSM.shape[1], dtype=x_gSM.dtype)
    slots_gECM = jnp.einsum(
        "gECS,gSM->gECM", seated_gECS, x_gSM, precision=jax.lax.Precision.HIGHEST
    )
    return to_experts(slots_gECM, axis_size), None, None


def combine(
    rows_eRM: jax.Array, assignment: Assignment, plan: None, axis_size: int
) -> jax.Array:
    """Sums each token's expert outputs by its gates; see `all_to_all.combine`."""
    del plan
    g, E, C = assignment.choice_of_slot_GEC.shape
    slots_gECM = from_experts(rows_eRM, g, axis_size)
    slots_gTM = slots_gECM.reshape(g, E * C, -1).astype(jnp.float32)
    seat_gSJT = jax.nn.one_hot(assignment.slot_of_choice_GSJ, E * C)
    weight_gST = jnp.einsum(
        "gSJT,gSJ->gST",
        seat_gSJT,
        assignment.gate_GSJ,
        precision=jax.lax.Precision.HIGHEST,
    )
    y_gSM = jnp.einsum(
        "gST,gTM->gSM", weight_gST, slots_gTM, precision=jax.lax.Precision.HIGHEST
    )
    return y_gSM.astype(rows_eRM.dtype)
