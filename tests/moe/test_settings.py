"""Capacity in exact arithmetic, and the choices that a token makes."""

import dataclasses
import math
from fractions import Fraction

import pytest

from moe.routing.capacity import capacity, mean_choices, never_drops
from moe.settings import RouterSettings

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("S", "K", "E", "factor", "C"),
    [
        (256, 1, 8, 1.25, 40),  # 256 · 1.25 / 8
        (256, 2, 8, 1.25, 80),
        (256, 1, 8, 1, 32),
        (250, 1, 8, 1.0, 32),  # 31.25, rounded up
        (256, 2, 64, 2.0, 16),
        # In floats 1 · 100 · 1.1 / 10 = 11.000000000000002, which rounds up to 12.
        (100, 1, 10, 1.1, 11),
        (256, 1, 512, 1.25, 4),  # 0.625 → 1, but at least min_capacity
        (256, 2, 2, 4.0, 256),  # 1,024, but S tokens can fill no more than S slots
        (2, 1, 8, 1.25, 2),  # min_capacity, but at most S
        (256, 2, 8, 0.0, 256),  # nothing may drop
    ],
)
def test_capacity_is_tokens_times_factor_over_experts(S, K, E, factor, C):
    router = RouterSettings(group_size=S, num_selected=K, capacity_factor=factor)
    assert capacity(router, E, train=True) == C


def test_capacity_does_not_round_up_what_only_a_float_exceeds():
    assert math.ceil(100 * 1.1 / 10) == 12, "floats are meant to go wrong here"
    router = RouterSettings(group_size=100, capacity_factor=1.1)
    assert capacity(router, 10, train=True) == 11


def test_min_capacity_is_a_setting():
    router = RouterSettings(group_size=256, capacity_factor=1.0, min_capacity=1)
    assert capacity(router, 512, train=True) == 1
    router = dataclasses.replace(router, min_capacity=7)
    assert capacity(router, 512, train=True) == 7


def test_evaluation_has_a_factor_of_its_own_and_drops_nothing_by_default():
    router = RouterSettings(group_size=256, capacity_factor=1.25)
    assert capacity(router, 8, train=False) == 256
    router = dataclasses.replace(router, eval_capacity_factor=2.0)
    assert capacity(router, 8, train=False) == 64  # 256 · 2 / 8
    assert capacity(router, 8, train=True) == 40


@pytest.mark.parametrize(
    ("rounding", "S", "multiple", "C"),
    [
        # S · 1 / 8 is 12.5, 13.5 and 12.875.
        ("ceil", 100, 1, 13),
        ("floor", 100, 1, 12),
        ("half_even", 100, 1, 12),
        ("half_even", 108, 1, 14),
        ("half_even", 103, 1, 13),
        # A multiple comes last, and rounds up whatever came before.
        ("floor", 100, 4, 12),
        ("ceil", 100, 4, 16),
        ("ceil", 6, 8, 6),  # but never beyond S
    ],
)
def test_capacity_is_rounded_as_the_settings_say(rounding, S, multiple, C):
    router = RouterSettings(
        group_size=S,
        capacity_factor=1.0,
        min_capacity=0,
        capacity_rounding=rounding,
        capacity_multiple=multiple,
    )
    assert capacity(router, 8, train=True) == C


def test_capacity_counts_the_choices_of_a_token_or_does_not():
    router = RouterSettings(group_size=256, num_selected=2, capacity_factor=1.0)
    assert capacity(router, 8, train=True) == 64  # 256 · 2 / 8
    once = dataclasses.replace(router, capacity_counts_choices=False)
    assert capacity(once, 8, train=True) == 32
    # Each of four prototypes of two experts gets all tokens, K times.
    prototypes = dataclasses.replace(router, family="prototypes", num_prototypes=4)
    assert capacity(prototypes, 8, train=True) == 256
    once = dataclasses.replace(prototypes, capacity_counts_choices=False)
    assert capacity(once, 8, train=True) == 128


def test_experts_that_choose_keep_their_limit_outside_training():
    router = RouterSettings(
        family="expert_choice", group_size=64, num_selected=2, capacity_factor=1.0
    )
    assert capacity(router, 8, train=False) == capacity(router, 8, train=True) == 16
    assert not never_drops(router, 8, train=False)
    router = dataclasses.replace(router, eval_capacity_factor=2.0)
    assert capacity(router, 8, train=False) == 32


def test_nothing_drops_if_an_expert_has_a_slot_for_every_token():
    router = RouterSettings(group_size=64, capacity_factor=1.25)
    assert never_drops(router, 8, train=False)
    assert not never_drops(router, 8, train=True)
    enough = dataclasses.replace(router, capacity_factor=8.0)
    assert never_drops(enough, 8, train=True)


@pytest.mark.parametrize(
    ("changes", "most", "mean"),
    [
        ({}, 2, 2),
        ({"family": "prototypes", "num_prototypes": 4}, 8, 8),
        ({"family": "hashed"}, 2, 2),
        ({"family": "sinkhorn"}, 2, 2),
        # 8 experts take ceil(50 · 2 / 8) = 13 tokens of 50.
        ({"family": "expert_choice"}, 8, Fraction(13 * 8, 50)),
        ({"family": "expert_choice", "max_experts_per_token": 3}, 3, Fraction(104, 50)),
        ({"family": "expert_choice", "max_experts_per_token": 9}, 8, Fraction(104, 50)),
    ],
)
def test_a_token_visits_this_many_experts_at_most_and_on_average(changes, most, mean):
    router = RouterSettings(
        num_selected=2, group_size=50, capacity_factor=1.0, min_capacity=1, **changes
    )
    assert router.num_choices(8) == most
    assert mean_choices(router, 8) == mean
