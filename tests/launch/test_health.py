"""Alarms about the routers begin when something holds, and end when it does not."""

import numpy as np
import pytest

from launch.training.health import Health

pytestmark = pytest.mark.fast

P, E = 3, 8


def metrics(**changes) -> dict:
    """Those of a run whose routers are well."""
    well = {
        "router/load": np.full((P, E), 1 / E),
        "router/dropped_fraction_per_layer": np.full(P, 0.02),
        "router/entropy_nats_per_layer": np.full(P, 1.0),
        "router/tokens_without_expert_fraction": 0.01,
        "router/logit_rms": 2.0,
    }
    return well | {f"router/{name}": value for name, value in changes.items()}


def alarms(looks: list[dict], period: int = 10, hashed=()) -> list[tuple[int, str]]:
    """Step and words of everything that is said."""
    health = Health(hashed)
    return [
        (step, alarm.words)
        for step, found in zip(range(period, 10**6, period), looks, strict=False)
        for alarm in health.look(step, found)
    ]


def test_a_table_that_chooses_does_not_collapse():
    looks = [metrics(entropy_nats_per_layer=[0.0, 1.0, 0.0])] * 5
    assert alarms(looks, hashed=[True, False, True]) == []
    ((_, words),) = alarms(looks, hashed=[True, False, False])
    assert "in sparse layer 2, since step 10" in words


def test_a_run_that_is_well_says_nothing_and_one_bad_look_neither():
    assert alarms([metrics()] * 20) == []
    bad = metrics(logit_rms=80.0)
    assert alarms([metrics(), bad, bad, metrics()] * 5) == []
    assert alarms([{"loss/total": 1.0}] * 5) == [], "a dense model has no routers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"dropped_fraction_per_layer": [0.1, 0.31, 0.25]},
            "31 % of the choices are dropped in sparse layer 1, the worst of 2, since "
            "step 30: raise TRAIN_CAPACITY_FACTOR",
        ),
        (
            {"tokens_without_expert_fraction": 0.4},
            "40 % of the tokens reach no expert, since step 30: raise TRAIN_CAP",
        ),
        (
            {"load": [[1 / E] * E] * 2 + [[0.79] + [0.03] * 7]},
            "the busiest expert has 6.3 times the mean load in sparse layer 2, since "
            "step 30: raise AUX_LOSS_FACTOR",
        ),
        (
            {"entropy_nats_per_layer": [1.0, 0.09, 0.05]},
            "the router's entropy is 2.4 % of an even choice's in sparse layer 2, the "
            "worst of 2, since step 30: raise ROUTER_Z_LOSS_FACTOR",
        ),
        (
            {"logit_rms": 44.4},
            "the root mean square of the router's logits is 44, since step 30: raise",
        ),
    ],
)
def test_a_condition_is_said_once_and_again_when_it_is_over(changes, words):
    looks = [metrics()] * 2 + [metrics(**changes)] * 9 + [metrics()] * 9
    begun, over = alarms(looks)
    assert begun[0] == 50, "at the third look"
    assert begun[1].startswith(words)
    assert over[0] == 140
    assert over[1].endswith(": over since step 120")


def test_dead_experts_are_those_without_tokens_for_long():
    load = np.full((P, E), 1 / (E - 1))
    load[1, 5] = 0
    asleep = [metrics(load=load)] * 8 + [metrics()]  # it wakes up in time
    assert alarms(asleep * 3) == []
    ((step, words),) = alarms([metrics()] * 5 + [metrics(load=load)] * 20)
    assert step == 170, "after ten looks, and three more to be sure"
    assert words.startswith(
        "1 experts had no token at the last 10 looks in sparse layer 1, since step 50"
    )
    absent = load.copy()
    absent[1, 5] = np.nan  # a layer of fewer experts
    assert alarms([metrics(load=absent)] * 30) == []
