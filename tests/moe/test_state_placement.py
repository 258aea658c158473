"""Where parameters and moments live, for everything that `FSDP` may cut."""

import math

import jax
import pytest

from moe import architecture
from moe.model import inventory
from moe.settings import ModelSettings, OptimizerSettings, RouterSettings
from moe.training import new_state
from moe.training.optimizer import make_optimizer
from partitioning import placement
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings, PartitionSettings

pytestmark = pytest.mark.fast

TINY = ModelSettings(
    vocab_size=32,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_experts=4,
    expert_mlp_dim=12,
    positions="learned",
    max_positions=16,
)
ROUTER = RouterSettings()
MESH = MeshSettings(data=2, expert=2, model=2)


def placed(fsdp: str, **partition) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Mesh axes of every array of the state, and its shape on one device."""
    cut = PartitionSettings(fsdp=fsdp, **partition)
    mesh = make_mesh(MESH)
    layers = architecture.describe(TINY, ROUTER)
    optimizer = make_optimizer(OptimizerSettings(), 10, inventory.specs(layers))
    shapes = new_state.abstract(layers, "float32", optimizer)
    named = new_state.logical_axes(shapes, layers)
    places = jax.tree.leaves(new_state.shardings(shapes, named, mesh, cut))
    return {
        path: (written(place.spec), place.shard_shape(array.shape))
        for (path, array, _), place in zip(
            placement.leaves(shapes, named), places, strict=True
        )
    }


def written(spec) -> str:
    return ", ".join(
        "–" if entry is None else entry if isinstance(entry, str) else "×".join(entry)
        for entry in spec
    )


# Each parameter under no full sharding, and what "embed" and "expert_embed" add to it.
PLACES = {
    "embedding": "model, {dense}",
    "positions": "–, –",
    "head": "{dense}, model",
    "decoder/norm/scale": "–",
    "decoder/layers/0/0/attention/query": "–, {dense}, model, –",
    "decoder/layers/0/0/attention/output": "–, model, –, {dense}",
    "decoder/layers/0/0/attention/norm/scale": "–, –",
    "decoder/layers/0/0/dense/up": "–, {dense}, model",
    "decoder/layers/0/0/dense/down": "–, model, {dense}",
    "decoder/layers/0/1/sparse/router": "–, {dense}, –",
    "decoder/layers/0/1/sparse/experts/up": "–, expert, {expert}, {width}",
    "decoder/layers/0/1/sparse/experts/down": "–, expert, {width}, {expert}",
}
UNCUT = {"dense": "–", "expert": "–"}
CUT = {"dense": "context×data", "expert": "context×data"}
# By `fsdp`: of parameters, and of moments.
FULLY_SHARDED = {
    "none": (UNCUT, UNCUT),
    "optimizer": (UNCUT, CUT),
    "data": (CUT, CUT),
    "data_expert": (
        {"dense": "expert×context×data", "expert": "context×data"},
        {"dense": "expert×context×data", "expert": "context×data"},
    ),
}


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("fsdp", FULLY_SHARDED)
def test_parameters_and_moments_live_here(fsdp, whole_experts):
    state = placed(fsdp, expert_tensor_parallel=not whole_experts)
    for kind, cut in zip(("params", "moments"), FULLY_SHARDED[fsdp], strict=True):
        cut = cut | {"width": "model"}
        if whole_experts:  # what is left of `model` cuts their other dimension
            cut["width"] = "–"
            if cut["expert"] != "–":
                cut["expert"] = f"model×{cut['expert']}"
        for path, template in PLACES.items():
            wanted = template.format(**cut)
            found = {
                name: where
                for name, (where, _) in state.items()
                if name.endswith(f"/{path}")
                and name.startswith("params") == (kind == "params")
            }
            assert len(found) == (1 if kind == "params" else 2), path
            assert set(found.values()) == {wanted}, (kind, path)


@pytest.mark.parametrize(
    ("fsdp", "num_parameters", "num_moments"),
    [
        # On one of 2 × 2 × 2 devices. Over `model`: embedding and head 2·32·8, three
        # projections and an output of 2 layers 8·8·8, a feed-forward 2·8·16. Experts,
        # 4·2·8·12, over `expert` too. Whole: router 8·4, positions 16·8, norms 5·8.
        ("none", 640 + 192 + 32 + 168, 640 + 192 + 32 + 168),
        # A half of all but positions and norms.
        ("optimizer", 640 + 192 + 32 + 168, 320 + 96 + 16 + 168),
        ("data", 320 + 96 + 16 + 168, 320 + 96 + 16 + 168),
        # A quarter of what is dense.
        ("data_expert", 160 + 96 + 8 + 168, 160 + 96 + 8 + 168),
    ],
)
def test_a_device_holds_so_many_numbers(fsdp, num_parameters, num_moments):
    def numbers(prefix: str, *, moments: bool) -> int:
        return sum(
            math.prod(shape)
            for name, (_, shape) in placed(fsdp).items()
            if name.startswith(prefix) and ("/mu/" in name) == moments
        )

    assert numbers("params", moments=False) == num_parameters
    assert numbers("opt_state", moments=True) == num_moments
