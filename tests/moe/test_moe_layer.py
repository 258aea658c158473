"""The sparse layer equals one token at a time, on every mesh, by every transport."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe.model.moe_layer import TRANSPORTS, MoE, moe_layer
from moe.settings import ModelSettings, RouterSettings, capacity
from moe.testing import MESHES, one_token_at_a_time

B, L, S, M, E, F = 16, 16, 8, 8, 8, 12
G = B * L // S
MODEL = ModelSettings(
    vocab_size=2,
    num_layers=2,
    model_dim=M,
    num_heads=1,
    head_dim=2,
    mlp_dim=4,
    activation="relu",
    num_experts=E,
    expert_mlp_dim=F,
    dtype="float32",
)
SWITCH = RouterSettings(group_size=S, min_capacity=1, capacity_factor=1.0)
GLAM = RouterSettings(
    num_selected=2,
    renormalize=True,
    slot_order="choice_major",
    group_size=S,
    min_capacity=1,
    capacity_factor=1.0,
)


def unlimited(router: RouterSettings) -> RouterSettings:
    return dataclasses.replace(router, capacity_factor=0.0)


ROUTERS = {
    "switch": SWITCH,
    "switch_dropless": unlimited(SWITCH),
    "glam": GLAM,
    "glam_dropless": unlimited(GLAM),
    "top2_token_major": dataclasses.replace(GLAM, slot_order="token_major"),
}


@functools.cache
def problem():
    """Skewed tokens, a third of the last rows padding, and cotangents."""
    rng = np.random.default_rng(0)
    x_BLM = rng.normal(size=(B, L, M)).astype(np.float32) + 0.5
    mask_BL = np.ones((B, L), bool)
    mask_BL[-3:, L // 3 :] = False
    mask_BL[-1] = False
    return {
        "x": x_BLM,
        "mask": mask_BL,
        "router": rng.normal(size=(M, E)).astype(np.float32),
        "up": rng.normal(size=(E, M, F)).astype(np.float32) / M**0.5,
        "down": rng.normal(size=(E, F, M)).astype(np.float32) / F**0.5,
        "d_y": rng.normal(size=(B, L, M)).astype(np.float32),
        "d_probability": rng.normal(size=(G, E)).astype(np.float32),
        "d_z": 0.1,
    }


@functools.cache
def oracle(name: str):
    p = problem()
    router = ROUTERS[name]
    return one_token_at_a_time(
        p["x"].reshape(G, S, M),
        p["mask"].reshape(G, S),
        p["router"],
        p["up"],
        p["down"],
        router,
        capacity(router, E, train=True),
        d_y_GSM=p["d_y"].reshape(G, S, M),
        d_probability_GE=p["d_probability"],
        d_z=p["d_z"],
    )


def layer_and_gradients(mesh, router: RouterSettings, transport: str):
    """Output, sums and gradients of the oracle's objective, under one jit."""
    p = problem()
    model = dataclasses.replace(MODEL, transport=transport)
    definition = nnx.graphdef(nnx.eval_shape(lambda: MoE(jax.random.key(0), model)))

    def objective(arrays):
        weights = nnx.merge(
            definition,
            {
                "router": arrays["router"],
                "experts": {"up": arrays["up"], "down": arrays["down"]},
            },
        )
        y_BLM, sums = moe_layer(
            weights,
            arrays["x"],
            jnp.asarray(p["mask"]),
            jnp.arange(B),
            jax.random.key(0),  # training capacity; these routers draw nothing
            model=model,
            router=router,
            mesh=mesh,
        )
        value = jnp.sum(y_BLM * jnp.where(p["mask"][..., None], p["d_y"], 0))
        value += jnp.sum(sums.probability_GE * p["d_probability"])
        value += p["d_z"] * jnp.sum(sums.z_G)
        return value, (y_BLM, sums)

    arrays = {name: p[name] for name in ("x", "router", "up", "down")}
    with jax.set_mesh(mesh):
        gradients, (y_BLM, sums) = jax.jit(jax.grad(objective, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (y_BLM, sums, gradients))


# Every router on two meshes by the default transport, every mesh and transport at least
# once with drops; the remaining product is in the slow set.
FAST = [
    ("switch", "d2e4", "all_to_all"),
    ("glam", "d4e2", "all_to_all"),
    ("glam", "e8", "einsum"),
    ("switch", "d1", "einsum"),
]
COVER = [
    ("glam", "d8", "all_to_all"),
    ("glam", "d2e4", "all_to_all"),
    ("switch", "e8", "all_to_all"),
    ("switch", "d8", "einsum"),
    ("switch_dropless", "d4e2", "all_to_all"),
    ("glam_dropless", "d2e4", "all_to_all"),
    ("glam_dropless", "d1", "all_to_all"),
    ("top2_token_major", "e8", "all_to_all"),
    ("top2_token_major", "d4e2", "einsum"),
]
REST = [
    (router, mesh, transport)
    for router in ROUTERS
    for mesh in MESHES
    for transport in TRANSPORTS
    if (router, mesh, transport) not in {*FAST, *COVER}
]


@pytest.mark.parametrize(
    ("router", "mesh", "transport"),
    [
        *(pytest.param(*case, marks=pytest.mark.fast) for case in FAST),
        *COVER,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in REST),
    ],
)
def test_every_mesh_and_transport_agree_with_one_token_at_a_time(
    meshes, router, mesh, transport
):
    expected = oracle(router)
    y_BLM, sums, gradients = layer_and_gradients(
        meshes[mesh], ROUTERS[router], transport
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(y_BLM.reshape(G, S, M), expected.y_GSM)
    close(gradients["x"].reshape(G, S, M), expected.d_x_GSM)
    close(gradients["router"], expected.d_router_ME, atol=2e-4)
    close(gradients["up"], expected.d_up_EMF, atol=2e-4)
    close(gradients["down"], expected.d_down_EFM, atol=2e-4)
    close(sums.probability_GE, expected.probability_GE)
    close(sums.z_G, expected.z_G)
    np.testing.assert_array_equal(sums.chosen_GE, expected.chosen_GE)
    np.testing.assert_array_equal(sums.kept_GE, expected.kept_GE)
    np.testing.assert_array_equal(sums.padding_G, expected.padding_G)

    chosen, kept = sums.chosen_GE.sum(), sums.kept_GE.sum()
    if "dropless" in router:
        assert kept == chosen
    else:
        assert kept < 0.95 * chosen, "this case is meant to drop tokens"
    routed = ROUTERS[router].num_selected * B * L
    assert routed == kept + (chosen - kept) + sums.padding_G.sum()
