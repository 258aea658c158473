"""From settings to a model."""

from jax.sharding import Mesh

from moe import architecture
from moe.model.execution import Execution
from moe.model.transformer import Model
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from partitioning.settings import UNCUT, PartitionSettings, fitting


def build(
    model: ModelSettings,
    router: RouterSettings,
    execution: ExecutionSettings,
    mesh: Mesh,
    partition: PartitionSettings = UNCUT,
    encoder_router: RouterSettings | None = None,
) -> Model:
    """Describes a model without allocating it."""
    layers = architecture.describe(model, router, encoder_router)
    kv_heads = model.num_kv_heads or model.num_heads
    partition = fitting(partition, mesh.shape["model"], kv_heads)
    return Model(layers, Execution(execution, mesh, partition))
