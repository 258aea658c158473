"""The train state of step 0: its arrays, their shapes, and where each lives."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.layers import Layers
from moe.model import inventory, parameters
from moe.training.optimizer import state_axes
from moe.training.train_state import TrainState
from partitioning import placement, rules
from partitioning.grid import Grid
from partitioning.settings import UNCUT, PartitionSettings


def draw(
    key: jax.Array,
    layers: Layers,
    param_dtype: str,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Draws the state of step 0."""
    params = inventory.draw(layers, key, param_dtype)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        data_index=zero,
        skipped_steps=zero,
        skipped_in_a_row=zero,
        params=params,
        opt_state=optimizer.init(params),
    )


def abstract(
    layers: Layers,
    param_dtype: str,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Returns the shapes and dtypes of the state, allocating nothing."""
    return jax.eval_shape(
        lambda: draw(jax.random.key(0), layers, param_dtype, optimizer)
    )


def logical_axes(shapes: TrainState, layers: Layers) -> TrainState:
    """Returns the logical axes of every array of the state."""
    specs = inventory.specs(layers)
    return TrainState(
        step=(),
        data_index=(),
        skipped_steps=(),
        skipped_in_a_row=(),
        params=parameters.axes(specs),
        opt_state=state_axes(shapes.opt_state, specs),
    )


def shardings(
    shapes: TrainState,
    axes: TrainState,
    mesh: jax.sharding.Mesh,
    partition: PartitionSettings = UNCUT,
) -> Any:
    """Places every array of the state by the one table."""
    table = Grid(mesh, partition).table
    placed = [
        rules.sharding(mesh, array_axes, table)
        for _, _, array_axes in placement.leaves(shapes, axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)
