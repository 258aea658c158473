"""The mesh as a user asks for it. Read before jax: standard library only."""

import dataclasses
import math

AXES = ("replica", "stage", "data", "context", "expert", "model")
BATCH_AXES = ("replica", "data", "expert")


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


def problems(mesh: MeshSettings) -> list[str]:
    """Lists what is wrong with the sizes alone, before any device is looked at."""
    found = [
        f"MESH_{axis.upper()} = {size}: every axis has a size of at least 1"
        for axis, size in dataclasses.asdict(mesh).items()
        if size < 1
    ]
    found += [
        f"MESH_{axis.upper()} = {getattr(mesh, axis)}: this version splits work over "
        f"{', '.join(BATCH_AXES)} only; set MESH_{axis.upper()} to 1"
        for axis in ("stage", "context", "model")
        if getattr(mesh, axis) > 1
    ]
    return found
