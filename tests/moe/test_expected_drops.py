"""What a router without preferences drops: by hand, by simulation, by the settings."""

import dataclasses
import math

import numpy as np
import pytest

from moe.expected_drops import expected_drops, few_slots, of_router
from moe.settings import RouterSettings

pytestmark = pytest.mark.fast


def test_two_tokens_and_two_experts_are_counted_on_one_hand():
    # Both at one expert with chance 1/2; with a slot each, one of the two is dropped.
    assert expected_drops(2, 2, 1, 1) == pytest.approx(1 / 4, rel=1e-12)
    assert expected_drops(2, 2, 1, 0) == pytest.approx(1, rel=1e-12)
    # Three tokens: all at one expert (1/4) drop two, two and one (3/4) drop one.
    three = (1 / 4 * 2 + 3 / 4 * 1) / 3
    assert expected_drops(3, 2, 1, 1) == pytest.approx(three, rel=1e-12)


@pytest.mark.parametrize("tokens", [16, 4096])
def test_nothing_drops_where_every_token_has_a_slot(tokens):
    assert expected_drops(tokens, 8, 1, tokens) == 0
    # Tokens that visit all experts fill each of them.
    assert expected_drops(tokens, 2, 2, tokens // 2) == 1 / 2


@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "dropped"),
    [
        (4096, 1024, 5, 0.102),  # capacity 4096 · 1.25 / 1024
        (4096, 6144, 1, 0.270),  # 0.83 of a slot, rounded up
        (1024, 2048, 1, 0.213),  # Switch-C, one slot for half a token
    ],
)
def test_many_experts_have_poisson_arrivals(tokens, experts, slots, dropped):
    mean = tokens / experts
    poisson = 1 - math.fsum(
        min(a, slots) * math.exp(a * math.log(mean) - mean - math.lgamma(a + 1)) / mean
        for a in range(1, 60)
    )
    exact = expected_drops(tokens, experts, 1, slots)
    assert exact == pytest.approx(poisson, abs=5e-4)
    assert exact == pytest.approx(dropped, abs=5e-4)


@pytest.mark.parametrize(
    ("tokens", "experts", "choices", "slots"),
    [(256, 8, 1, 40), (128, 64, 2, 5), (64, 128, 1, 1), (512, 16, 4, 128)],
)
def test_a_simulated_router_drops_as_many(tokens, experts, choices, slots):
    draws = np.random.default_rng(0)
    dropped = []
    for _ in range(400):
        order = np.argsort(draws.random((tokens, experts)), axis=1)
        load = np.bincount(order[:, :choices].ravel(), minlength=experts)
        dropped.append(np.maximum(load - slots, 0).sum() / (tokens * choices))
    error = np.std(dropped) / math.sqrt(len(dropped))
    exact = expected_drops(tokens, experts, choices, slots)
    assert abs(np.mean(dropped) - exact) < 4 * error
    assert exact > 10 * error, "the case drops too little to tell"


def test_large_groups_neither_overflow_nor_vanish():
    # Mean 16,384 and deviation 111: 1.25 times the mean is 37 deviations away.
    assert 0 < expected_drops(65_536, 4, 1, 20_480) < 1e-100
    even = expected_drops(65_536, 4, 1, 16_384)
    # E max(X - μ, 0) = σ / √(2π) for a normal law.
    sigma = math.sqrt(65_536 * 1 / 4 * 3 / 4)
    assert even == pytest.approx(sigma / math.sqrt(2 * math.pi) / 16_384, rel=1e-3)


def test_a_token_cannot_choose_more_experts_than_there_are():
    with pytest.raises(ValueError, match="8 experts, 9 choices"):
        expected_drops(64, 8, 9, 4)


def test_the_settings_of_a_router_say_how_many_it_drops():
    router = RouterSettings(group_size=1024, capacity_factor=1.0, min_capacity=1)
    assert of_router(router, 2048) == expected_drops(1024, 2048, 1, 1)
    prototypes = dataclasses.replace(
        router, family="prototypes", num_prototypes=2, capacity_factor=1.25
    )
    # Two choices of 960: 1024 · 2 · 1.25 / 960 = 2.67 slots.
    assert of_router(prototypes, 960) == expected_drops(1024, 960, 2, 3)
    assert of_router(dataclasses.replace(router, capacity_factor=0.0), 64) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "expert_choice"},
        {"family": "sinkhorn"},
        {"family": "hashed"},
        {"overflow": "spill"},
        {"num_selected": 2, "second_policy": "random"},
    ],
)
def test_where_chance_does_not_rule_nothing_is_expected(changes):
    assert of_router(dataclasses.replace(RouterSettings(), **changes), 8) is None


def test_groups_of_several_rows_drop_less_by_chance():
    # Switch's 128 experts, a factor of 1.25: 512 · 1.25 / 128 = 5 slots, 8,192 · 1.25 /
    # 128 = 80.
    row = RouterSettings(group_size=512, capacity_factor=1.25)
    rows = dataclasses.replace(row, group_size=8192, group_rows=16)
    assert of_router(row, 128) == pytest.approx(0.102, abs=5e-4)
    assert of_router(rows, 128) == pytest.approx(0.0013, abs=5e-5)


def test_few_slots_are_warned_of_with_what_to_change():
    router = RouterSettings(group_size=512, capacity_factor=1.25, min_capacity=1)
    # 512 · 1.25 / 512 = 1.25 slots, rounded up; 2,048 · 1.25 / 512 = 5, and 4,096 ten.
    words = few_slots(router, 512)
    assert words.startswith("2 per expert and group")
    assert "GROUP_SIZE = 4096 instead of 512 (over several rows: GROUP_ROWS)" in words
    assert "NUM_EXPERTS than 512" in words
    assert "TRAIN_CAPACITY_FACTOR than 1.25" in words
    assert few_slots(router, 80) == "", "8 slots are enough"
    assert few_slots(dataclasses.replace(router, capacity_factor=0.0), 512) == ""
    chosen = dataclasses.replace(router, family="expert_choice")
    assert few_slots(chosen, 512) == "", "experts that choose fill their slots"
    # A group of 4 tokens with 4 slots per expert drops nothing.
    tiny = dataclasses.replace(router, group_size=4, min_capacity=4)
    assert few_slots(tiny, 8) == ""
