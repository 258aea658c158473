"""The train state: all that a run is, between two steps."""

import dataclasses
from typing import Any

import jax

Leaf = Any  # an array, or what stands for it: its shape, its place, its axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint must hold for the run to go on bit for bit.

    Attributes:
        step: int32, steps taken.
        data_index: int32, the next batch to learn from.
        skipped_steps: int32, steps that were not finite, or whose loss was a spike.
        skipped_in_a_row: int32, the last of them that came one after the other.
        params: pure dict of arrays of `param_dtype`; selection biases are float32.
        opt_state: what the optimizer keeps.
    """

    step: Leaf
    data_index: Leaf
    skipped_steps: Leaf
    skipped_in_a_row: Leaf
    params: Any
    opt_state: Any
