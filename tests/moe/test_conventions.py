"""The numbers of `docs/conventions.md` and `docs/routers.md`, and their gin lines."""

import dataclasses
import functools
import math
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.config import reader
from launch.records import loads
from moe import architecture
from moe.dispatch.room import room_for
from moe.model import parameters, sparse
from moe.routing import token_choice
from moe.routing.assignment import RouterContext, RouterSums
from moe.routing.capacity import capacity
from moe.routing.logits import group_keys
from moe.settings import (
    DenseSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
    SparseSettings,
)
from moe.training import losses
from moe.training.ledger import RouterTotals
from moe.training.losses import Sums
from moe.training.selection_bias import move_selection_biases

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("conventions.md", "routers.md")
THEIR_KNOBS = {"LOSS_NORMALIZING_FACTOR"}  # of other codebases
ANCHORS = ("Mesh-TensorFlow", "Flaxformer", "Praxis", "V-MoE", "MaxText", "Megatron-LM")


def recipes(page: str) -> dict[str, str]:
    """The gin blocks of a page, by the nearest heading above each."""
    found, heading, lines = {}, "", None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if lines is not None:
                assert heading not in found, f"{page}: two gin blocks under {heading}"
                found[heading] = "\n".join(lines) + "\n"
            lines = [] if line == "```gin" else None
        elif lines is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


@functools.cache
def resolved(page: str, heading: str, folder: Path) -> reader.ResolvedConfig:
    """A block, read on top of the smallest run."""
    path = folder / (re.sub(r"\W+", "_", heading) + ".gin")
    path.write_text(recipes(page)[heading], encoding="utf-8")
    return reader.read(["configs/runs/tiny.gin", str(path)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gin")


@pytest.fixture(scope="module")
def followed(folder):
    """Settings that follow an anchor, by its name."""
    return {
        name: resolved("conventions.md", f"To follow {name}", folder).settings
        for name in ANCHORS
    }


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES)
def test_every_gin_block_of_a_page_resolves_and_is_a_gin_block(page, folder):
    blocks = recipes(page)
    assert len(blocks) >= 6
    for heading in blocks:
        resolved(page, heading, folder)
    fences = re.findall(r"^```(\w*)$", (DOCS / page).read_text(), re.MULTILINE)
    assert {name for name in fences if name} <= {"gin", "python"}
    assert fences.count("gin") == len(blocks)


@pytest.mark.fast
def test_every_knob_of_the_pages_exists():
    base = (DOCS.parent / "configs/base.gin").read_text()
    knobs = set(re.findall(r"^([A-Z][A-Z0-9_]+) =", base, re.MULTILINE))
    names = {k for k in knobs if "_" in k}
    for page in PAGES:
        written = set(
            re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)", (DOCS / page).read_text())
        )
        assert written, page
        assert written <= names | THEIR_KNOBS, written - names


# ----------------------------------------------------------------------- capacity


@pytest.mark.fast
@pytest.mark.parametrize(
    ("anchor", "slots_of_10", "slots_of_22"),
    [
        # E = 4, K = 2, factor 1.25. Without K: 10·1.25/4 = 3.125, 22·1.25/4 = 6.875.
        # With K: 6.25 and 13.75.
        ("Mesh-TensorFlow", 4, 6),  # floor 3, at least 4; floor 6
        ("Flaxformer", 4, 7),  # nearest 3, at least 4; nearest 7
        ("Praxis", 4, 8),  # floor 3, up to 4; floor 6, up to 8
        ("V-MoE", 8, 16),  # ceil 7, up to 8; ceil 14, up to 16
        (
            "MaxText",
            6,
            13,
        ),  # ⌈20/4⌉·1.25 = 6.25, floor 6; ⌈44/4⌉·1.25 = 13.75, floor 13
        ("Megatron-LM", 7, 14),  # ceil 7; ceil 14
    ],
)
def test_capacity_as_each_anchor_rounds_it(followed, anchor, slots_of_10, slots_of_22):
    for S, slots in ((10, slots_of_10), (22, slots_of_22)):
        router = dataclasses.replace(
            followed[anchor].router,
            num_selected=2,
            group_size=S,
            capacity_factor=1.25,
        )
        assert capacity(router, 4, train=True) == slots


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "num_experts", "slots"),
    [
        # The default: 10·2·1.25/4 = 6.25, ceil 7; 22·2·1.25/4 = 13.75, ceil 14.
        ({"group_size": 10, "num_selected": 2}, 4, 7),
        ({"group_size": 22, "num_selected": 2}, 4, 14),
        # Halves go to the even number: 18/4 = 4.5 is 4, 22/4 = 5.5 is 6.
        ({"group_size": 18, "capacity_rounding": "half_even"}, 4, 4),
        ({"group_size": 22, "capacity_rounding": "half_even"}, 4, 6),
        # At least 4: 8/4 = 2.
        ({"group_size": 8}, 4, 4),
        # At most S, also for the minimum: 3/4 is 1, at least 4, at most 3.
        ({"group_size": 3}, 4, 3),
        # At most S: 4·2·2/2 = 8.
        ({"group_size": 4, "num_selected": 2, "capacity_factor": 2.0}, 2, 4),
        # Exact: 100·1.1/10 is 11; in floats it is a little more, and its ceil 12.
        ({"group_size": 100, "capacity_factor": 1.1}, 10, 11),
        # The multiple comes after the minimum and before S: 7 up to 8; 5 up to 8, to 5.
        ({"group_size": 28, "capacity_multiple": 4}, 4, 8),
        ({"group_size": 5, "capacity_factor": 4.0, "capacity_multiple": 4}, 4, 5),
        # Where K does not divide evenly MaxText has ⌈18/4⌉·1.25 = 6.25, 6 slots; here
        # 18·1.25/4 = 5.625, floor 5.
        (
            {
                "group_size": 9,
                "num_selected": 2,
                "capacity_factor": 1.25,
                "capacity_rounding": "floor",
            },
            4,
            5,
        ),
        # GLaM's 2 S/E: factor 2 without K is factor 1 with it. 2·64/8 = 16.
        (
            {
                "group_size": 64,
                "num_selected": 2,
                "capacity_factor": 2.0,
                "capacity_counts_choices": False,
            },
            8,
            16,
        ),
        ({"group_size": 64, "num_selected": 2}, 8, 16),
        # A factor of 0 drops nothing: S slots.
        ({"group_size": 64, "capacity_factor": 0.0}, 8, 64),
        # One token at a time, as in generation: one slot per expert.
        ({"group_size": 1, "num_selected": 2}, 8, 1),
    ],
)
def test_capacity_as_worked_out_by_hand(given, num_experts, slots):
    given = {"capacity_factor": 1.0, **given}
    if given["group_size"] in (10, 22) and "capacity_rounding" not in given:
        given["capacity_factor"] = 1.25
    assert capacity(RouterSettings(**given), num_experts, train=True) == slots


@pytest.mark.fast
def test_a_float_product_would_round_up():
    assert math.ceil(100 * 1.1 / 10) == 12


@pytest.mark.fast
def test_evaluation_drops_nothing_unless_told_to():
    router = RouterSettings(group_size=64)
    assert capacity(router, 8, train=True) == 10  # 64·1.25/8
    assert capacity(router, 8, train=False) == 64
    router = dataclasses.replace(router, eval_capacity_factor=2.0)
    assert capacity(router, 8, train=False) == 16  # 64·2/8


@pytest.mark.fast
@pytest.mark.parametrize(
    ("num_experts", "percent"), [(64, 0.1), (256, 2.3), (1024, 10.3), (2048, 3.8)]
)
def test_drops_of_a_router_without_preferences(num_experts, percent):
    # 4,096 tokens, K = 1, factor 1.25: an expert's load is Poisson with mean 4,096/E;
    # what is dropped is the mean of max(load − C, 0), over the mean load. With 2,048
    # experts the mean load is 2 and the least capacity, 4, is a factor of 2.
    router = RouterSettings(group_size=4096)
    C, mean = capacity(router, num_experts, train=True), 4096 / num_experts
    dropped = sum(
        (load - C) * math.exp(load * math.log(mean) - mean - math.lgamma(load + 1))
        for load in range(C + 1, C + 400)
    )
    assert round(100 * dropped / mean, 1) == percent


@pytest.mark.fast
def test_row_budget_as_worked_out_by_hand():
    # 2,048 tokens on each of 4 devices, K = 2, E = 8: an even share is 4,096 rows, the
    # budget 1.5 · 4,096 = 6,144. At worst all 4 · 2,048 tokens choose both experts of
    # one device: 16,384 rows, in ⌈16,384 / 6,144⌉ = 3 rounds.
    router = RouterSettings(num_selected=2, capacity_factor=0.0)
    room = room_for(router, 8, 2048, 4, "cpu", row_budget=1.5, train=True)
    assert (room.num_rows, room.num_rounds) == (6144, 3)


# ------------------------------------------------------------------------ routers


def _log(*rows):
    return np.log(np.array(rows, np.float32))


def _scores(*values):
    """Logits whose sigmoids are the given scores."""
    p = np.array(values)
    return np.log(p / (1 - p)).astype(np.float32)[None]


# Token 0 wants experts 1 and 2, token 1 experts 0 and 1: one slot each, so token 1's
# second choice is dropped.
CROWDED = _log([0.2, 0.5, 0.3], [0.5, 0.3, 0.2])
# Tokens want experts (0, 1), (0, 1), (1, 0), the last one most surely.
QUEUE = _log([0.6, 0.4], [0.7, 0.3], [0.1, 0.9])
# Three tokens choose experts 0 then 1, one chooses 1 then 0.
UNEVEN = _log(*[[0.55, 0.25, 0.1, 0.1]] * 3, [0.35, 0.45, 0.1, 0.1])
# Each expert is once a first choice and once a second one.
EVEN = _log(
    [0.4, 0.3, 0.2, 0.1],
    [0.1, 0.4, 0.3, 0.2],
    [0.2, 0.1, 0.4, 0.3],
    [0.3, 0.2, 0.1, 0.4],
)
CRUSH = _log([0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.8, 0.15, 0.05])
SIGMOID = _scores(0.8, 0.6, 0.5, 0.4)
BIAS = np.array([0.0, -0.4, 0.0, 0.2], np.float32)
DEEPSEEK = {"scores": "sigmoid", "num_selected": 2, "renormalize": "before_drop"}
WISHES = _log([0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.4, 0.35, 0.25], [0.1, 0.2, 0.7])
LEANING = np.array([[4, 0], [3, 0], [2, 0], [1, 0]], np.float32)
PADDED = _log([0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5])
LN_3 = np.array([[0, 0], [math.log(3), 0], [0, 0], [0, 0]], np.float32)
TOP_2 = {"num_selected": 2}
# name: family, settings, C, logits of each group, and what else the router is told
CASES = {
    "no": ("token_choice", TOP_2, 1, [CROWDED], {}),
    "before_drop": (
        "token_choice",
        TOP_2 | {"renormalize": "before_drop"},
        1,
        [CROWDED],
        {},
    ),
    "after_drop": (
        "token_choice",
        TOP_2 | {"renormalize": "after_drop"},
        1,
        [CROWDED],
        {},
    ),
    "token_major": ("token_choice", TOP_2, 2, [QUEUE], {}),
    "choice_major": (
        "token_choice",
        TOP_2 | {"slot_order": "choice_major"},
        2,
        [QUEUE],
        {},
    ),
    "batch_priority": (
        "token_choice",
        TOP_2 | {"slot_order": "batch_priority"},
        2,
        [QUEUE],
        {},
    ),
    "spill": ("token_choice", {"overflow": "spill"}, 1, [CRUSH], {}),
    "even": ("token_choice", TOP_2, 4, [EVEN, UNEVEN], {}),
    "padded": (
        "token_choice",
        {},
        4,
        [PADDED, LN_3],
        {"mask": [[True, True, False, False], [True, True, False, False]]},
    ),
    "random": (
        "token_choice",
        TOP_2 | {"second_policy": "random", "renormalize": "before_drop"},
        4000,
        [np.tile(_log([0.7, 0.3]), (4000, 1))],
        {"key": 0},
    ),
    "deepseek": (
        "token_choice",
        DEEPSEEK | {"gate_scale": 2.5},
        1,
        [SIGMOID],
        {"bias": BIAS},
    ),
    "best_group": (
        "token_choice",
        DEEPSEEK | {"num_expert_groups": 2},
        1,
        [SIGMOID],
        {"bias": BIAS},
    ),
    "best_pair": (
        "token_choice",
        DEEPSEEK | {"num_expert_groups": 2, "group_score": "top2_sum"},
        1,
        [SIGMOID],
        {"bias": BIAS},
    ),
    "prototypes": (
        "prototypes",
        {"num_prototypes": 2},
        1,
        [np.log(np.array([[3, 1, 1, 4]], np.float32))],
        {},
    ),
    "expert_choice": (
        "expert_choice",
        {},
        2,
        [WISHES, WISHES],
        {"mask": [[True] * 4, [True, False, False, False]]},
    ),
    "capped": ("expert_choice", {"max_experts_per_token": 1}, 1, [WISHES], {}),
    "hashed": (
        "hashed",
        TOP_2,
        3,
        [np.zeros((3, 4), np.float32)],
        {"ids": [0, 1, 2], "order": [2, 0, 1]},
    ),
    "sinkhorn": ("sinkhorn", {}, 4, [LEANING], {"key": 0}),
    "sinkhorn_outside_training": ("sinkhorn", {}, 4, [LEANING], {}),
}

# Beside experts and gates; what is not looked at is not compiled.
LOOKED_AT = {
    "spill": ("spilled", "chosen"),
    "even": ("chosen", "first", "all"),
    "padded": ("padding", "first", "z"),
    "random": ("chosen",),
    "deepseek": ("all", "probability"),
    "prototypes": ("probability",),
    "expert_choice": ("kept",),
}


@functools.cache
def routed():
    """What the tests look at of every case; compiled together to save time."""

    def one(case, logits_GSE, looked_at):
        family, given, slots, _, told = case
        mask_GS = jnp.array(told.get("mask", np.ones(logits_GSE.shape[:2], bool)))
        context = RouterContext(
            mask_GS=mask_GS,
            key_G=jax.random.split(jax.random.key(0), 1) if "key" in told else None,
            bias_E=told.get("bias"),
            token_GS=jnp.array(told["ids"])[None] if "ids" in told else None,
            order_V=jnp.array(told["order"]) if "order" in told else None,
        )
        settings = RouterSettings(family=family, **given)
        assignment = sparse.route_of(settings)(
            logits_GSE, context, settings, capacity=slots
        )
        sums, slot_GSJ = assignment.sums, assignment.slot_of_choice_GSJ
        everything = {
            "chosen": sums.chosen_GE,
            "kept": sums.kept_GE,
            "spilled": sums.spilled_GE,
            "padding": sums.padding_G,
            "probability": sums.probability_GE,
            "z": sums.z_G / sums.tokens_G,
            "first": losses.balance(sums.first_GE, sums.probability_GE),
            "all": losses.balance(sums.chosen_GE, sums.probability_GE),
        }
        return {
            "experts": jnp.where(slot_GSJ < 0, -1, slot_GSJ // slots),
            "gates": assignment.gate_GSJ,
        } | {key: everything[key] for key in looked_at}

    run = jax.jit(
        lambda logits: {
            name: one(CASES[name], logits_GSE, LOOKED_AT.get(name, ()))
            for name, logits_GSE in logits.items()
        }
    )
    return jax.device_get(run({name: np.stack(c[3]) for name, c in CASES.items()}))


def experts_of(name: str, group: int = 0) -> list[list[int]]:
    """The expert of each choice, token by token; -1 where it was dropped."""
    return routed()[name]["experts"][group].tolist()


def gates_of(name: str) -> np.ndarray:
    return routed()[name]["gates"][0]


@pytest.mark.fast
def test_sums_of_small_scores_divide_as_those_of_large_ones_do():
    context = RouterContext(mask_GS=jnp.ones((1, 1), bool))
    settings = RouterSettings(**DEEPSEEK, group_size=1)
    route = jax.jit(
        lambda logits: token_choice.route(logits, context, settings, capacity=1)
    )
    found = route(np.array([[[-20.0, -20.0, -90.0]]], np.float32))
    np.testing.assert_allclose(found.gate_GSJ[0, 0], [0.5, 0.5], rtol=1e-6)
    score = math.exp(-20)
    assert round(score / (2 * score + 1e-6), 4) == 0.0021  # LFM2


def test_gates_are_divided_before_or_after_the_drop_or_not_at_all():
    for name in ("no", "before_drop", "after_drop"):
        assert experts_of(name) == [[1, 2], [0, -1]]
    # p = (0.5, 0.3) of both tokens' choices; 0.5 / 0.8 = 0.625. Token 1 lost its second
    # choice: 0.5 / 0.5 = 1. The gate of a dropped choice multiplies nothing.
    np.testing.assert_allclose(gates_of("no"), [[0.5, 0.3], [0.5, 0.3]], rtol=1e-5)
    np.testing.assert_allclose(gates_of("before_drop"), [[0.625, 0.375]] * 2, rtol=1e-5)
    np.testing.assert_allclose(gates_of("after_drop")[0], [0.625, 0.375], rtol=1e-5)
    np.testing.assert_allclose(gates_of("after_drop")[1, 0], 1.0, rtol=1e-5)
    # A softmax over the selected logits: e^ln 0.5 / (e^ln 0.5 + e^ln 0.3).
    selected = np.exp([math.log(0.5), math.log(0.3)])
    np.testing.assert_allclose(
        gates_of("before_drop")[0], selected / selected.sum(), rtol=1e-5
    )


def test_slots_go_token_by_token_choice_by_choice_or_to_the_surest():
    # Two slots per expert. Tokens 0 and 1 take all of them.
    assert experts_of("token_major") == [[0, 1], [0, 1], [-1, -1]]
    # First choices 0, 0, 1; then token 0's second takes the last slot of expert 1.
    assert experts_of("choice_major") == [[0, 1], [0, -1], [1, -1]]
    # In the order 2, 1, 0 (gates 0.9, 0.7, 0.6): first choices 1, 0, 0; of the second
    # ones token 1's takes the last slot of expert 1.
    assert experts_of("batch_priority") == [[0, -1], [0, 1], [1, -1]]


def test_a_choice_spills_once_to_the_next_best_expert():
    # All want expert 0, which has one slot. Token 1 takes the only slot of expert 1
    # with its gate there, 0.2; token 2 then finds expert 1 full too.
    assert experts_of("spill") == [[0], [1], [-1]]
    np.testing.assert_allclose(gates_of("spill")[:2, 0], [0.6, 0.2], rtol=1e-5)
    assert routed()["spill"]["spilled"].tolist() == [[0, 1, 0]]
    assert routed()["spill"]["chosen"].tolist() == [[3, 0, 0]]


def test_the_random_second_expert_is_kept_with_twice_its_gate():
    chosen_E = routed()["random"]["chosen"][0]
    # 2 · 0.3 = 0.6 of 4,000, give or take 4 · √(0.6 · 0.4 / 4,000) = 0.031.
    assert chosen_E[0] == 4000
    assert abs(chosen_E[1] / 4000 - 0.6) < 0.031
    # The first gate is 0.7 whether or not the second expert is visited.
    np.testing.assert_allclose(gates_of("random")[:, 0], 0.7, rtol=1e-5)


def test_a_bias_chooses_and_does_not_weigh():
    # Scores 0.8, 0.6, 0.5, 0.4 plus bias are 0.8, 0.2, 0.5, 0.6: experts 0 and 3, with
    # gates 0.8 / 1.2 · 2.5 and 0.4 / 1.2 · 2.5.
    assert experts_of("deepseek") == [[0, 3]]
    np.testing.assert_allclose(gates_of("deepseek"), [[5 / 3, 5 / 6]], rtol=1e-5)


def test_the_group_of_the_best_expert_or_of_the_best_pair():
    # Biased scores of the groups are (0.8, 0.2) and (0.5, 0.6): the best expert is in
    # the first, the better sum, 1.1 against 1.0, in the second.
    assert experts_of("best_group") == [[0, 1]]
    assert experts_of("best_pair") == [[3, 2]]


def test_the_bias_steps_against_the_load():
    model = ModelSettings(8, 1, 8, 1, 2, 8, moe_every=1, num_experts=4)
    layers = architecture.describe(model, RouterSettings(selection_bias=True))
    bias_PE = np.zeros((1, 4), np.float32)
    params = {"decoder": {"layers": [[{"sparse": {"selection_bias": bias_PE}}]]}}
    router = types.SimpleNamespace(chosen_PE=np.array([[6, 2, 4, 4]]))  # mean 4
    moved = move_selection_biases(params, (router,), layers)
    (((block,),),) = moved["decoder"].values()
    np.testing.assert_allclose(
        block["sparse"]["selection_bias"], [[-1e-3, 1e-3, 0, 0]], rtol=1e-6
    )
    assert not bias_PE.any(), "what was given stays as it was"


def test_prototypes_have_a_softmax_each():
    # Logits ln 3, 0 | 0, ln 4: 3/4 for expert 0 of the first two, 4/5 for expert 3.
    assert experts_of("prototypes") == [[0, 3]]
    np.testing.assert_allclose(gates_of("prototypes"), [[0.75, 0.8]], rtol=1e-5)
    probability_E = routed()["prototypes"]["probability"][0]
    np.testing.assert_allclose(probability_E.sum(), 2.0, rtol=1e-6)


def test_experts_choose_tokens():
    # Each of 3 experts takes 2 of 4 tokens, the surest: expert 0 tokens 0 and 1, expert
    # 1 tokens 1 and 2, expert 2 tokens 3 and 2. Token 0 has one expert, token 1 two.
    chosen = [sorted(e for e in row if e >= 0) for row in experts_of("expert_choice")]
    assert chosen == [[0], [0, 1], [1, 2], [2]]
    assert routed()["expert_choice"]["kept"][0].tolist() == [2, 2, 2]
    # With a cap of 1 and one slot each: experts 0, 1 and 2 take tokens 0, 1 and 3.
    assert experts_of("capped") == [[0], [1], [-1], [2]]
    # A token that is alone in its group, as in generation, is taken by every expert.
    assert sorted(experts_of("expert_choice", 1)[0]) == [0, 1, 2]


def test_a_hash_looks_at_the_id_alone():
    # Places 2, 0, 1 in the vocabulary's order: experts p and p + 1.
    assert experts_of("hashed") == [[2, 3], [0, 1], [1, 2]]
    np.testing.assert_array_equal(gates_of("hashed"), 0.5)


def test_sinkhorn_balances_in_training_only():
    # All prefer expert 0, by 4, 3, 2 and 1. Two each: the two with the least preference
    # go to expert 1, with their plain gates 1/(1 + e²) and 1/(1 + e).
    assert experts_of("sinkhorn") == [[0], [0], [1], [1]]
    np.testing.assert_allclose(
        gates_of("sinkhorn")[2:, 0], [1 / (1 + math.e**2), 1 / (1 + math.e)], rtol=1e-5
    )
    assert experts_of("sinkhorn_outside_training") == [[0]] * 4


# ------------------------------------------------------------------------- losses


def totals(first_PE, probability_PE, **given) -> RouterTotals:
    """Totals of P layers in which all that is not given is 0 or follows."""
    zero_P = np.zeros(len(first_PE), np.float32)
    values = {
        field.name: np.zeros_like(first_PE) if "_PE" in field.name else zero_P
        for field in dataclasses.fields(RouterTotals)
    }
    values |= {
        "tokens_P": np.ones(len(first_PE), np.float32),
        "first_PE": first_PE,
        "chosen_PE": first_PE,
        "probability_PE": probability_PE,
    }
    return RouterTotals(**values | given)


def test_balance_of_first_or_all_choices():
    first_G, all_G = routed()["even"]["first"], routed()["even"]["all"]
    # Uniform: 4 · 4 · ¼ · ¼ = 1, both ways. Fractions of tokens, which are ½ each and
    # sum to K, would give 4 · 4 · ½ · ¼ = 2 = K.
    np.testing.assert_allclose([first_G[0], all_G[0]], 1.0, rtol=1e-5)
    assert 4 * np.sum(routed()["even"]["chosen"][0] / 4 * 0.25) == 2.0
    # P = (0.5, 0.3, 0.1, 0.1). First choices (¾, ¼, 0, 0): 4 · (0.375 + 0.075) = 1.8.
    # All choices (½, ½, 0, 0): 4 · (0.25 + 0.15) = 1.6; times K it is 3.2.
    np.testing.assert_allclose([first_G[1], all_G[1]], [1.8, 1.6], rtol=1e-5)


def test_padding_takes_no_slot_and_counts_nowhere():
    assert experts_of("padded") == [[0], [1], [-1], [-1]]
    assert routed()["padded"]["padding"].tolist() == [2, 2]
    # Two real tokens of four, balanced: 1. Divided by 4 instead of 2, f and P would be
    # ¼ each, and 2 · 2 · ¼ · ¼ = ¼.
    np.testing.assert_allclose(routed()["padded"]["first"][0], 1.0, rtol=1e-5)
    assert 2 * 2 * 0.25 * 0.25 == 0.25


def test_z_loss_is_the_mean_squared_logsumexp_of_real_tokens():
    # Logits (0, 0): ln 2 squared is 0.4805; (ln 3, 0): ln 4 squared is 1.9218. Their
    # mean is 1.2011. With a padding token whose logits are 0 it would be 0.9609.
    np.testing.assert_allclose(routed()["padded"]["z"][1], 1.2011, atol=5e-5)
    squares = [math.log(2) ** 2, math.log(4) ** 2, math.log(2) ** 2]
    np.testing.assert_allclose(np.mean(squares), 0.9609, atol=5e-5)


def test_loss_under_a_bias_counts_the_choices_that_were_made():
    # Experts 0 and 3 were chosen; P is the scores over their sum 2.3: 4 · (½ · 0.8 +
    # ½ · 0.4) / 2.3 = 1.0435. Without the bias 0 and 1: 4 · 0.7 / 2.3 = 1.2174.
    np.testing.assert_allclose(routed()["deepseek"]["all"][0], 2.4 / 2.3, rtol=1e-5)
    P_E = routed()["deepseek"]["probability"][0]
    np.testing.assert_allclose(4 * np.sum(P_E * [0.5, 0.5, 0, 0]), 1.2174, atol=5e-5)


@functools.cache
def formed():
    """Losses of sums that are given; compiled together to save time."""
    # Two groups of two tokens, one sequence: f = (1, 0) with P = (0.8, 0.2), and f =
    # (0, 1) with P = (0.2, 0.8).
    count_PGE = jnp.array([[[2, 0], [0, 2]]])
    group_sums = {
        field.name: jnp.zeros((1, 2, 2) if "_GE" in field.name else (1, 2))
        for field in dataclasses.fields(RouterSums)
        if field.name != "trace"
    } | {
        "tokens_G": jnp.full((1, 2), 2),
        "first_GE": count_PGE,
        "chosen_GE": count_PGE,
        "probability_GE": jnp.array([[[1.6, 0.4], [0.4, 1.6]]]),
    }
    # Two layers with balances 1 and 1.4 and z-losses 2 and 4.
    two_layers = totals(
        np.ones((2, 2), np.float32),
        np.ones((2, 2), np.float32),
        z_P=np.array([2, 4], np.float32),
        local_balance_P=np.array([1, 1.4], np.float32),
    )
    zero = np.zeros(())
    everything = LossSettings(importance_weight=1.0, load_weight=1.0)
    settings = {"everything": everything} | {
        name: LossSettings(balance_weight=0.01, router_z_weight=0.001, over_layers=name)
        for name in ("sum", "mean")
    }
    context = RouterContext(
        mask_GS=np.ones((1, 1), bool),
        clean_logits_GSE=np.array([[[1.25, 1.0, 0.75, -9.0]]]),
    )

    @jax.jit
    def run(group_sums, two_layers, noisy_GSE, sum_PE):
        scopes = {
            scope: LossSettings(balance_scope=scope)
            for scope in ("group", "sequence", "global")
        }
        sums = RouterSums(**group_sums)
        return {
            "scopes": {
                scope: losses.balance_P(losses.router_totals(sums, 1, given), given)[0]
                for scope, given in scopes.items()
            },
            "totals": {
                name: losses.total(Sums(*[zero] * 5, (two_layers,)), given)
                for name, given in settings.items()
            },
            "unevenness": losses.squared_variation(sum_PE),
            "chances": token_choice.chances(
                noisy_GSE, context, RouterSettings(logit_noise=1.0)
            ),
        }

    return jax.device_get(
        run(
            group_sums,
            two_layers,
            np.array([[[0.5, 1.0, 0.2, -9.0]]]),
            np.array([[3.0, 1.0], [2.0, 2.0]]),
        )
    )


def test_balance_of_groups_of_sequences_and_of_the_batch():
    # 2 · 0.8 = 1.6 in each group; together f = P = (½, ½), which gives 1.
    assert formed()["scopes"] == pytest.approx(
        {"group": 1.6, "sequence": 1.0, "global": 1.0}, rel=1e-5
    )


def test_losses_are_summed_or_averaged_over_layers():
    summed, metrics = formed()["totals"]["sum"]
    assert summed == pytest.approx(0.01 * (1 + 1.4) + 0.001 * (2 + 4))  # 0.030
    averaged, _ = formed()["totals"]["mean"]
    assert averaged == pytest.approx(0.01 * 1.2 + 0.001 * 3)  # 0.015
    assert metrics["loss/balance"] == pytest.approx(1.2)


def test_importance_and_load_as_worked_out_by_hand():
    # Sums 3 and 1: variance 1 over mean² 4. Even sums: 0.
    np.testing.assert_allclose(formed()["unevenness"], [0.25, 0.0])
    # E = 4, so σ = ¼. The threshold is the best noisy logit, 1; clean logits 1.25, 1
    # and 0.75 are 1σ above, at and 1σ below it: Φ(1) = 0.8413, ½, Φ(-1) = 0.1587.
    np.testing.assert_allclose(
        formed()["chances"][0, 0], [0.8413, 0.5, 0.1587, 0], atol=5e-5
    )


def test_every_metric_of_the_pages_exists():
    _, metrics = formed()["totals"]["everything"]
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        written = set(re.findall(r"`((?:router|ledger|loss)/\w+)", text))
        assert written, page
        known = {*metrics, *loads.summary(np.full((2, 4), 0.25))}
        assert written <= known, written - known


# --------------------------------------------------------------- inputs and weights


@functools.cache
def initial():
    """Mean squared logits with and without jitter, and the router's deviation."""
    router = RouterSettings(jitter=0.01, group_size=8)
    settings = SparseSettings(4, DenseSettings(1, "gelu"), router)

    @jax.jit
    def run(key):
        # Inputs of 2 through an identity.
        routing, x_GSM = {"router": jnp.eye(4)}, jnp.full((1, 8, 4), 2.0)
        mask_GS, id_GS = jnp.ones((1, 8), bool), jnp.zeros((1, 8), jnp.int32)
        given = routing, x_GSM, mask_GS, id_GS
        squares = [
            sparse.route(*given, keys, 0, settings).sums.square_G
            for keys in (group_keys(key, jnp.arange(1)), None)
        ]
        wide = dataclasses.replace(settings, num_experts=64)
        spec = {"router": sparse.specs(wide, 256)["router"]}
        router_ME = parameters.draw(spec, key, "float32")["router"]
        return squares[0][0] / 8, squares[1][0] / 8, jnp.std(router_ME)

    return jax.device_get(run(jax.random.key(0)))


def test_jitter_multiplies_the_input_in_training_only():
    # Logits of 2 · U(0.99, 1.01): their mean square lies between 1.98² and 2.02², and
    # is 4 by accident only.
    trained, evaluated, _ = initial()
    assert 1.98**2 < trained < 2.02**2
    assert abs(trained - 4) > 1e-5
    assert evaluated == 4


def test_router_weights_start_with_a_deviation_of_0_02():
    # 16,384 draws: four standard errors are 2.2 %.
    np.testing.assert_allclose(initial()[2], 0.02, rtol=0.025)


# ---------------------------------------------------------------- to follow an anchor


@pytest.mark.fast
def test_converted_loss_weights(followed):
    loss = {name: settings.loss for name, settings in followed.items()}
    K = {name: settings.router.num_selected for name, settings in followed.items()}
    # Flaxformer and MaxText count fractions of tokens, which sum to K.
    assert loss["Flaxformer"].balance_weight == 0.01 * K["Flaxformer"] == 0.02
    assert loss["MaxText"].balance_weight == 0.01 * K["MaxText"] == 0.02
    for name in ("Flaxformer", "MaxText"):
        assert loss[name].balance_counts == "all"
        assert loss[name].over_layers == "mean"
    for name in ("Mesh-TensorFlow", "Praxis", "Megatron-LM"):
        assert loss[name].balance_weight == 0.01
        assert loss[name].over_layers == "sum"
    assert loss["Megatron-LM"].balance_counts == "all"
    assert loss["V-MoE"].balance_weight == 0
