"""The exchanges of expert parallelism, and the names that remat keeps them by.

All run inside `shard_map`. On an expert axis of size 1 none is compiled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Every remat policy but "full" saves these, so that no exchange runs twice.
TRAVELLED_NAMES = ("dispatched_rows", "returned_rows", "exchanged_maps")


def to_experts(rows_ERM: jax.Array, axis_size: int) -> jax.Array:
    """Sends every expert's rows to the device that holds the expert.

    Args:
        rows_ERM: this device's tokens, rows for all experts.
        axis_size: size of the mesh axis `expert`.
    Returns:
        rows_eRM: this device's experts, with the rows of every device on the axis.
    """
    if axis_size > 1:
        rows_ERM = lax.all_to_all(
            rows_ERM, "expert", split_axis=0, concat_axis=1, tiled=True
        )
    return checkpoint_name(rows_ERM, "dispatched_rows")


def from_experts(rows_eRM: jax.Array, axis_size: int) -> jax.Array:
    """Sends the experts' rows back, laid out as they were given to `to_experts`."""
    if axis_size > 1:
        rows_eRM = lax.all_to_all(
            rows_eRM, "expert", split_axis=1, concat_axis=0, tiled=True
        )
    return checkpoint_name(rows_eRM, "returned_rows")


def all_maps(array: jax.Array) -> jax.Array:
    """Gathers small arrays of all devices of the axis, [axis, ...]."""
    return checkpoint_name(lax.all_gather(array, "expert"), "exchanged_maps")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Offsets of a ragged exchange, seen from one device; i and j are peers.

    Attributes:
        input_offset_j: where the rows for j begin in this device's operand.
        send_size_j: how many they are.
        output_offset_j: where they begin in j's output.
        recv_size_i: rows from i.
        recv_offset_i: where they begin in this device's output.
        source_offset_i: where they begin in i's operand.
    """

    input_offset_j: jax.Array
    send_size_j: jax.Array
    output_offset_j: jax.Array
    recv_size_i: jax.Array
    recv_offset_i: jax.Array
    source_offset_i: jax.Array

    def reversed(self) -> "Route":
        """The way back: what was received is sent to where it came from."""
        return Route(
            input_offset_j=self.recv_offset_i,
            send_size_j=self.recv_size_i,
            output_offset_j=self.source_offset_i,
            recv_size_i=self.send_size_j,
            recv_offset_i=self.input_offset_j,
            source_offset_i=self.output_offset_j,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange_rows(
    rows_LM: jax.Array, route: Route, num_rows: int, platform: str
) -> jax.Array:
    """Sends runs of rows to their devices; rows that none arrives in are unspecified.

    Args:
        rows_LM: the operand.
        route: which runs go where.
        num_rows: R, of the output.
        platform: "cpu" has no ragged exchange, and pads the runs for a dense one.
    Returns:
        rows_RM.
    """
    if platform == "cpu":
        return _padded_exchange(rows_LM, route, num_rows)
    # Tied to the operand: XLA hoists a constant buffer out of the layer scan and then
    # copies it in every layer.
    empty_RM = jnp.broadcast_to(rows_LM[:1] * 0, (num_rows, rows_LM.shape[-1]))
    return lax.ragged_all_to_all(
        rows_LM,
        empty_RM,
        route.input_offset_j,
        route.send_size_j,
        route.output_offset_j,
        route.recv_size_i,
        axis_name="expert",
    )


def _exchange_forward(rows_LM, route, num_rows, platform):
    rows_RM = exchange_rows(rows_LM, route, num_rows, platform)
    return rows_RM, (route, rows_LM.shape[0])


def _exchange_backward(num_rows, platform, saved, d_rows_RM):
    del num_rows
    route, num_sent = saved
    return exchange_rows(d_rows_RM, route.reversed(), num_sent, platform), None


exchange_rows.defvjp(_exchange_forward, _exchange_backward)


def _padded_exchange(rows_LM: jax.Array, route: Route, num_rows: int) -> jax.Array:
    """The ragged exchange by the same offsets, with runs padded to a common length."""
    length = min(rows_LM.shape[0], num_rows)
    in_run_l = jnp.arange(length)
    source_jl = route.input_offset_j[:, None] + in_run_l
    source_jl = jnp.clip(source_jl, 0, rows_LM.shape[0] - 1)
    runs_jlM = rows_LM[source_jl]
    runs_ilM = lax.all_to_all(runs_jlM, "expert", split_axis=0, concat_axis=0)
    row_R = jnp.arange(num_rows)
    # Runs lie side by side in the order of their senders.
    from_R = jnp.sum(row_R[:, None] >= route.recv_offset_i, axis=1) - 1
    from_R = jnp.clip(from_R, 0, route.recv_offset_i.shape[0] - 1)
    place_R = jnp.clip(row_R - route.recv_offset_i[from_R], 0, length - 1)
    return runs_ilM[from_R, place_R]
