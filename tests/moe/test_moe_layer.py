"""The sparse layer equals one token at a time, on every mesh, by every transport."""

import dataclasses
import functools
import itertools
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model import sparse
from moe.model.execution import Execution
from moe.model.feed_forward.dense import feed_forward
from moe.model.view import Routed
from moe.routing.capacity import capacity
from moe.routing.hashed import vocabulary_order
from moe.settings import (
    DenseSettings,
    ExecutionSettings,
    RouterSettings,
    SparseSettings,
)
from moe.testing import MESHES, Told, one_token_at_a_time
from moe.testing.whole_arrays import layer
from partitioning.settings import UNCUT, PartitionSettings

B, L, S, M, E, F, V = 8, 8, 4, 8, 8, 12, 50
G = B * L // S
INDEX = 1  # of the layer
TIGHT = RouterSettings(group_size=S, min_capacity=1, capacity_factor=1.0)
FREE = RouterSettings(
    num_selected=2, renormalize="before_drop", group_size=S, capacity_factor=0.0
)
replace = dataclasses.replace

# What transports see differently: J, slots per expert, order, drops and runs of 0 rows.
TRANSPORTS = sorted(
    set(get_args(get_type_hints(ExecutionSettings)["transport"])) - {"auto"}
)
ROUTERS = {
    "switch": TIGHT,
    "glam": replace(
        TIGHT, num_selected=2, renormalize="before_drop", slot_order="choice_major"
    ),
    "deepseek": replace(
        TIGHT,
        num_selected=3,
        scores="sigmoid",
        renormalize="before_drop",
        gate_scale=2.5,
        num_expert_groups=4,
        num_selected_groups=2,
        group_score="top2_sum",
        selection_bias=True,
    ),
    "spill": replace(
        TIGHT,
        num_selected=2,
        overflow="spill",
        renormalize="after_drop",
        slot_order="batch_priority",
    ),
    "expert_choice": RouterSettings(
        family="expert_choice", group_size=S, min_capacity=1, capacity_factor=2.0
    ),
    "dropless": FREE,
    "m6t": replace(TIGHT, family="prototypes", num_prototypes=2, num_selected=2),
    "hashed": replace(TIGHT, family="hashed", num_selected=2, hash_gates="scores"),
    "sinkhorn": replace(TIGHT, family="sinkhorn", num_selected=2, capacity_factor=0.5),
    "gated_inputs": replace(
        TIGHT, num_selected=2, scores="sigmoid", gate_place="input", logit_bias=True
    ),
}
# Groups of two tokens of each of two rows.
OF_TWO_ROWS = {
    name: replace(ROUTERS[name], group_rows=2)
    for name in ("switch", "spill", "deepseek", "expert_choice", "dropless")
}
EXPERTS = {
    "deepseek": {"activation": "swiglu", "biases": True},
    "spill": {"activation": "gelu", "biases": True},
    "expert_choice": {"activation": "geglu"},
    "dropless": {"activation": "swiglu_clamped", "biases": True},
    "glam": {"activation": "relu_squared"},
    "gated_inputs": {"activation": "swiglu", "biases": True},
}


def sparse_of(name: str, **changes) -> SparseSettings:
    """The layer of a router, with experts of its own."""
    given = EXPERTS.get(name, {})
    experts = DenseSettings(F, given.get("activation", "relu"), "biases" in given)
    return SparseSettings(E, experts, ROUTERS[name], vocab_size=V, **changes)


def executed(
    transport: str,
    mesh: jax.sharding.Mesh,
    partition: PartitionSettings = UNCUT,
    *,
    in_rounds: bool = False,
    **changes,
) -> Execution:
    """With room for all rows: of 4 devices all may come to one."""
    given = {"dtype": "float32", "row_budget": 4.0, "transport": transport} | changes
    return Execution(ExecutionSettings(**given), mesh, partition, in_rounds)


def grouped(x_BL, router: RouterSettings):
    """[B, L] as groups [G, S], row by row of each group."""
    x_GS = []
    for b in range(0, B, router.group_rows):
        for cut in range(0, L, router.group_length):
            rows = x_BL[b : b + router.group_rows, cut : cut + router.group_length]
            x_GS.append(np.concatenate(list(rows)))
    return np.array(x_GS)


@functools.cache
def problem():
    """Skewed tokens, a third of the last rows padding, and cotangents."""
    rng = np.random.default_rng(0)
    mask_BL = np.ones((B, L), bool)
    mask_BL[-3:, L // 3 :] = False
    mask_BL[-1] = False
    return {
        "x": rng.normal(size=(B, L, M)).astype(np.float32) + 0.5,
        "mask": mask_BL,
        "id": rng.integers(0, V, (B, L)).astype(np.int32),
        "d_y": rng.normal(size=(B, L, M)).astype(np.float32),
        "d_probability": rng.normal(size=(G, E)).astype(np.float32),
        "d_z": 0.1,
    }


def weights_of(s: SparseSettings):
    """Arrays none of which is zero."""
    rng = np.random.default_rng(1)

    def drawn(path, spec):
        fan_in = {"up": M, "down": F}.get(path[-1].key, 4)
        scale = 1.0 if path[-1].key == "router" else fan_in**-0.5
        return rng.normal(size=spec.shape, scale=scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, sparse.specs(s, M))


def run_layer(arrays, x_BLM, s: SparseSettings, execution: Execution, key):
    p = problem()
    routed = Routed(jnp.asarray(p["mask"]), jnp.asarray(p["id"]), jnp.arange(B))
    return layer(arrays, x_BLM, routed, key, INDEX, s, execution)


def compiled(s: SparseSettings, execution: Execution, *, gradients: bool = True):
    """Output, sums and gradients of the oracle's objective, under one jit."""
    p = problem()

    def objective(arrays, x_BLM):
        y_BLM, sums = run_layer(arrays, x_BLM, s, execution, jax.random.key(5))
        value = jnp.sum(y_BLM * jnp.where(p["mask"][..., None], p["d_y"], 0))
        d_probability = np.repeat(p["d_probability"], s.router.group_rows, 0)
        value += jnp.sum(sums.probability_GE * d_probability)
        value += p["d_z"] * jnp.sum(sums.z_G)
        return value, (y_BLM, sums)

    run = jax.jit(
        jax.grad(objective, argnums=(0, 1), has_aux=True)
        if gradients
        else lambda *args: (None, objective(*args)[1])
    )

    def in_mesh(arrays, x_BLM):
        with jax.set_mesh(execution.mesh):
            return jax.device_get(run(arrays, x_BLM))

    return in_mesh


def oracle(s: SparseSettings, arrays, x_BLM):
    """The same by one token at a time."""
    p, router = problem(), s.router
    order_V = np.asarray(vocabulary_order(router.hash_seed, jnp.int32(INDEX), V))
    told_G = [
        Told(mask_S, bias_E=arrays.get("selection_bias"), id_S=id_S, order_V=order_V)
        for mask_S, id_S in zip(
            grouped(p["mask"], router), grouped(p["id"], router), strict=True
        )
    ]
    return one_token_at_a_time(
        grouped(x_BLM, router),
        arrays.get("router", np.zeros((M, E))),
        arrays["experts"],
        told_G,
        router,
        capacity(router, E, train=True),
        activation=s.experts.activation,
        router_bias_E=arrays.get("router_bias"),
        d_y_GSM=grouped(p["d_y"], router),
        d_probability_GE=p["d_probability"],
        d_z=p["d_z"],
    )


@functools.cache
def oracle_of(s: SparseSettings):
    return oracle(s, weights_of(s), problem()["x"])


def agree(result, expected, router: RouterSettings = TIGHT) -> None:
    """Outputs, every gradient and every sum."""
    (d_arrays, d_x_BLM), (y_BLM, sums) = result
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    close(grouped(y_BLM, router), expected.y_GSM)
    close(grouped(d_x_BLM, router), expected.d_x_GSM, atol=5e-5)
    for name, d_array in expected.d_experts.items():
        close(d_arrays["experts"][name], d_array, atol=2e-4, err_msg=name)
    if "router" in d_arrays:
        close(d_arrays["router"], expected.d_router_ME, atol=2e-4)
    if "router_bias" in d_arrays:
        close(d_arrays["router_bias"], expected.d_router_bias_E, atol=2e-4)
    for name, total in expected.sums.items():
        field = name + ("_GE" if total.ndim == 2 else "_G")
        close(getattr(sums, field), total, err_msg=field)


# Every router, every mesh and twice every transport, but for einsum, whose exchanges
# are those of all_to_all. The remaining product is in the slow set. These meshes cut no
# sequence.
WHOLE = [name for name, mesh in MESHES.items() if mesh.context * mesh.model == 1]
FIRST = ("switch", "glam", "deepseek", "spill", "expert_choice", "dropless")
COVER = [
    ("switch", "e8", "ragged"),
    ("glam", "d8", "ring"),
    ("deepseek", "d4e2", "all_to_all"),
    ("spill", "d2e4", "all_to_all"),
    ("expert_choice", "r2d2e2", "ring"),
    ("dropless", "d4e2", "ragged"),
    ("m6t", "e8", "einsum"),
    ("hashed", "d1", "einsum"),
    ("sinkhorn", "d4e2", "einsum"),
    ("gated_inputs", "d4e2", "ragged"),
]
FAST = [
    ("spill", "d2e4", "all_to_all"),
    ("switch", "e8", "ragged"),
    ("hashed", "d1", "einsum"),
]
REST = [
    case for case in itertools.product(ROUTERS, WHOLE, TRANSPORTS) if case not in COVER
]


@pytest.mark.fast
def test_the_cases_cover_every_router_mesh_and_transport():
    routers, meshes, transports = map(set, zip(*COVER, strict=True))
    assert routers == set(ROUTERS)
    assert meshes == set(WHOLE)
    assert transports == set(TRANSPORTS)
    assert set(FAST) <= set(COVER)


@pytest.mark.parametrize(
    ("router", "mesh", "transport"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.fast if case in FAST else ())
            for case in COVER
        ),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in REST),
    ],
)
def test_every_mesh_and_transport_agree_with_one_token_at_a_time(
    meshes, router, mesh, transport
):
    check_layer(router, sparse_of(router), executed(transport, meshes[mesh]))


def check_layer(router: str, s: SparseSettings, execution: Execution) -> None:
    """Everything agrees with the oracle, and the case is one of its kind."""
    result = compiled(s, execution)(weights_of(s), problem()["x"])
    agree(result, oracle_of(s), s.router)

    _, (_, sums) = result
    assert sums.excess_G.sum() == 0
    chosen, kept = sums.chosen_GE.sum(), sums.kept_GE.sum()
    if router in ("expert_choice", "dropless"):
        assert kept == chosen
    else:
        assert kept < 0.95 * chosen, "this case is meant to drop tokens"
    if router == "spill":
        assert sums.spilled_GE.sum() > 0.02 * chosen, "this case is meant to spill"
    if router != "expert_choice":
        routed = s.router.num_choices(E) * B * L
        assert routed == chosen + sums.padding_G.sum()


# Sequences in pieces: over `context`, or over `model`, which cuts experts or does not.

CUTS = {
    "experts_cut": ("d2e2m2", PartitionSettings()),
    "experts_whole": (
        "d2e2m2",
        PartitionSettings(expert_tensor_parallel=False, fsdp="data"),
    ),
    "context": ("c2e4", PartitionSettings(fsdp="data_expert")),
}
CUT_COVER = [
    ("dropless", "experts_cut", "ragged"),
    ("glam", "experts_whole", "ring"),
    ("deepseek", "context", "all_to_all"),
]
CUT_REST = [
    case
    for case in itertools.product((*FIRST, "hashed"), CUTS, TRANSPORTS)
    if case not in CUT_COVER
]


@pytest.mark.parametrize(
    ("router", "cut", "transport"),
    [*CUT_COVER, *(pytest.param(*case, marks=pytest.mark.slow) for case in CUT_REST)],
)
def test_pieces_of_sequences_agree_with_one_token_at_a_time(
    meshes, router, cut, transport
):
    mesh, partition = CUTS[cut]
    check_layer(router, sparse_of(router), executed(transport, meshes[mesh], partition))


# Groups that span rows. Each device of these meshes has two rows or more.

OVER_ROWS = [
    ("switch", "c2e4", PartitionSettings(), "all_to_all"),
    ("spill", "d2e2m2", PartitionSettings(), "all_to_all"),
    ("deepseek", "c2e2m2", PartitionSettings(), "einsum"),
    ("expert_choice", "d2e2m2", CUTS["experts_whole"][1], "ring"),
    ("dropless", "c2e4", CUTS["context"][1], "ragged"),
]
ROWS_DAILY = ("spill", "dropless")


@pytest.mark.parametrize(
    ("router", "mesh", "partition", "transport"),
    [
        pytest.param(*case, marks=() if case[0] in ROWS_DAILY else pytest.mark.slow)
        for case in OVER_ROWS
    ],
)
def test_groups_of_several_rows_agree_with_one_token_at_a_time(
    meshes, router, mesh, partition, transport
):
    s = replace(sparse_of(router), router=OF_TWO_ROWS[router])
    check_layer(router, s, executed(transport, meshes[mesh], partition))


# More rows than a device has room for.

TOKENS = B * L // 8  # per device
ROOM = TOKENS * 2  # rows: 1.0 times an even share at K = 2


@functools.cache
def crowded(where: str):
    """Arrays with which experts fill unevenly or one gets all, and their oracle."""
    s = sparse_of("dropless")
    arrays = weights_of(s)
    x_BLM = problem()["x"].copy()
    if where == "one_expert":
        x_BLM[..., 0] = 1.0
        arrays["router"] = arrays["router"].copy()
        arrays["router"][0, 3] = 30.0
    return arrays, x_BLM, oracle(s, arrays, x_BLM)


def excess_of(expected, data: int, expert: int) -> np.ndarray:
    """Rows beyond the budget of each device, counted in its first group."""
    kept_GE = expected.sums["kept"].astype(int)
    excess_G = np.zeros(G, int)
    groups = G // (data * expert)  # of a device
    for d in range(data):
        along_axis = slice(d * expert * groups, (d + 1) * expert * groups)
        for i in range(expert):
            mine = slice(i * E // expert, (i + 1) * E // expert)
            rows = kept_GE[along_axis, mine].sum()
            excess_G[(d * expert + i) * groups] = max(rows - ROOM, 0)
    return excess_G


@pytest.mark.parametrize("transport", ["ring", "ragged"])
def test_rows_beyond_the_budget_are_computed_in_further_rounds(meshes, transport):
    tight = executed(transport, meshes["d2e4"], in_rounds=True, row_budget=1.0)
    run = compiled(sparse_of("dropless"), tight)
    for where in ("uneven", "one_expert"):
        arrays, x_BLM, expected = crowded(where)
        result = run(arrays, x_BLM)
        agree(result, expected)
        _, (_, sums) = result
        assert sums.excess_G.sum() == 0
        assert sums.kept_GE.sum() == sums.chosen_GE.sum()
        assert excess_of(expected, 2, 4).sum() > 0, "one round must not be enough"
    kept_E = expected.sums["kept"].sum(axis=0)
    assert kept_E[3] == problem()["mask"].sum() > 2 * ROOM


@pytest.mark.parametrize("transport", ["ring", "ragged"])
def test_rounds_in_bfloat16_give_the_output_of_ample_room_bit_for_bit(
    meshes, transport
):
    s, mesh = sparse_of("dropless"), meshes["d2e4"]
    arrays, x_BLM, expected = crowded("one_expert")
    given = arrays, jnp.asarray(x_BLM, jnp.bfloat16)
    roomy = executed(transport, mesh, dtype="bfloat16")
    tight = executed(transport, mesh, in_rounds=True, row_budget=1.0, dtype="bfloat16")
    _, (ample, _) = compiled(s, roomy, gradients=False)(*given)
    _, (y_BLM, _) = compiled(s, tight, gradients=False)(*given)
    assert y_BLM.dtype == jnp.bfloat16
    assert excess_of(expected, 2, 4).sum() > 0, "one round must not be enough"
    np.testing.assert_array_equal(y_BLM.view(np.uint16), ample.view(np.uint16))


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["experts_cut", "experts_whole"])
@pytest.mark.parametrize("transport", ["ring", "ragged"])
def test_devices_that_share_sequences_take_as_many_rounds(meshes, cut, transport):
    mesh, partition = CUTS[cut]
    tight = executed(transport, meshes[mesh], partition, in_rounds=True, row_budget=1.0)
    run = compiled(sparse_of("dropless"), tight)
    for where in ("uneven", "one_expert"):
        arrays, x_BLM, expected = crowded(where)
        agree(run(arrays, x_BLM), expected)
    # Of the last: by data, sequence, piece of it, device, expert.
    kept = expected.sums["kept"].reshape(2, B // 2, 2, 2, E // 2)
    assert kept.sum(axis=(1, 4)).max() > ROOM, "one round must not be enough"


@pytest.mark.parametrize("transport", ["ring", "ragged"])
def test_without_rounds_the_rows_left_out_are_counted_exactly(meshes, transport):
    tight = executed(transport, meshes["d2e4"], row_budget=1.0)
    run = compiled(sparse_of("dropless"), tight, gradients=False)
    for where in ("uneven", "one_expert"):
        arrays, x_BLM, expected = crowded(where)
        _, (y_BLM, sums) = run(arrays, x_BLM)
        np.testing.assert_array_equal(sums.excess_G, excess_of(expected, 2, 4))
        assert np.all(np.isfinite(y_BLM))
        assert not np.allclose(y_BLM.reshape(G, S, M), expected.y_GSM, atol=1e-3)


# What is drawn, drawn alike on every mesh.

DRAWN = {
    "noisy": replace(
        TIGHT,
        num_selected=2,
        renormalize="before_drop",
        second_policy="random",
        jitter=0.2,
        logit_noise=1.0,
    ),
    "capped": replace(ROUTERS["expert_choice"], max_experts_per_token=2, jitter=0.2),
}


@pytest.mark.parametrize("name", DRAWN)
def test_draws_and_iterations_are_the_same_on_every_mesh(meshes, name):
    x_BLM = problem()["x"]
    s = replace(sparse_of("switch"), router=DRAWN[name])
    arrays = weights_of(s)

    def run(mesh, transport):
        execution = executed(transport, meshes[mesh])
        return compiled(s, execution, gradients=name == "noisy")(arrays, x_BLM)

    alone, spread = run("d1", "einsum"), run("r2d2e2", "ragged")
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4),
        alone,
        spread,
    )
    _, (_, sums) = alone
    assert 0 < sums.kept_GE.sum() < sums.chosen_GE.sum()
    if name == "noisy":
        declined = 2 * problem()["mask"].sum() - sums.chosen_GE.sum()
        assert declined > 0, "some second experts are meant to be declined"
        assert np.all(sums.load_GE.sum(axis=0) > 0)


def test_jitter_moves_the_router_and_never_the_experts(meshes):
    # With a router of zeros every token takes expert 0 at 1/8, jitter or not.
    router = replace(TIGHT, capacity_factor=0.0, jitter=0.2)
    s = replace(sparse_of("switch"), router=router)
    arrays = weights_of(s)
    arrays["router"] = np.zeros((M, E), np.float32)
    x_BLM = problem()["x"]
    execution = executed("einsum", meshes["d1"])
    _, (y_BLM, _) = compiled(s, execution, gradients=False)(arrays, x_BLM)
    expected = oracle(s, arrays, x_BLM).y_GSM
    np.testing.assert_allclose(y_BLM.reshape(G, S, M), expected, atol=2e-5)


def test_expert_dropout_keeps_its_share_and_the_same_units_on_every_mesh(meshes):
    # A hash router's only choice has gate 1. Hidden units of relu(0 + 1) = 1, through
    # the identity: y is 0 where dropped and 1 / (1 - 0.4) where kept.
    router = RouterSettings(family="hashed", group_size=S, capacity_factor=0.0)
    s = SparseSettings(
        E, DenseSettings(M, "relu", biases=True), router, dropout=0.4, vocab_size=V
    )
    experts = {
        "up": np.zeros((E, M, M), np.float32),
        "up_bias": np.ones((E, M), np.float32),
        "down": np.tile(np.eye(M, dtype=np.float32), (E, 1, 1)),
        "down_bias": np.zeros((E, M), np.float32),
    }
    mask_BL = problem()["mask"]

    def run(mesh):
        run_one = compiled(s, executed("all_to_all", meshes[mesh]), gradients=False)
        _, (y_BLM, _) = run_one({"experts": experts}, problem()["x"])
        return y_BLM

    alone = run("d1")
    np.testing.assert_array_equal(alone, run("d2e2m2"))
    y_TM = alone[mask_BL]
    kept_TM = y_TM > 0
    np.testing.assert_allclose(y_TM[kept_TM], 1 / 0.6, rtol=1e-6)
    sigma = (0.4 * 0.6 / kept_TM.size) ** 0.5
    assert abs(kept_TM.mean() - 0.6) < 4 * sigma < 0.11
    # Of 2⁸ patterns 44 tokens share few, unless draws repeat.
    assert len(np.unique(kept_TM, axis=0)) > 30


# Special sizes.


def test_one_expert_is_a_dense_feed_forward(meshes):
    router = RouterSettings(group_size=S, capacity_factor=0.0)
    s = SparseSettings(1, DenseSettings(F, "swiglu", biases=True), router)
    arrays, x_BLM, mask_BL = weights_of(s), problem()["x"], problem()["mask"]
    one = jax.tree.map(lambda array: array[0], arrays["experts"])
    expected = jax.jit(lambda x: feed_forward(one, x, "swiglu"))(x_BLM)
    for transport in ("all_to_all", "ragged"):
        execution = executed(transport, meshes["d1"])
        _, (y_BLM, sums) = compiled(s, execution, gradients=False)(arrays, x_BLM)
        np.testing.assert_allclose(y_BLM[mask_BL], expected[mask_BL], rtol=1e-6)
        assert np.all(y_BLM[~mask_BL] == 0)
        np.testing.assert_array_equal(sums.kept_GE[:, 0], sums.tokens_G)


@pytest.mark.parametrize(("mesh", "gated"), [("d2e4", False), ("d2e2m2", True)])
def test_a_shared_expert_adds_a_dense_feed_forward_of_every_token(meshes, mesh, gated):
    without = sparse_of("switch")
    s = replace(without, shared=DenseSettings(6, "relu"), shared_gate=gated)
    arrays, x_BLM = weights_of(s), problem()["x"]
    execution = executed("all_to_all", meshes[mesh])
    alone = {name: arrays[name] for name in ("router", "experts")}

    @jax.jit
    def run(x):
        key = jax.random.key(0)
        return (
            run_layer(arrays, x, s, execution, key)[0],
            run_layer(alone, x, without, execution, key)[0],
            feed_forward(arrays["shared"], x, "relu"),
        )

    with jax.set_mesh(execution.mesh):
        together, routed, dense = jax.device_get(run(x_BLM))
    if gated:  # between 0.05 and 0.95 here
        logit_BL1 = x_BLM.astype(np.float64) @ arrays["shared_gate"]
        dense = dense / (1 + np.exp(-logit_BL1))
    np.testing.assert_allclose(together, routed + dense, rtol=1e-6, atol=1e-6)
    assert np.abs(dense).min(axis=-1).max() > 0.01
