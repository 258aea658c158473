"""The one table: what it makes of logical axes, of sizes, and of a whole model."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from moe import architecture
from moe.model import inventory, parameters
from moe.settings import ModelSettings, RouterSettings
from moe.testing import MESHES
from partitioning import placement, rules
from partitioning.mesh import make_mesh
from partitioning.settings import AXES, MeshSettings, PartitionSettings

pytestmark = pytest.mark.fast

TINY = ModelSettings(
    vocab_size=32,
    num_layers=4,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    activation="geglu",
    num_experts=4,
    expert_mlp_dim=12,
    tie_embeddings=False,
)


def specs_of_tiny():
    return inventory.specs(architecture.describe(TINY, RouterSettings()))


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def mesh_2x4() -> Mesh:
    return make_mesh(MESHES["d2e4"])


@pytest.mark.parametrize(
    ("logical_axes", "mesh_axes"),
    [
        ((), ()),
        ((None, "embed", "layers"), (None, None, None)),
        (("batch", "length"), (("replica", "data", "expert"), "context")),
        (("layers", "embed", "pair", "mlp"), (None, None, None, "model")),
        (
            ("layers", "expert", "expert_embed", "expert_mlp"),
            (None, "expert", None, "model"),
        ),
        (("embed", "heads", "head_dim"), (None, "model", None)),
        (("vocab", "embed"), ("model", None)),
    ],
)
def test_logical_axes_become_mesh_axes(logical_axes, mesh_axes):
    assert rules.spec(logical_axes) == PartitionSpec(*mesh_axes)


def test_the_table_names_mesh_axes_only_and_no_array_uses_one_twice():
    tables = [
        rules.table(PartitionSettings(fsdp, True, cut, cuts_kv_heads=cut))
        for fsdp in ("none", "optimizer", "data", "data_expert")
        for cut in (True, False)
    ]
    for table in tables:
        for mesh_axes in table.values():
            assert set(mesh_axes) <= set(AXES)
    for path, _, axes in placement.leaves(
        specs_of_tiny(), parameters.axes(specs_of_tiny())
    ):
        of_moment = [rules.MOMENTS.get(axis, axis) for axis in axes]
        for table, named in itertools.product(tables, (axes, of_moment)):
            used = [mesh_axis for axis in named if axis for mesh_axis in table[axis]]
            assert len(used) == len(set(used)), path


def test_what_is_fully_sharded_is_cut_over_the_fastest_axis_first():
    for fastest_first in (AXES, AXES[::-1]):
        table = rules.table(
            PartitionSettings(fsdp="data_expert", expert_tensor_parallel=False),
            fastest_first,
        )
        for name in ("embed", "embed_moment", "expert_embed", "expert_embed_moment"):
            axes = table[name]
            assert list(axes) == sorted(axes, key=fastest_first.index), name
        assert set(table["embed"]) == {"data", "context", "expert"}
        assert table["batch"] == ("replica", "data", "expert"), (
            "rows stay where they are"
        )


def test_an_axis_that_is_not_in_the_table_is_an_error():
    with pytest.raises(KeyError, match="embde"):
        rules.spec(("embde",))


def test_every_dimension_that_does_not_divide_is_listed_with_its_numbers():
    shapes = {"a": array(6, 5), "b": {"c": array(12), "d": array(8, 8)}}
    axes = {"a": ("expert", "embed"), "b": {"c": ("batch",), "d": ("expert", None)}}
    assert placement.problems(mesh_2x4(), shapes, axes) == [
        "a: its 'expert' dimension of 6 does not divide over the mesh axes expert of "
        "size 4",
        "b/c: its 'batch' dimension of 12 does not divide over the mesh axes "
        "replica×data×expert of size 8",
    ]
    assert placement.problems(make_mesh(MeshSettings()), shapes, axes) == []


def test_logical_axes_that_do_not_match_the_dimensions_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        placement.problems(mesh_2x4(), {"a": array(4, 4)}, {"a": ("expert",)})


def test_the_placement_table_gives_the_bytes_on_one_device():
    shapes = {"w": array(4, 6), "x": array(16, 3, dtype=jnp.bfloat16), "n": array()}
    axes = {"w": ("expert", "embed"), "x": ("batch", None), "n": ()}
    assert sorted(placement.table(mesh_2x4(), shapes, axes)) == [
        ("n", "", "", "", 4),
        ("w", "4×6", "expert, embed", "expert, –", 24),  # 4·6 / 4 experts · 4 bytes
        ("x", "16×3", "batch, –", "replica×data×expert, –", 12),  # 16·3 / 8 · 2 bytes
    ]


# Path, mesh axes, bytes on one of 2 × 4 devices. `model` has size 1 there, so only the
# experts are cut: up has 2 layers · 4 / 4 experts · 8 · 2 · 12 numbers of 4 bytes, half
# of which are the gate.
PLACEMENT = """
decoder/layers/0/0/attention/key | –, –, model, – | 512
decoder/layers/0/0/attention/norm/scale | –, – | 64
decoder/layers/0/0/attention/output | –, model, –, – | 512
decoder/layers/0/0/attention/query | –, –, model, – | 512
decoder/layers/0/0/attention/value | –, –, model, – | 512
decoder/layers/0/0/dense/down | –, model, – | 1024
decoder/layers/0/0/dense/norm/scale | –, – | 64
decoder/layers/0/0/dense/up | –, –, –, model | 2048
decoder/layers/0/1/attention/key | –, –, model, – | 512
decoder/layers/0/1/attention/norm/scale | –, – | 64
decoder/layers/0/1/attention/output | –, model, –, – | 512
decoder/layers/0/1/attention/query | –, –, model, – | 512
decoder/layers/0/1/attention/value | –, –, model, – | 512
decoder/layers/0/1/sparse/experts/down | –, expert, model, – | 768
decoder/layers/0/1/sparse/experts/up | –, expert, –, –, model | 1536
decoder/layers/0/1/sparse/norm/scale | –, – | 64
decoder/layers/0/1/sparse/router | –, –, – | 256
decoder/norm/scale | – | 32
embedding | model, – | 1024
head | –, model | 1024
"""


def test_the_placement_of_a_tiny_model_is_this():
    shapes = parameters.shapes(specs_of_tiny(), "float32")
    table = placement.table(mesh_2x4(), shapes, parameters.axes(specs_of_tiny()))
    lines = sorted(f"{path} | {axes} | {size}" for path, _, _, axes, size in table)
    assert lines == PLACEMENT.strip().splitlines()
