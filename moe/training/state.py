"""The train state: all that a run is, between two steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.model import transformer
from moe.settings import ModelSettings, RouterSettings
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
    settings: ModelSettings,
    router: RouterSettings,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Draws the state of step 0."""
    params = transformer.init_params(key, settings, router)
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
    settings: ModelSettings,
    router: RouterSettings,
    optimizer: optax.GradientTransformation,
) -> TrainState:
    """Returns the shapes and dtypes of the state, allocating nothing."""
    return jax.eval_shape(
        lambda: init_state(jax.random.key(0), settings, router, optimizer)
    )


def logical_axes(
    shapes: TrainState, settings: ModelSettings, router: RouterSettings
) -> TrainState:
    """Returns the logical axes of every array of the state."""
    axes = transformer.param_axes(settings, router)
    return TrainState(
        step=(),
        data_index=(),
        skipped_steps=(),
        skipped_in_a_row=(),
        params=axes,
        opt_state=state_axes(shapes.opt_state, shapes.params, axes),
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
