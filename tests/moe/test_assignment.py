"""Who sits in which slot: the filling of slots, and the router of token choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe.routing.assignment import Choices, RouterContext, assign
from moe.routing.token_choice import route
from moe.settings import RouterSettings
from moe.testing import check_assignment

G = 2
# S, E, K, C of every shape that is compiled; the data are drawn.
SHAPES = {
    "top1_one_slot": (6, 4, 1, 1),
    "top2": (6, 4, 2, 2),
    "every_expert": (4, 3, 3, 2),
    "one_token": (1, 3, 2, 1),
    "one_expert": (6, 1, 1, 4),
}
SLOT_ORDERS = ("token_major", "choice_major")
MANY = G * 6 * 4  # logits of the largest shape
repeatable = settings(max_examples=20, deadline=None, derandomize=True)


@functools.cache
def compiled_route(capacity: int, choices: tuple):
    """The router in both slot orders: compiled together, they share most of it."""

    @jax.jit
    def run(logits_GSE, mask_GS, key_G):
        context = RouterContext(mask_GS=mask_GS, key_G=key_G)
        return {
            order: route(
                logits_GSE,
                context,
                RouterSettings(slot_order=order, **dict(choices)),
                capacity=capacity,
            )
            for order in SLOT_ORDERS
        }

    return run


def run_route(
    logits_GSE,
    mask_GS=None,
    key_G=None,
    *,
    capacity,
    slot_order="token_major",
    **choices,
):
    """The assignment, in host memory; without a mask every token is real."""
    logits_GSE = np.asarray(logits_GSE, np.float32)
    if mask_GS is None:
        mask_GS = np.ones(logits_GSE.shape[:2], bool)
    run = compiled_route(capacity, tuple(sorted(choices.items())))
    return jax.device_get(run(logits_GSE, mask_GS, key_G)[slot_order])


def logits_from(numbers: bytes, S: int, E: int) -> np.ndarray:
    """Logits 0 to 4: few values, so that ties are common."""
    digits = np.frombuffer(numbers, np.uint8)[: G * S * E] % 5
    return digits.reshape(G, S, E).astype(np.float32)


def mask_from(numbers: bytes, S: int) -> np.ndarray:
    return (np.frombuffer(numbers, np.uint8)[: G * S] % 4 > 0).reshape(G, S)


def seats_in_loops(logits_SE, mask_S, K, C, slot_order):
    """Both maps of one group, one choice at a time."""
    S, E = logits_SE.shape
    arrivals = [(s, k) for s in range(S) for k in range(K)]
    if slot_order == "choice_major":
        arrivals = [(s, k) for k in range(K) for s in range(S)]
    choice_of_slot_EC = np.full((E, C), -1)
    slot_of_choice_SK = np.full((S, K), -1)
    taken_E = [0] * E
    for s, k in arrivals:
        if not mask_S[s]:
            continue
        e = sorted(range(E), key=lambda e: (-logits_SE[s, e], e))[k]
        if taken_E[e] < C:
            choice_of_slot_EC[e, taken_E[e]] = s * K + k
            slot_of_choice_SK[s, k] = e * C + taken_E[e]
            taken_E[e] += 1
    return choice_of_slot_EC, slot_of_choice_SK


@pytest.mark.fast
def test_three_tokens_take_the_slots_of_two_experts_as_worked_out_by_hand():
    # Choice number = 2·token + choice; slot number = 2·expert + slot.
    choices = Choices(
        expert_GSJ=np.array([[[0, 1], [0, 1], [1, 0]]], np.int32),
        active_GSJ=np.ones((1, 3, 2), bool),
        first_GSJ=np.array([[[True, False]] * 3]),
        gate_GSJ=np.full((1, 3, 2), 0.5, np.float32),
        probability_GSE=np.full((1, 3, 2), 0.5, np.float32),
    )
    mask_GS = np.ones((1, 3), bool)
    by_order = jax.jit(
        lambda choices: [
            assign(choices, None, mask_GS, RouterSettings(slot_order=o), capacity=2)
            for o in SLOT_ORDERS
        ]
    )(choices)
    token_major, choice_major = (
        (x.choice_of_slot_GEC, x.slot_of_choice_GSJ) for x in by_order
    )
    # Token 0 takes slot 0 of both experts, token 1 takes slot 1 of both, and token 2
    # finds both full.
    np.testing.assert_array_equal(token_major[0][0], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(token_major[1][0], [[0, 2], [1, 3], [-1, -1]])
    # First choices 0 and 1 fill expert 0, and 2 takes slot 0 of expert 1; of the second
    # choices, token 0's takes the last slot and two find none.
    np.testing.assert_array_equal(choice_major[0][0], [[0, 2], [4, 1]])
    np.testing.assert_array_equal(choice_major[1][0], [[0, 3], [1, -1], [2, -1]])


@pytest.mark.parametrize("shape", SHAPES)
@repeatable
@given(st.binary(min_size=MANY, max_size=MANY), st.binary(min_size=12, max_size=12))
@example(bytes(MANY), b"\1" * 12)  # equal logits: all tokens choose the same experts
@example(bytes(MANY), bytes(12))  # nothing but padding
def test_slots_are_given_out_one_choice_at_a_time(shape, numbers, padding):
    S, E, K, C = SHAPES[shape]
    logits_GSE, mask_GS = logits_from(numbers, S, E), mask_from(padding, S)
    for order in SLOT_ORDERS:
        assignment = run_route(
            logits_GSE, mask_GS, capacity=C, num_selected=K, slot_order=order
        )
        check_assignment(assignment, mask_GS)
        assert assignment.sums.chosen_GE.sum() == K * mask_GS.sum()
        for g in range(G):
            choice_of_slot_EC, slot_of_choice_SK = seats_in_loops(
                logits_GSE[g], mask_GS[g], K, C, order
            )
            np.testing.assert_array_equal(
                assignment.choice_of_slot_GEC[g], choice_of_slot_EC
            )
            np.testing.assert_array_equal(
                assignment.slot_of_choice_GSJ[g], slot_of_choice_SK
            )


@pytest.mark.parametrize("slot_order", SLOT_ORDERS)
def test_when_all_tokens_choose_one_expert_the_first_one_keeps_it(slot_order):
    logits_GSE = np.tile([0, 0, 1, 0], (G, 6, 1))
    assignment = run_route(
        logits_GSE, capacity=1, num_selected=1, slot_order=slot_order
    )
    np.testing.assert_array_equal(
        assignment.slot_of_choice_GSJ[0, :, 0], [2, -1, -1, -1, -1, -1]
    )
    np.testing.assert_array_equal(assignment.sums.chosen_GE[0], [0, 0, 6, 0])
    np.testing.assert_array_equal(assignment.sums.kept_GE[0], [0, 0, 1, 0])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("num_selected", "renormalize", "gates"),
    [
        (1, "no", [0.5]),  # Switch: the probability itself
        (2, "no", [0.5, 0.3]),
        (2, "before_drop", [0.625, 0.375]),  # GLaM: 0.5 / 0.8 and 0.3 / 0.8
    ],
)
def test_gates_are_probabilities_or_sum_to_one(num_selected, renormalize, gates):
    logits_GSE = np.log([[[0.2, 0.5, 0.3]] * 3]) + 7  # a softmax ignores the 7
    assignment = run_route(
        logits_GSE, capacity=1, num_selected=num_selected, renormalize=renormalize
    )
    # All the same, whether the choice was kept, as token 0's were, or dropped. The
    # logits, rounded near 7, are off by up to 7 · 2⁻²⁴ = 4e-7.
    assert assignment.sums.kept_GE.sum() == num_selected
    np.testing.assert_allclose(assignment.gate_GSJ[0], [gates] * 3, rtol=1e-6)
    slots = [1, 2][:num_selected]  # of experts 1 and 2, which have one slot each
    np.testing.assert_array_equal(assignment.slot_of_choice_GSJ[0, 0], slots)


@pytest.mark.fast
def test_ties_go_to_the_lower_index():
    logits_GSE = [[[0, 0, 0], [0, 1, 1], [1, 0, 1]]]
    assignment = run_route(logits_GSE, capacity=1, num_selected=2, renormalize="no")
    # Choices {0, 1}, {1, 2}, {0, 2}: token 0 takes 0 and 1, token 1 takes 2.
    np.testing.assert_array_equal(assignment.choice_of_slot_GEC[0], [[0], [1], [3]])
    np.testing.assert_array_equal(assignment.sums.chosen_GE, [[2, 2, 2]])
    np.testing.assert_array_equal(assignment.sums.first_GE, [[2, 1, 0]])


@pytest.mark.fast
def test_sums_leave_padding_out():
    # Weights 2:1:1 of sum 4, and 1:1:2: log Σ exp = ln 4, and the entropy is
    # ½·ln 2 + 2·¼·ln 4 = 1.5·ln 2. The third token is padding.
    logits_GSE = np.log([[[2, 1, 1], [1, 1, 2], [9, 1, 1]]])
    mask_GS = np.array([[True, True, False]])
    sums = run_route(
        logits_GSE, mask_GS, capacity=1, num_selected=2, renormalize="no"
    ).sums
    assert sums.tokens_G == 2
    assert sums.padding_G == 2
    np.testing.assert_allclose(sums.probability_GE, [[0.75, 0.5, 0.75]], rtol=1e-6)
    np.testing.assert_allclose(sums.z_G, [2 * np.log(4) ** 2], rtol=1e-6)
    np.testing.assert_allclose(sums.entropy_G, [2 * 1.5 * np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(sums.first_GE, [[1, 0, 1]])
    np.testing.assert_array_equal(sums.chosen_GE, [[2, 1, 1]])  # {0, 1} and {2, 0}
    np.testing.assert_array_equal(sums.kept_GE, [[1, 1, 1]])
    # One logit of three is ln 2, the others are 0.
    np.testing.assert_allclose(sums.square_G, [2 * np.log(2) ** 2 / 3], rtol=1e-6)
    for nothing in (sums.load_GE, sums.spilled_GE, sums.excess_G):
        assert not nothing.any()


# The random second expert (arXiv:2006.16668, Algorithm 1).

RANDOM = {"num_selected": 2, "renormalize": "before_drop", "second_policy": "random"}
GROUPS, TOKENS, EXPERTS = 8, 512, 4


@functools.cache
def many_tokens():
    """Logits, keys, and the assignment in which nothing can drop."""
    rng = np.random.default_rng(0)
    logits_GSE = rng.normal(size=(GROUPS, TOKENS, EXPERTS), scale=2.0)
    key_G = jax.random.split(jax.random.key(5), GROUPS)
    return (
        logits_GSE,
        key_G,
        run_route(logits_GSE, None, key_G, capacity=TOKENS, **RANDOM),
    )


def test_a_second_choice_is_kept_exactly_if_its_draw_is_below_twice_its_gate():
    _, key_G, assignment = many_tokens()
    draw_GS = jax.vmap(lambda key: jax.random.uniform(key, (TOKENS,)))(key_G)
    first_GS, second_GS = np.moveaxis(assignment.slot_of_choice_GSJ >= 0, -1, 0)
    assert first_GS.all(), "a first choice is never declined"
    np.testing.assert_array_equal(second_GS, draw_GS < 2 * assignment.gate_GSJ[..., 1])


def test_the_fraction_of_second_choices_kept_is_the_expected_one():
    _, _, assignment = many_tokens()
    chance_GS = np.minimum(1, 2 * assignment.gate_GSJ[..., 1].astype(np.float64))
    kept = np.mean(assignment.slot_of_choice_GSJ[..., 1] >= 0)
    sigma = np.sqrt(np.sum(chance_GS * (1 - chance_GS))) / chance_GS.size
    assert 0.2 < chance_GS.mean() < 0.8, "a policy that ignores the gate must show"
    assert abs(kept - chance_GS.mean()) < 4 * sigma < 0.03


def test_declined_choices_are_neither_chosen_nor_dropped():
    _, _, assignment = many_tokens()
    kept = np.sum(assignment.slot_of_choice_GSJ >= 0)
    assert GROUPS * TOKENS < kept < 2 * GROUPS * TOKENS
    assert assignment.sums.chosen_GE.sum() == kept
    np.testing.assert_array_equal(assignment.sums.chosen_GE, assignment.sums.kept_GE)


def test_outside_training_no_choice_is_declined():
    logits_GSE, _, _ = many_tokens()
    assignment = run_route(logits_GSE, capacity=TOKENS, **RANDOM)
    assert np.all(assignment.slot_of_choice_GSJ >= 0)


def test_draws_depend_on_the_key_of_the_group_alone():
    logits_GSE, key_G, assignment = many_tokens()
    order = np.random.default_rng(1).permutation(GROUPS)
    moved = run_route(logits_GSE[order], None, key_G[order], capacity=TOKENS, **RANDOM)
    jax.tree.map(
        np.testing.assert_array_equal,
        moved,
        jax.tree.map(lambda x: x[order], assignment),
    )
    rekeyed = run_route(logits_GSE, None, key_G[order], capacity=TOKENS, **RANDOM)
    assert np.any(rekeyed.slot_of_choice_GSJ != assignment.slot_of_choice_GSJ)


# Causality.


@repeatable
@given(
    st.binary(min_size=MANY, max_size=MANY),
    st.binary(min_size=12, max_size=12),
    st.integers(0, 5),
    st.binary(min_size=8, max_size=8),
)
def test_in_token_major_order_a_token_changes_nothing_before_it(
    numbers, padding, t, others
):
    S, E, _, C = SHAPES["top2"]
    logits_GSE, mask_GS = logits_from(numbers, S, E), mask_from(padding, S)
    changed_GSE = logits_GSE.copy()
    changed_GSE[:, t] = (np.frombuffer(others, np.uint8) % 5).reshape(G, E)
    key_G = jax.random.split(jax.random.key(0), G)
    before, after = (
        run_route(x, mask_GS, key_G, capacity=C, slot_order="token_major", **RANDOM)
        for x in (logits_GSE, changed_GSE)
    )
    for name in ("slot_of_choice_GSJ", "gate_GSJ"):
        np.testing.assert_array_equal(
            getattr(before, name)[:, :t], getattr(after, name)[:, :t]
        )


@pytest.mark.fast
def test_in_choice_major_order_a_later_first_choice_evicts_an_earlier_second():
    # Token 0 prefers expert 0 and then 1. If token 1 prefers expert 1, it takes the
    # only slot there before token 0's second choice is looked at.
    tail = [0, 1, 2]
    alike, later = [[2, 1, 0], [2, 1, 0], tail], [[2, 1, 0], [0, 2, 1], tail]
    choices = {"num_selected": 2, "renormalize": "no", "slot_order": "choice_major"}
    first, second = (
        run_route([logits], capacity=1, **choices) for logits in (alike, later)
    )
    np.testing.assert_array_equal(first.slot_of_choice_GSJ[0, 0], [0, 1])
    np.testing.assert_array_equal(second.slot_of_choice_GSJ[0, 0], [0, -1])


def test_gradients_reach_the_logits_through_the_gates_kept_or_not():
    def gate(logits_GSE):
        context = RouterContext(mask_GS=jnp.ones((1, 2), bool))
        router = RouterSettings(num_selected=1)
        return route(logits_GSE, context, router, capacity=1).gate_GSJ.sum()

    logits_GSE = np.log([[[3.0, 1.0], [3.0, 1.0]]]).astype(np.float32)
    # dp₀ = p₀(1 − p₀) for its own logit and −p₀·p₁ for the other: ±¾·¼.
    np.testing.assert_allclose(
        jax.jit(jax.grad(gate))(logits_GSE), [[[3 / 16, -3 / 16]] * 2], rtol=1e-6
    )
