"""How a pass is computed, whatever the model: types, memory, and the mesh."""

import dataclasses
import functools

from jax.sharding import Mesh

from moe.settings import ExecutionSettings
from partitioning.grid import Grid
from partitioning.settings import UNCUT, PartitionSettings


@dataclasses.dataclass(frozen=True)
class Execution:
    """What every sublayer of a pass is told of it; static under `jit`.

    Attributes:
        settings: types, remat, blocks, transport, row budget.
        mesh: all six axes.
        partition: what is cut over them beside the batch and the experts.
        in_rounds: whether rows beyond the row budget are computed in further rounds
            instead of reported.
        tokens_replicated: whether the devices of `context` and `model` all have the
            same tokens, as when tokens are drawn one by one; else each has a piece of
            every sequence.
        traces_routers: whether sums bring along what routers were given and decided,
            token by token; `verify` compares it.
        measures_logits: whether attention returns the largest logit of each head.
    """

    settings: ExecutionSettings
    mesh: Mesh
    partition: PartitionSettings = UNCUT
    in_rounds: bool = False
    tokens_replicated: bool = False
    traces_routers: bool = False
    measures_logits: bool = False

    @functools.cached_property
    def grid(self) -> Grid:
        """The mesh as one device sees it."""
        return Grid(self.mesh, self.partition)

    @property
    def cuts_experts(self) -> bool:
        """Whether each expert is cut over `model`."""
        return self.mesh.shape["model"] > 1 and self.partition.expert_tensor_parallel
