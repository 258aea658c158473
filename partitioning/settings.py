"""The mesh as a user asks for it. Read before jax: standard library only."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

AXES = ("replica", "stage", "data", "context", "expert", "model")
BATCH_AXES = ("replica", "data", "expert")
# Unless a mesh lies on a torus, its last axes have the fastest links.
FASTEST_FIRST = AXES[::-1]
# Slices of up to so many devices: jax winds a ring of its own through some of them.
WOUND_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Sizes of the six mesh axes, all always present.

    Attributes:
        replica: slices joined by a slow network; they share gradients only.
        stage: pipeline stages.
        data: splits the batch.
        context: contiguous cuts of the sequence.
        expert: splits the experts, and the batch outside the sparse layers.
        model: tensor parallelism.
    """

    replica: int = 1
    stage: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    model: int = 1

    @property
    def num_devices(self) -> int:
        """Product of all axes."""
        return math.prod(dataclasses.astuple(self))

    @property
    def batch_shards(self) -> int:
        """Number of pieces the batch is cut into."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)


@dataclasses.dataclass(frozen=True)
class PartitionSettings:
    """What is cut over the axes beyond the batch and the experts.

    Attributes:
        fsdp: what is fully sharded over `data` and `context`: "none"; "optimizer", the
            optimizer's state (arXiv:1910.02054, stage 1); "data", parameters too,
            which are gathered layer by layer (stage 3); "data_expert", and dense
            parameters over `expert` as well.
        sequence_parallel: between the products that are cut over `model`, cut the
            sequence over it (arXiv:2205.05198, section 4.2.2).
        expert_tensor_parallel: cut each expert over `model`; else each device of that
            axis computes whole experts for its part of the tokens.
        context_attention: how attention sees all of a sequence that is cut over
            `context`: "all_gather" of keys and values, or a "ring" of them
            (arXiv:2310.01889).
        cuts_kv_heads: whether heads of keys and values are cut over `model`; else each
            device of that axis has all of them. Not set by hand: see `fitting`.
    """

    fsdp: Literal["none", "optimizer", "data", "data_expert"] = "none"
    sequence_parallel: bool = True
    expert_tensor_parallel: bool = True
    context_attention: Literal["all_gather", "ring"] = "all_gather"
    cuts_kv_heads: bool = dataclasses.field(default=True, metadata={"knob": False})


UNCUT = PartitionSettings()


def fitting(
    partition: PartitionSettings, model_devices: int, kv_heads: int
) -> PartitionSettings:
    """Returns the same, in which heads of keys that do not divide are not cut.

    Args:
        partition: what is cut.
        model_devices: devices along `model`.
        kv_heads: heads of keys and values.
    """
    cuts = model_devices < 1 or kv_heads % model_devices == 0
    return dataclasses.replace(partition, cuts_kv_heads=cuts)


def by_links(links: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Orders the axes by a device's links along each, then by size, the last first."""
    return tuple(
        sorted(FASTEST_FIRST, key=lambda axis: (-links.get(axis, 0), -sizes[axis]))
    )


def problems(mesh: MeshSettings) -> list[str]:
    """Lists what is wrong with the sizes alone, before any device is looked at."""
    found = [
        f"MESH_{axis.upper()} = {size}: every axis has a size of at least 1"
        for axis, size in dataclasses.asdict(mesh).items()
        if size < 1
    ]
    if mesh.stage > 1:
        found.append(
            f"MESH_STAGE = {mesh.stage}: this version has no pipeline; set MESH_STAGE "
            "to 1, and FSDP or MESH_MODEL where memory is short"
        )
    return found
