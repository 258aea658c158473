"""The train state: all that a run is, between two steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe import architecture
from moe.model import inventory, parameters
from moe.training.optimizer import state_axes
from partitioning import rules
from partitioning.grid import Grid
from partitioning.settings import UNCUT, PartitionSettings

Leaf = Any  # an array, or what stands for it: its shape, its place, its axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold for the run to go on bit for bit.

    Attributes:
        step: int32, steps taken.
        data_index: int32, the next batch to learn from.
        skipped_steps: int32, steps whose gradients were not finite.
        skipped_in_a_row: int32, the last of them that came one after the other.
        params: pure dict of arrays of `param_dtype`; selection biases are float32.
        opt_state: of the optimizer.
    """

    step: Leaf
    data_index: Leaf
    skipped_steps: Leaf
    skipped_in_a_row: Leaf
    params: Any
    opt_state: Any


def init_state(
    key: jax.Array,
    layers: architecture.Model,
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


def abstract_state(
    layers: architecture.Model,
    param_dtype: str,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Returns the shapes and dtypes of the state, allocating nothing."""
    return jax.eval_shape(
        lambda: init_state(jax.random.key(0), layers, param_dtype, optimizer)
    )


def logical_axes(shapes: TrainState, layers: architecture.Model) -> TrainState:
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
        for _, _, array_axes in rules.leaves(shapes, axes)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)
