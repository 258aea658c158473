"""Muon against loops over matrices in NumPy, on one device and in pieces on eight."""

import functools

import jax
import numpy as np
import optax
import pytest

from moe.model import parameters, sparse
from moe.model.parameters import Spec, matrix, vector
from moe.settings import (
    DenseSettings,
    OptimizerSettings,
    RouterSettings,
    SparseSettings,
)
from moe.training import muon
from moe.training.optimizer import make_optimizer, state_axes
from partitioning import placement, rules
from partitioning.grid import Grid
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings, PartitionSettings

P, E, M, F, N, D, V = 3, 4, 16, 24, 2, 6, 8
STEPS, RATE = 3, 0.1
SPECS = {
    "embedding": Spec((V, M), ("vocab", "embed"), (0,), (1,), stddev=1.0),
    "norm": vector((M,), ("norm",), 1.0),
    "layers": parameters.stack(
        {
            "query": matrix((M, N, D), ("embed", "heads", "head_dim"), (0,), (1, 2)),
            "output": matrix((N, D, M), ("heads", "head_dim", "embed"), (0, 1), (2,)),
            "router": matrix((M, E), ("embed", "routed"), (0,), (1,)),
            "up": matrix(
                (E, M, 2, F),
                ("expert", "expert_embed", "pair", "expert_mlp"),
                (1,),
                (3,),
            ),
        },
        P,
    ),
}
SETTINGS = OptimizerSettings(
    name="muon",
    learning_rate=RATE,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=0.0,
    muon_beta=0.8,
)
MESHES = {
    # 3 layers of 2 experts are no multiple of the 4 devices that hold their pieces.
    "d2e2m2-fsdp": (
        MeshSettings(data=2, expert=2, model=2),
        PartitionSettings(fsdp="data_expert"),
    ),
    "d2c2m2-optimizer": (
        MeshSettings(data=2, context=2, model=2),
        PartitionSettings(fsdp="optimizer", expert_tensor_parallel=False),
    ),
}


@functools.cache
def given():
    """Parameters, and gradients of scales that differ from matrix to matrix."""
    rng = np.random.default_rng(0)

    def one(spec: Spec, *lead: int) -> np.ndarray:
        shape = [n if dim in spec.stacked else 1 for dim, n in enumerate(spec.shape)]
        scale = 10.0 ** rng.uniform(-2, 2, shape)
        return (scale * rng.normal(size=(*lead, *spec.shape))).astype(np.float32)

    params = jax.tree.map(one, SPECS)
    return params, jax.tree.map(lambda spec: one(spec, STEPS), SPECS)


def made_orthogonal(x: np.ndarray) -> np.ndarray:
    """Five iterations of aX + b(XXᵀ)X + c(XXᵀ)²X, in float64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def of_one_matrix(gradients: list[np.ndarray]) -> np.ndarray:
    """The sum of the updates of one matrix, which starts without momentum."""
    momentum, total = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    for gradient in gradients:
        momentum = 0.8 * momentum + gradient
        ahead = gradient + 0.8 * momentum  # Nesterov's
        total -= RATE * 0.2 * np.sqrt(max(ahead.shape)) * made_orthogonal(ahead)
    return total


def expected() -> dict[str, np.ndarray]:
    """What the matrices of the layers have moved by, one by one."""
    gradients = jax.tree.map(lambda g: g.astype(np.float64), given()[1])["layers"]
    moved = {name: np.zeros(SPECS["layers"][name].shape) for name in gradients}
    for layer in range(P):
        query = [g[layer].reshape(M, N * D) for g in gradients["query"]]
        moved["query"][layer] = of_one_matrix(query).reshape(M, N, D)
        output = [g[layer].reshape(N * D, M) for g in gradients["output"]]
        moved["output"][layer] = of_one_matrix(output).reshape(N, D, M)
        for expert in range(E):
            for half in range(2):
                up = [g[layer, expert, :, half] for g in gradients["up"]]
                moved["up"][layer, expert, :, half] = of_one_matrix(up)
    return moved


def learn(mesh: str = ""):
    """What has moved after all steps, and the program of one of them."""
    params, gradients = given()
    grid, where = None, None
    if mesh:
        sizes, partition = MESHES[mesh]
        grid = Grid(make_mesh(sizes), partition)
    optimizer = make_optimizer(SETTINGS, STEPS, SPECS, grid)
    state = optimizer.init(params)
    if grid is not None:

        def placed(tree, axes):
            return jax.tree.unflatten(
                jax.tree.structure(tree),
                [
                    rules.sharding(grid.mesh, array_axes, grid.table)
                    for _, _, array_axes in placement.leaves(tree, axes)
                ],
            )

        where = placed(state, state_axes(state, SPECS))
        of_params = placed(params, parameters.axes(SPECS))
        where = (of_params, where, of_params)
    update = jax.jit(
        lambda g, state, p: optimizer.update(g, state, p), in_shardings=where
    )
    start = params
    for step in range(STEPS):
        gradient = jax.tree.map(lambda g, step=step: g[step], gradients)
        updates, state = update(gradient, state, params)
        params = jax.device_get(optax.apply_updates(params, updates))
        state = jax.device_get(state)
    moved = jax.tree.map(lambda after, before: after - before, params, start)
    return moved, state, update.lower(gradient, state, params)


@pytest.fixture(scope="module")
def alone():
    return learn()


def test_every_layer_expert_and_half_is_made_orthogonal_by_itself(alone):
    moved, state, _ = alone
    for name, wanted in expected().items():
        if name == "router":
            continue
        size = np.sqrt(np.mean(wanted**2))
        # 3 updates of about RATE · 0.2; parameters of up to 400 round to 2e-5.
        assert 0.2 * RATE < size < 3.5 * 0.2 * RATE
        np.testing.assert_allclose(
            moved["layers"][name], wanted, rtol=0, atol=2e-3 * size
        )
    shapes = [x.shape for x in jax.tree.leaves(state) if x.ndim]
    assert len(shapes) == 3 + 2 * 3, "one momentum of Muon, two moments of Adam"


@pytest.mark.fast
def test_adam_moves_routers_and_gates_of_shared_experts():
    expert = DenseSettings(F, "relu")
    s = SparseSettings(E, expert, RouterSettings(), shared=expert, shared_gate=True)
    found = sparse.specs(s, M)
    assert not muon.is_made_orthogonal(found["router"])
    assert not muon.is_made_orthogonal(found["shared_gate"])
    assert muon.is_made_orthogonal(found["shared"]["up"])


def test_the_first_step_is_that_of_optax():
    # Later ones differ: Optax corrects its momentum for its start, as Adam's.
    _, gradients = given()
    first = jax.tree.map(lambda g: g[0], gradients)
    ours = muon.scale_by_muon(SETTINGS, SPECS)
    updates, _ = ours.update(first, ours.init(first), first)
    theirs = optax.contrib.muon(
        1.0,
        beta=SETTINGS.muon_beta,
        consistent_rms=SETTINGS.muon_rms,
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(2, 4),
    )
    up = {"up": first["layers"]["up"]}
    wanted, _ = theirs.update(up, theirs.init(up), up)
    size = np.sqrt(np.mean(np.square(wanted["up"])))
    np.testing.assert_allclose(
        updates["layers"]["up"], -wanted["up"], rtol=0, atol=2e-3 * size
    )


def test_tables_routers_and_vectors_are_moved_as_adam_does(alone):
    moved, _, _ = alone
    params, gradients = given()
    optimizer = optax.adam(RATE, SETTINGS.b1, SETTINGS.b2, SETTINGS.eps)

    def of_adam(tree):
        return tree["embedding"], tree["norm"], tree["layers"]["router"]

    after, state = of_adam(params), optimizer.init(of_adam(params))
    for step in range(STEPS):
        gradient = jax.tree.map(lambda g, step=step: g[step], of_adam(gradients))
        updates, state = optimizer.update(gradient, state)
        after = optax.apply_updates(after, updates)
    for actual, new, old in zip(of_adam(moved), after, of_adam(params), strict=True):
        np.testing.assert_allclose(actual, new - old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_pieces_are_exchanged_for_whole_matrices_and_back(mesh, alone):
    moved, _, lowered = learn(mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=2e-3 * np.sqrt(np.mean(b**2))
        ),
        moved,
        alone[0],
    )
    # There and back, over each dimension that is cut: both of three arrays, but that
    # experts which are not cut over `model` have one dimension.
    whole_experts = mesh == "d2c2m2-optimizer"
    assert lowered.as_text().count("all_to_all") == 2 * (6 - whole_experts)


def test_few_matrices_at_a_time_are_the_same(alone, monkeypatch):
    monkeypatch.setattr(muon, "_BATCH_ELEMENTS", 5 * M * F)  # 24 matrices: 5 times 5
    moved, _, lowered = learn()
    assert "tensor<5x5x16x24xf32>" in lowered.as_text()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
        moved,
        alone[0],
    )


def test_updates_without_a_size_of_their_own_have_jordans_factor():
    assert muon.factor(4, 16, 0.0) == 2.0
    assert muon.factor(16, 4, 0.0) == 1.0
    assert muon.factor(4, 16, 0.2) == muon.factor(16, 4, 0.2) == 0.8
