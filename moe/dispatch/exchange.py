"""The two exchanges of expert parallelism, and the names that remat keeps them by.

Both run inside `shard_map`. On an expert axis of size 1 neither is compiled.
"""

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Every remat policy but "full" saves these, so that no exchange runs twice.
TRAVELLED_NAMES = ("dispatched_rows", "returned_rows")


def to_experts(slots_gECM: jax.Array, axis_size: int) -> jax.Array:
    """Sends every expert's slots to the device that holds the expert.

    Args:
        slots_gECM: this device's groups, slots for all experts.
        axis_size: size of the mesh axis `expert`.
    Returns:
        rows_eRM: this device's experts, R = C slots of every group on the axis.
    """
    g, E, C, M = slots_gECM.shape
    rows_ERM = slots_gECM.swapaxes(0, 1).reshape(E, g * C, M)
    if axis_size > 1:
        rows_ERM = lax.all_to_all(
            rows_ERM, "expert", split_axis=0, concat_axis=1, tiled=True
        )
    return checkpoint_name(rows_ERM, "dispatched_rows")


def from_experts(rows_eRM: jax.Array, num_groups: int, axis_size: int) -> jax.Array:
    """Sends the experts' rows back to the devices their tokens came from.

    Args:
        rows_eRM: results of this device's experts.
        num_groups: g, groups on this device.
        axis_size: size of the mesh axis `expert`.
    Returns:
        slots_gECM, laid out as they were given to `to_experts`.
    """
    rows_ERM = rows_eRM
    if axis_size > 1:
        rows_ERM = lax.all_to_all(
            rows_eRM, "expert", split_axis=1, concat_axis=0, tiled=True
        )
    rows_ERM = checkpoint_name(rows_ERM, "returned_rows")
    E, R, M = rows_ERM.shape
    return rows_ERM.reshape(E, num_groups, R // num_groups, M).swapaxes(0, 1)
