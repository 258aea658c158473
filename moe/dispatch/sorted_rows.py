"""Rows sorted by expert, without empty slots between them: how two transports lay out.

From the slots of an Assignment by arithmetic on counts: slots are filled from the
first on, so slot c of expert e in group g is row start[e, g] + c.
"""

import jax
import jax.numpy as jnp


def sorted_maps(
    choice_of_slot_GeC: jax.Array,
    slot_of_choice_GSJ: jax.Array,
    num_rows: int,
    first_row: jax.Array | int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Numbers the seated choices by expert, then group, then slot.

    Args:
        choice_of_slot_GeC: int32, or -1, of some experts in some groups.
        slot_of_choice_GSJ: int32, e·C + c of these experts; -1 for other choices.
        num_rows: R, rows of the window that is wanted.
        first_row: where the window begins.
    Returns:
        choice_of_row_R, row_of_choice_TJ, both -1 for what is not in the window and
        numbered from its beginning; size_e, each expert's rows in the window; and the
        number of rows in all.
    """
    G, e, C = choice_of_slot_GeC.shape
    _, S, J = slot_of_choice_GSJ.shape
    size_eG = jnp.sum(choice_of_slot_GeC >= 0, axis=-1, dtype=jnp.int32).T
    end_eG = jnp.cumsum(size_eG.reshape(-1)).reshape(e, G)
    start_eG = end_eG - size_eG

    row_R = first_row + jnp.arange(num_rows, dtype=jnp.int32)
    block_R = jnp.searchsorted(end_eG.reshape(-1), row_R, side="right")
    block_R = jnp.minimum(block_R, e * G - 1)
    slot_R = jnp.clip(row_R - start_eG.reshape(-1)[block_R], 0, C - 1)
    choice_R = choice_of_slot_GeC[block_R % G, block_R // G, slot_R]
    choice_R += block_R % G * (S * J)
    choice_of_row_R = jnp.where(row_R < end_eG[-1, -1], choice_R, -1)

    expert_GSJ = jnp.maximum(slot_of_choice_GSJ, 0) // C
    group_G11 = jnp.arange(G)[:, None, None]
    row_GSJ = start_eG[expert_GSJ, group_G11] + slot_of_choice_GSJ % C - first_row
    inside_GSJ = (slot_of_choice_GSJ >= 0) & (row_GSJ >= 0) & (row_GSJ < num_rows)
    row_of_choice_TJ = jnp.where(inside_GSJ, row_GSJ, -1).reshape(G * S, J)

    def clipped(row: jax.Array) -> jax.Array:
        return jnp.clip(row - first_row, 0, num_rows)

    size_e = clipped(end_eG[:, -1]) - clipped(start_eG[:, 0])
    return choice_of_row_R, row_of_choice_TJ, size_e, end_eG[-1, -1]
