"""Every router equals its oracle: who sits where, at which gates, with which sums.

One shape for all; the data are drawn, and each configuration is compiled once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.constraints import problems
from moe.model.sparse import route_of
from moe.routing import token_choice
from moe.routing.assignment import RouterContext
from moe.routing.hashed import vocabulary_order
from moe.routing.sinkhorn import balanced
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)
from moe.testing import Told, check_assignment, decide, router_sums
from moe.testing.decisions import chances, held_gates, sinkhorn, slope
from moe.testing.one_token import d_logits
from moe.training import losses

G, S, E, C, V = 3, 8, 8, 2, 50

TOP1 = RouterSettings(group_size=S)
TOP2 = dataclasses.replace(TOP1, num_selected=2)
TOP3 = dataclasses.replace(TOP1, num_selected=3)
PAIRS = RouterSettings(
    family="prototypes", num_prototypes=2, num_selected=2, group_size=S
)
BANK = {
    "switch": TOP1,
    "top1_choice_major": dataclasses.replace(TOP1, slot_order="choice_major"),
    "glam": dataclasses.replace(
        TOP2, renormalize="before_drop", slot_order="choice_major"
    ),
    "gshard": dataclasses.replace(
        TOP2, renormalize="before_drop", second_policy="random"
    ),
    "top2_random_choice_major": dataclasses.replace(
        TOP2, second_policy="random", slot_order="choice_major", gate_scale=0.5
    ),
    "v_moe": dataclasses.replace(TOP2, slot_order="batch_priority", logit_noise=1.0),
    "top2_after_drop": dataclasses.replace(TOP2, renormalize="after_drop"),
    "deepseek_v3": dataclasses.replace(
        TOP3,
        scores="sigmoid",
        renormalize="before_drop",
        gate_scale=2.5,
        num_expert_groups=4,
        num_selected_groups=2,
        group_score="top2_sum",
        selection_bias=True,
    ),
    "deepseek_v2": dataclasses.replace(
        TOP3, num_expert_groups=4, num_selected_groups=2, gate_scale=16.0
    ),
    "biased_softmax": dataclasses.replace(TOP2, selection_bias=True),
    "sigmoid_top1": dataclasses.replace(TOP1, scores="sigmoid"),
    "deepseek_v4": dataclasses.replace(
        TOP3,
        scores="sqrt_softplus",
        renormalize="before_drop",
        gate_scale=1.5,
        selection_bias=True,
    ),
    "spill_top1": dataclasses.replace(TOP1, overflow="spill"),
    "spill_before_drop": dataclasses.replace(
        TOP2, overflow="spill", renormalize="before_drop", slot_order="choice_major"
    ),
    "spill_after_drop": dataclasses.replace(
        TOP2, overflow="spill", renormalize="after_drop", slot_order="batch_priority"
    ),
    "spill_in_groups": dataclasses.replace(
        TOP2, overflow="spill", num_expert_groups=2, num_selected_groups=1
    ),
    "every_expert": dataclasses.replace(TOP1, num_selected=E),
    "m6t": dataclasses.replace(PAIRS, num_prototypes=4, num_selected=1),
    "prototypes_renormalized": dataclasses.replace(
        PAIRS, renormalize="before_drop", slot_order="choice_major"
    ),
    "expert_choice": RouterSettings(family="expert_choice", group_size=S),
    "hashed": RouterSettings(family="hashed", num_selected=2, group_size=S),
    "hashed_by_scores": RouterSettings(
        family="hashed",
        num_selected=2,
        hash_gates="scores",
        scores="sqrt_softplus",
        renormalize="before_drop",
        slot_order="batch_priority",
        group_size=S,
    ),
    "s_base": RouterSettings(family="sinkhorn", group_size=S),
    "sinkhorn_top2": RouterSettings(
        family="sinkhorn", num_selected=2, renormalize="before_drop", group_size=S
    ),
}
# Permuted rows have the same probabilities but for the last bit of a sum's order: what
# compares different tokens has no defined order among them. Where all rows are alike,
# scaling columns to be even makes every score of Sinkhorn the same, up to rounding.
NOT_DRAWN = {
    "v_moe": ("tied",),
    "hashed_by_scores": ("tied",),
    "spill_after_drop": ("tied",),
    "expert_choice": ("tied",),
    "s_base": ("tied", "twins", "uniform"),
    "sinkhorn_top2": ("tied", "twins", "uniform"),
}


@dataclasses.dataclass
class Data:
    """What is drawn: logits and all that a router may be told."""

    logits_GSE: np.ndarray
    mask_GS: np.ndarray
    bias_E: np.ndarray
    clean_GSE: np.ndarray
    token_GS: np.ndarray
    d_gate_GSJ: np.ndarray
    d_probability_GE: np.ndarray
    key_G: jax.Array = dataclasses.field(
        default_factory=lambda: jax.random.split(jax.random.key(7), G)
    )


def draw(kind: str, padding: bool, seed: int, num_choices: int) -> Data:
    rng = np.random.default_rng(seed)
    normal_GSE = rng.normal(size=(G, S, E))
    logits_GSE = {
        "spread": lambda: 2 * normal_GSE,
        "skewed": lambda: normal_GSE + np.linspace(3, -3, E),
        "one_expert": lambda: normal_GSE + 9.0 * (np.arange(E) == E - 3),
        "tied": lambda: rng.integers(0, 3, (G, S, E)).astype(float),
        "twins": lambda: np.repeat(normal_GSE[:, :1], S, axis=1),
        "uniform": lambda: np.zeros((G, S, E)),
    }[kind]()
    mask_GS = np.ones((G, S), bool)
    if padding:
        mask_GS = rng.random((G, S)) < 0.6
        mask_GS[0] = False
        mask_GS[1] = np.arange(S) // 2 == 2  # two tokens
    return Data(
        logits_GSE=logits_GSE.astype(np.float32),
        mask_GS=mask_GS,
        bias_E=rng.normal(size=E, scale=0.3).astype(np.float32),
        clean_GSE=(logits_GSE + rng.normal(size=(G, S, E)) / E).astype(np.float32),
        token_GS=rng.integers(0, V, (G, S)).astype(np.int32),
        d_gate_GSJ=rng.normal(size=(G, S, num_choices)).astype(np.float32),
        d_probability_GE=rng.normal(size=(G, E)).astype(np.float32),
    )


D_Z = 0.1
KINDS = ("spread", "skewed", "one_expert", "tied", "twins", "uniform")


def draws_of(name: str) -> list[Data]:
    kinds = [kind for kind in KINDS if kind not in NOT_DRAWN.get(name, ())]
    num_choices = BANK[name].num_choices(E)
    return [
        draw(kind, padding, 2 * seed + padding, num_choices)
        for seed, kind in enumerate(kinds)
        for padding in (False, True)
    ]


@functools.cache
def order_V() -> np.ndarray:
    return np.asarray(vocabulary_order(3, jnp.int32(1), V))


@functools.cache
def compiled(router: RouterSettings, capacity: int, *, train: bool = True):
    """The router, and the gradient of the oracle's objective by the logits."""

    order = order_V()

    def run(logits_GSE, data):
        context = RouterContext(
            mask_GS=data["mask_GS"],
            key_G=data["key_G"] if train else None,
            bias_E=data["bias_E"] if router.selection_bias else None,
            clean_logits_GSE=data["clean_GSE"] if router.logit_noise else None,
            token_GS=data["token_GS"],
            order_V=order,
        )
        route = route_of(router)
        assignment = route(logits_GSE, context, router, capacity=capacity)
        kept_GSJ = assignment.slot_of_choice_GSJ >= 0
        gate_GSJ = jnp.where(kept_GSJ, assignment.gate_GSJ, 0)
        value = jnp.sum(gate_GSJ * data["d_gate_GSJ"])
        value += jnp.sum(assignment.sums.probability_GE * data["d_probability_GE"])
        return value + D_Z * jnp.sum(assignment.sums.z_G), assignment

    return jax.jit(jax.grad(run, has_aux=True))


def run_router(router: RouterSettings, data: Data, capacity: int, *, train=True):
    run = compiled(router, capacity, train=train)
    return jax.device_get(run(data.logits_GSE, vars(data)))


def told_of(router: RouterSettings, data: Data, *, train: bool = True) -> list[Told]:
    draw_GS = jax.vmap(lambda key: jax.random.uniform(key, (S,)))(data.key_G)
    return [
        Told(
            mask_S=data.mask_GS[g],
            train=train,
            bias_E=data.bias_E if router.selection_bias else None,
            draw_S=np.asarray(draw_GS[g]),
            clean_logits_SE=data.clean_GSE[g] if router.logit_noise else None,
            id_S=data.token_GS[g],
            order_V=order_V(),
        )
        for g in range(G)
    ]


def compare_with_oracle(router, data, capacity, *, train=True):
    """Everything about one draw; returns how many choices were dropped."""
    d_logits_GSE, assignment = run_router(router, data, capacity, train=train)
    check_assignment(assignment, data.mask_GS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    dropped = 0
    for g, told in enumerate(told_of(router, data, train=train)):
        logits_SE = data.logits_GSE[g].astype(np.float64)
        decision = decide(logits_SE, told, router, capacity)
        slot_SJ = np.full_like(assignment.slot_of_choice_GSJ[g], -1)
        for (s, j), (e, c) in decision.seated.items():
            slot_SJ[s, j] = e * capacity + c
        np.testing.assert_array_equal(assignment.slot_of_choice_GSJ[g], slot_SJ)
        for name, expected in router_sums(logits_SE, told, decision, router).items():
            field = name + ("_GE" if np.ndim(expected) else "_G")
            close(getattr(assignment.sums, field)[g], expected, err_msg=field)

        expected_SE = np.zeros((S, E))
        for s, picked in decision.picked.items():
            held = decision.held(s)
            gates = held_gates(logits_SE[s], picked, held, router)
            for j, gate in gates.items():
                close(assignment.gate_GSJ[g, s, j], gate, err_msg=f"gate {g, s, j}")
            expected_SE[s] = d_logits(
                logits_SE[s],
                (picked, held),
                router,
                d_gates=dict(enumerate(data.d_gate_GSJ[g, s])),
                d_probability_E=data.d_probability_GE[g],
                d_z=D_Z,
            )
        close(d_logits_GSE[g], expected_SE, atol=2e-5, err_msg=f"gradient, group {g}")
        dropped += len(decision.wanted) - len(decision.seated)
    return dropped


@pytest.mark.parametrize("name", BANK)
def test_a_router_decides_weighs_and_sums_as_its_oracle_does(name):
    # Two slots per expert: most draws overflow some expert.
    dropped = sum(compare_with_oracle(BANK[name], data, C) for data in draws_of(name))
    if name != "expert_choice":
        assert dropped > 0, "these draws are meant to drop choices"


@pytest.mark.parametrize("name", ["gshard", "s_base", "hashed"])
def test_outside_training_nothing_is_drawn_or_balanced(name):
    for data in draws_of(name)[:4]:
        compare_with_oracle(BANK[name], data, C, train=False)


def test_one_token_per_group_is_routed_like_any_other():
    # Groups of one token, in place of one group of S: the same experts and gates.
    router = dataclasses.replace(BANK["glam"], group_size=1)
    logits_GSE = draw("spread", False, 0, 2).logits_GSE

    def run(logits_GSE):
        mask_GS = jnp.ones(logits_GSE.shape[:2], bool)
        route = route_of(router)
        return route(
            logits_GSE,
            RouterContext(mask_GS=mask_GS),
            router,
            capacity=mask_GS.shape[1],
        )

    together = jax.jit(run)(logits_GSE)
    alone = jax.jit(run)(logits_GSE.reshape(G * S, 1, E))
    check_assignment(alone, np.ones((G * S, 1), bool))
    np.testing.assert_array_equal(alone.gate_GSJ.reshape(G, S, -1), together.gate_GSJ)
    np.testing.assert_array_equal(  # expert of each choice
        alone.slot_of_choice_GSJ.reshape(G, S, -1), together.slot_of_choice_GSJ // S
    )


# Token choice.


def test_a_softmax_over_the_selected_logits_is_a_renormalized_softmax():
    # Mixtral (arXiv:2401.04088, section 2.1) takes its softmax after the top 2.
    router = dataclasses.replace(TOP2, renormalize="before_drop")
    data = draw("spread", False, 1, 2)
    _, assignment = run_router(router, data, S)
    top_GSK = np.sort(data.logits_GSE.astype(np.float64))[..., ::-1][..., :2]
    exponent_GSK = np.exp(top_GSK)
    np.testing.assert_allclose(
        assignment.gate_GSJ, exponent_GSK / exponent_GSK.sum(-1, keepdims=True), 1e-5
    )


@pytest.mark.fast
def test_a_float32_router_tells_128_and_a_half_from_128():
    # ST-MoE (arXiv:2202.08906, section 3.4): e^½ / (10 + e^½) = 1.6487 / 11.6487.
    logits_GSE = np.full((1, 1, 11), 128.0, np.float32)
    logits_GSE[..., -1] = 128.5
    context = RouterContext(mask_GS=jnp.ones((1, 1), bool))
    route = jax.jit(
        lambda logits: token_choice.route(logits, context, TOP1, capacity=1)
    )
    assignment = route(logits_GSE)
    assert assignment.slot_of_choice_GSJ.item() == 10
    np.testing.assert_allclose(assignment.gate_GSJ.item(), 0.14154, atol=1e-5)
    # bfloat16 has 8 bits: 128.5 becomes 128, and every gate 1/11.
    rounded = logits_GSE.astype(jnp.bfloat16)
    np.testing.assert_allclose(
        jax.nn.softmax(rounded)[0, 0, -1].astype(np.float32), 0.0909, atol=5e-4
    )


@pytest.mark.fast
def test_chances_of_being_chosen_again_follow_the_normal_distribution():
    # E = 4 and LOGIT_NOISE = 1: σ = ¼. The second largest noisy logit is 1.0, and the
    # clean ones lie 1, 0, -1 and -4 deviations above it.
    router = dataclasses.replace(TOP2, logit_noise=1.0)
    clean_GSE = np.array([[[1.25, 1.0, 0.75, 0.0]]], np.float32)
    noisy_GSE = np.array([[[1.4, 1.0, 0.5, 0.1]]], np.float32)
    context = RouterContext(
        mask_GS=jnp.ones((1, 1), bool), clean_logits_GSE=jnp.asarray(clean_GSE)
    )
    route = token_choice.route
    sums = jax.jit(lambda x: route(x, context, router, capacity=1).sums)(noisy_GSE)
    by_hand = [0.841345, 0.5, 0.158655, 0.0000317]
    np.testing.assert_allclose(sums.load_GE[0], by_hand, atol=2e-6)


def test_gradients_of_the_chances_reach_noisy_and_clean_logits():
    router = BANK["v_moe"]
    data = draw("spread", False, 3, 2)
    clean_GSE = data.logits_GSE + 0.1 * data.clean_GSE
    weight_E = data.bias_E.astype(np.float64)

    def load(logits_GSE, clean_GSE):
        context = RouterContext(
            mask_GS=jnp.ones((G, S), bool), clean_logits_GSE=clean_GSE
        )
        route = token_choice.route
        sums = route(logits_GSE, context, router, capacity=C).sums
        return jnp.sum(sums.load_GE * data.bias_E)

    by_noisy, by_clean = jax.jit(jax.grad(load, (0, 1)))(data.logits_GSE, clean_GSE)
    for g in range(G):
        for s in range(S):
            noisy, clean = (
                x[g, s].astype(np.float64) for x in (data.logits_GSE, clean_GSE)
            )
            expected = slope(lambda x, c=clean: weight_E @ chances(x, c, router), noisy)
            np.testing.assert_allclose(by_noisy[g, s], expected, atol=2e-5)
            expected = slope(lambda x, n=noisy: weight_E @ chances(n, x, router), clean)
            np.testing.assert_allclose(by_clean[g, s], expected, atol=2e-5)


# Expert choice with a cap.


def test_a_cap_is_kept_and_beats_cutting_off_what_exceeds_it():
    capped = dataclasses.replace(BANK["expert_choice"], max_experts_per_token=2)
    plain = BANK["expert_choice"]
    for seed in range(4):
        # 8 experts · 2 slots are all that 8 tokens · 2 choices can fill.
        data = draw(("skewed", "spread")[seed % 2], False, seed, 2)
        _, assignment = run_router(capped, data, C)
        check_assignment(assignment, data.mask_GS)
        held_GS = np.sum(assignment.slot_of_choice_GSJ >= 0, axis=-1)
        assert held_GS.max() <= 2
        assert assignment.sums.kept_GE.max() <= C

        kept = np.sum(
            np.where(assignment.slot_of_choice_GSJ >= 0, assignment.gate_GSJ, 0.0)
        )
        cut_off, above = 0.0, 0
        for g, told in enumerate(told_of(plain, data)):
            logits_SE = data.logits_GSE[g].astype(np.float64)
            decision = decide(logits_SE, told, plain, C)
            for s, picked in decision.picked.items():  # the most probable first
                gates = held_gates(
                    logits_SE[s], picked, dict(enumerate(picked[:2])), plain
                )
                cut_off += sum(gates.values())
                above += max(len(picked) - 2, 0)
        assert above > 0, "the cap is meant to bind"
        assert kept > cut_off


# Sinkhorn.


def test_sinkhorn_leaves_columns_even_and_rows_nearly():
    rng = np.random.default_rng(0)
    logits_SE = rng.normal(size=(S, E), scale=2.0) + np.linspace(2, -2, E)
    mask_S = np.arange(S) != 3
    run = jax.jit(functools.partial(balanced, iterations=30))
    scaled_SE = np.exp(run(logits_SE.astype(np.float32), mask_S))
    real_SE = scaled_SE[mask_S]
    np.testing.assert_allclose(real_SE.sum(axis=0), 7 / E, rtol=1e-5)
    np.testing.assert_allclose(real_SE.sum(axis=1), 1, rtol=0.02)
    np.testing.assert_allclose(real_SE, sinkhorn(logits_SE[mask_S], 30), rtol=1e-4)


# Hashing.


@pytest.mark.fast
def test_the_hash_table_gives_every_expert_as_many_ids_and_every_layer_its_own():
    # 50 ids over 8 experts: six get 6, and two get 7.
    tables = [
        np.asarray(vocabulary_order(0, jnp.int32(layer), V)) % E for layer in range(3)
    ]
    for table in tables:
        assert sorted(np.bincount(table, minlength=E)) == [6] * 6 + [7] * 2
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(tables[one] == tables[other]) < 0.5
    again = np.asarray(jax.jit(vocabulary_order, static_argnums=2)(0, jnp.int32(2), V))
    np.testing.assert_array_equal(again % E, tables[2])
    assert np.any(np.asarray(vocabulary_order(1, jnp.int32(2), V)) % E != tables[2])


def test_a_hash_router_is_the_same_in_training_and_after_it():
    data = draw("uniform", True, 0, 2)
    runs = [run_router(BANK["hashed"], data, S, train=t)[1] for t in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *runs)
    assert np.all(runs[0].gate_GSJ == 0.5)
    assert np.all(runs[0].sums.probability_GE == 0)


# Floors of the losses.


def test_uniform_logits_give_every_balance_loss_its_floor():
    # Ties send all first choices to expert 0; with P even, E·Σ f·(1/E) = Σ f = 1.
    for name in ("switch", "glam", "deepseek_v3", "expert_choice"):
        data = draw("uniform", True, 5, BANK[name].num_choices(E))
        data.bias_E *= 0
        _, assignment = run_router(BANK[name], data, C)
        sums = jax.tree.map(lambda x: jnp.asarray(x)[None], assignment.sums)
        for scope in ("group", "sequence", "global"):
            for counts in ("first", "all"):
                settings = LossSettings(balance_scope=scope, balance_counts=counts)
                totals = losses.router_totals(sums, G, settings)
                balance = losses.balance_P(totals, settings)
                # Groups of padding alone count nothing, and have no tokens to weigh.
                np.testing.assert_allclose(balance, 1, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            losses.squared_variation(totals.probability_PE), 0, 1e-10
        )


@pytest.mark.fast
def test_a_capacity_of_no_slots_is_refused():
    # 8 tokens · 0.5 / 8 experts = ½ a slot, rounded down.
    router = dataclasses.replace(
        TOP1, capacity_factor=0.5, min_capacity=0, capacity_rounding="floor"
    )
    model = ModelSettings(
        vocab_size=V,
        num_layers=2,
        model_dim=8,
        num_heads=1,
        head_dim=2,
        mlp_dim=4,
        num_experts=E,
    )
    rest = ExecutionSettings(), LossSettings(), TrainSettings(batch_size=1)
    found = problems(model, router, *rest, length=S)
    assert [line for line in found if "leaves every expert without a slot" in line]
    router = dataclasses.replace(router, min_capacity=1)
    assert not problems(model, router, *rest, length=S)


@pytest.mark.fast
@pytest.mark.parametrize("scores", ["sigmoid", "sqrt_softplus"])
def test_scores_of_almost_zero_have_finite_gradients(scores):
    # σ(-60) is 1e-26: sums of such scores are bounded, and so must be their gradient.
    settings = dataclasses.replace(
        TOP2, scores=scores, renormalize="before_drop", group_size=4
    )
    logits_GSE = jnp.full((1, 4, 8), -60.0).at[0, 0].set(-110.0)

    def objective(logits_GSE):
        mask_GS = jnp.arange(4)[None] < 3  # the last token is padding
        route = route_of(settings)
        found = route(logits_GSE, RouterContext(mask_GS), settings, capacity=4)
        return jnp.sum(found.gate_GSJ) + jnp.sum(found.sums.probability_GE**2)

    assert np.all(np.isfinite(jax.jit(jax.grad(objective))(logits_GSE)))
