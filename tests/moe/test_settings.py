"""Capacity in exact arithmetic, and the rules that settings must obey."""

import dataclasses
import math

import pytest

from moe.settings import (
    ModelSettings,
    RouterSettings,
    TrainSettings,
    capacity,
    problems,
)

pytestmark = pytest.mark.fast

MODEL = ModelSettings(
    vocab_size=32, num_layers=4, model_dim=8, num_heads=2, head_dim=4, mlp_dim=16
)
ROUTER = RouterSettings(group_size=64)
TRAIN = TrainSettings(batch_size=8)


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


def test_the_defaults_obey_the_rules():
    assert problems(MODEL, ROUTER, TRAIN, length=64) == []


def test_all_faults_are_listed_at_once_with_their_values():
    found = problems(
        dataclasses.replace(
            MODEL, num_layers=5, head_dim=3, dropout=1.0, expert_mlp_dim=0
        ),
        RouterSettings(
            num_selected=9,
            second_policy="random",
            jitter=1.0,
            capacity_factor=-1.0,
            group_size=48,
        ),
        TrainSettings(batch_size=0),
        length=64,
    )
    assert sorted(fault.partition(":")[0] for fault in found) == [
        "BATCH_SIZE = 0",
        "DROPOUT_RATE = 1.0",
        "EXPERT_MLP_DIM = 0",
        "GROUP_SIZE = 48 does not divide a sequence of 64 tokens",
        "HEAD_DIM = 3",
        "JITTER_NOISE = 1.0",
        "NUM_LAYERS = 5 is not a multiple of MOE_EVERY = 2",
        "NUM_SELECTED_EXPERTS = 9",
        "SECOND_EXPERT_POLICY = 'random' is defined for NUM_SELECTED_EXPERTS = 2, "
        "not 9",
        "TRAIN_CAPACITY_FACTOR and EVAL_CAPACITY_FACTOR cannot be negative",
    ]


def test_a_group_size_that_does_not_divide_is_told_the_nearest_that_do():
    router = dataclasses.replace(ROUTER, group_size=48)
    (fault,) = problems(MODEL, router, TRAIN, length=64)
    assert fault.endswith("nearest are 32 and 64")


def test_a_dense_model_is_not_asked_about_its_routers():
    dense = dataclasses.replace(MODEL, moe_every=0, num_layers=5)
    router = RouterSettings(num_selected=0, group_size=7)
    assert problems(dense, router, TRAIN, length=64) == []
