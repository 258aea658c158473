"""What the backward pass keeps of each layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model import parameters, stack
from moe.model.build import build
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from moe.testing.jaxprs import equations
from moe.testing.whole_arrays import forward
from partitioning import placement, rules
from partitioning.mesh import make_mesh
from partitioning.settings import UNCUT, MeshSettings, PartitionSettings

# Widths that tell arrays apart, and three periods of a dense and a sparse layer.
B, L, M, F_DENSE, F_EXPERT, PERIODS = 8, 8, 16, 40, 56, 3
MODEL = ModelSettings(
    vocab_size=32,
    num_layers=2 * PERIODS,
    model_dim=M,
    num_heads=3,
    head_dim=6,
    mlp_dim=F_DENSE,
    num_experts=8,
    expert_mlp_dim=F_EXPERT,
)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="float32")
ROUTER = RouterSettings(group_size=4)
POLICIES = ("none", "minimal", "full")


@functools.cache
def kept(
    execution: ExecutionSettings,
    mesh: MeshSettings,
    partition: PartitionSettings = UNCUT,
) -> set[tuple[int, ...]]:
    """Shapes of one period of what the loops over periods carry and keep."""
    model = build(MODEL, ROUTER, execution, make_mesh(mesh), partition)
    params = parameters.shapes(model.specs, "float32")
    tokens = jax.ShapeDtypeStruct((B, L), np.int32)
    names = ("input_tokens", "segment_ids", "positions")
    batch = {f"decoder_{name}": tokens for name in names}

    def loss(params, batch):
        logits_BLV, (sums,) = forward(
            model, params, batch, jnp.arange(B), jax.random.key(0)
        )
        return jnp.sum(logits_BLV**2) + jnp.sum(sums.z_G)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params, batch)
    return {
        variable.aval.shape[1:]
        for equation in equations(jaxpr)
        if equation.primitive.name == "scan"
        for variable in (*equation.invars, *equation.outvars)
        if variable.aval.shape[:1] == (PERIODS,)
    }


def layer_shapes(mesh: MeshSettings, partition: PartitionSettings) -> dict:
    """The matrices of the layers as one device has them."""
    placed, table = make_mesh(mesh), rules.table(partition)
    specs = build(MODEL, ROUTER, EXECUTION, placed).specs
    return {
        path: rules.sharding(placed, names, table).shard_shape(array.shape)[1:]
        for path, array, names in placement.leaves(specs, parameters.axes(specs))
        if path.startswith("decoder/layers") and "norm" not in path
    }


SHARDED = PartitionSettings(fsdp="data_expert")
MESH = MeshSettings(data=2, expert=2)


@functools.cache
def whole_matrices() -> set[tuple[int, ...]]:
    pieces, whole = layer_shapes(MESH, SHARDED), layer_shapes(MESH, UNCUT)
    assert all(pieces[path] != whole[path] for path in whole)
    return set(whole.values())


@pytest.mark.parametrize("remat", POLICIES)
def test_no_policy_keeps_a_weight_that_was_gathered(remat):
    shapes = kept(dataclasses.replace(EXECUTION, remat=remat), MESH, SHARDED)
    assert set(layer_shapes(MESH, SHARDED).values()) <= shapes
    assert not shapes & whole_matrices()


def test_without_a_policy_gathered_weights_would_be_kept(monkeypatch):
    monkeypatch.setattr(stack, "rematerialised", lambda layer, *_, **__: layer)
    shapes = kept.__wrapped__(
        dataclasses.replace(EXECUTION, remat="none"), MESH, SHARDED
    )
    assert whole_matrices() <= shapes


@pytest.mark.parametrize(
    ("remat", "sparse_remat", "dense_kept", "sparse_kept"),
    [
        ("minimal", "same", True, True),
        ("minimal", "full", True, False),
        ("full", "minimal", False, True),
        ("full", "same", False, False),
    ],
)
def test_sparse_layers_have_a_policy_of_their_own(
    remat, sparse_remat, dense_kept, sparse_kept
):
    execution = dataclasses.replace(EXECUTION, remat=remat, sparse_remat=sparse_remat)
    weights = set(layer_shapes(MeshSettings(), UNCUT).values())
    widths = {shape[-1] for shape in kept(execution, MeshSettings()) - weights if shape}
    assert (F_DENSE in widths, F_EXPERT in widths) == (dense_kept, sparse_kept)


def test_a_stricter_policy_keeps_less():
    sizes = [
        sum(
            int(np.prod(shape))
            for shape in kept(
                dataclasses.replace(EXECUTION, remat=remat), MeshSettings()
            )
        )
        for remat in POLICIES
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
