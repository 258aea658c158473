"""Layers that share parameters compute what layers with copies of them compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.config import reader
from moe import accounting, architecture
from moe.model import inventory
from moe.model.build import build
from moe.rules.layers import layer_problems
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from moe.shortening import shortened
from moe.testing import MESHES
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import PartitionSettings

B, L, V = 8, 8, 16
# A dense layer below; then twice a dense layer and a sparse one.
SHARED = ModelSettings(
    vocab_size=V,
    num_layers=5,
    first_dense_layers=1,
    moe_every=2,
    model_dim=8,
    num_heads=4,
    head_dim=4,
    mlp_dim=12,
    num_experts=4,
    expert_mlp_dim=12,
    layer_sharing="all",
)
OWN = dataclasses.replace(SHARED, layer_sharing="none")
# What is compiled: one sparse layer, three times.
SMALL = dataclasses.replace(SHARED, num_layers=3, first_dense_layers=0, moe_every=1)
ROUTER = RouterSettings(
    num_selected=2, selection_bias=True, group_size=4, capacity_factor=0.0
)
EXECUTION = ExecutionSettings(dtype="float32")


def layers_of(model: ModelSettings):
    return architecture.describe(model, ROUTER)


def delinked(params, like):
    """Copies of what is shared, in the shapes of `like`."""
    return jax.tree.map(
        lambda x, spec: (
            np.repeat(x, spec.shape[0] // x.shape[0], 0) if x.shape != spec.shape else x
        ),
        params,
        like,
    )


@functools.cache
def params_of_shared():
    """Drawn, and moved a little, the selection biases of each layer by themselves."""
    params = inventory.draw(layers_of(SMALL), jax.random.key(0), "float32")
    draw = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * draw.normal(size=x.shape).astype(np.float32),
        params,
    )


@functools.cache
def computed(sharing: str, mesh: str):
    """Logits, and gradients of a sum in which every logit counts."""
    settings = dataclasses.replace(SMALL, layer_sharing=sharing)
    partition = PartitionSettings(fsdp="none" if mesh == "d1" else "data")
    grid = make_mesh(MESHES[mesh])
    model = build(settings, ROUTER, EXECUTION, grid, partition)
    params = params_of_shared()
    if sharing == "none":
        params = delinked(params, model.specs)
    draw = np.random.default_rng(2)
    batch = {
        "decoder_input_tokens": draw.integers(0, V, (B, L)).astype(np.int32),
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        "decoder_segment_ids": np.ones((B, L), np.int32),
    }
    weight_BLV = draw.normal(size=(B, L, V)).astype(np.float32)

    @jax.jit
    def run(params):
        def value(params):
            logits_BLV, _ = forward(model, params, batch, jnp.arange(B))
            return jnp.sum(logits_BLV * weight_BLV), logits_BLV

        return jax.grad(value, has_aux=True)(params)

    with jax.set_mesh(grid):
        gradients, logits_BLV = jax.device_get(run(params))
    return logits_BLV, gradients


@pytest.mark.parametrize("mesh", ["d1", "d2e2m2"])
def test_shared_layers_are_layers_with_equal_parameters(mesh):
    logits_BLV, gradients = computed("all", mesh)
    expected_BLV, of_each = computed("none", "d1")
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=1e-5, atol=1e-5)

    def same(path, got, each):
        if got.shape != each.shape:  # what layers share has the sum of their gradients
            each = each.sum(0, keepdims=True)
        name = jax.tree_util.keystr(path)
        scale = max(np.abs(each).max(), 1e-3)
        np.testing.assert_allclose(got / scale, each / scale, atol=2e-5, err_msg=name)

    jax.tree_util.tree_map_with_path(same, gradients, of_each)


@pytest.mark.fast
def test_shared_parameters_are_kept_once_and_the_biases_that_choose_for_each_layer():
    specs = inventory.specs(layers_of(SHARED))
    (first,), (below, above) = specs["decoder"]["layers"]
    bias = above["sparse"].pop("selection_bias")
    assert bias.shape == (2, 4)
    assert {spec.shape[0] for spec in jax.tree.leaves([first, below, above])} == {1}
    inventory.specs.cache_clear()  # one of its trees was changed
    params = inventory.draw(layers_of(SHARED), jax.random.key(0), "float32")
    own = inventory.draw(layers_of(OWN), jax.random.key(0), "float32")
    lowest = jax.tree.map(lambda x, y: np.array_equal(x[0], y[0]), params, own)
    assert all(jax.tree.leaves(lowest)), "they start as the lowest of them"


@pytest.mark.fast
def test_shared_parameters_are_counted_once_and_computed_in_each_layer():
    shared, own = (accounting.count(layers_of(s), L) for s in (SHARED, OWN))
    for name in ("forward_flops_per_token", "executed_forward_flops_per_token"):
        assert getattr(shared, name) == getattr(own, name)
    attention = 4 * 8 * 16  # four matrices
    dense, expert = attention + 2 * 8 * 12 + 16, 2 * 8 * 12  # 16: two norms
    sparse = attention + 16 + 4 * expert + 8 * 4  # the last: its router
    assert own.total - shared.total == dense + sparse
    assert own.active - shared.active == dense + sparse - 2 * expert


@pytest.mark.fast
def test_the_largest_m6_has_209_billion_parameters_while_its_layers_share_them():
    # arXiv:2110.03888: trained so first, and then as 10 trillion.
    settings = reader.read(["runs/m6_10t.gin"], ["LAYER_SHARING='all'"]).settings
    counts = accounting.count(settings.layers, settings.data.length)
    assert counts.total == pytest.approx(209e9, rel=0.005)


@pytest.mark.fast
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 25, "attention_windows": (4, 4, 0)},
        {"num_layers": 8, "first_dense_layers": 0, "moe_every": 0},
        {"num_layers": 8, "first_dense_layers": 0, "moe_every": 1}
        | {"attention_windows": (4, 0)},
        {"num_layers": 9, "experts_per_layer": (2, 2, 4, 4)},
    ],
)
def test_what_is_shortened_still_shares(changes):
    model = dataclasses.replace(SHARED, **changes)
    assert layer_problems(model) == []
    short = shortened(model)
    assert layer_problems(short) == []
    assert short.num_layers <= 13


@pytest.mark.fast
def test_sharing_needs_layers_that_repeat():
    alone = dataclasses.replace(SHARED, num_layers=3)
    (found,) = layer_problems(alone)
    assert found.startswith("LAYER_SHARING = 'all' means nothing to layers of which")
    assert layer_problems(SHARED) == []
