"""Loads from (name, seed, step): what each sends where."""

import numpy as np
import pytest

from moe.workloads import WORKLOADS, logits, tokens

SHAPE = G, S, E = 4, 64, 8
DEVICES = 4

pytestmark = pytest.mark.fast


def counts(name: str, num_selected: int = 1, **choices) -> np.ndarray:
    """Choices of each expert when every token takes its best."""
    drawn_GSE = logits(name, SHAPE, devices=DEVICES, **choices)
    best_GSK = np.argsort(-drawn_GSE, axis=-1)[..., :num_selected]
    return np.bincount(best_GSK.reshape(-1), minlength=E)


@pytest.mark.parametrize("num_selected", [1, 2, 3, E])
def test_balanced_is_exactly_so(num_selected):
    even = np.full(E, G * S * num_selected // E)
    np.testing.assert_array_equal(counts("balanced", num_selected), even)


def test_shares_are_those_of_the_workload():
    assert counts("hot_expert")[E // 2] == pytest.approx(G * S / 2, rel=0.15)
    assert counts("hot_set")[0] == pytest.approx(0.8 * G * S, rel=0.1)
    first_device = counts("hot_device")[: E // DEVICES].sum()
    assert first_device == pytest.approx(0.8 * G * S, rel=0.1)
    zero = counts("zero_load_device", num_selected=2)
    assert zero[-E // DEVICES :].sum() == 0
    assert zero[: -E // DEVICES].min() > 0


def test_rotating_and_bursts_change_with_the_step():
    hottest = [int(np.argmax(counts("rotating", step=step))) for step in range(E)]
    assert hottest == [(E // 2 + step) % E for step in range(E)]
    assert counts("bursts", step=3)[0] == G * S
    assert counts("bursts", step=7)[1] == G * S
    assert counts("bursts", step=4).max() < G * S / 3


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_a_function_of_name_seed_and_step(name):
    first, again = (logits(name, SHAPE, seed=3, step=5) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != logits(name, SHAPE, seed=4, step=5))
    assert np.all(np.isfinite(first))


def test_tokens_and_router_give_the_logits():
    wanted_GSE = logits("hot_set", SHAPE)
    x_GSM, router_ME = tokens(wanted_GSE, 12)
    np.testing.assert_array_equal(x_GSM @ router_ME, wanted_GSE)
    with pytest.raises(ValueError, match="cannot hold 8 logits"):
        tokens(wanted_GSE, 4)


def test_an_unknown_workload_is_refused():
    with pytest.raises(ValueError, match="no workload: balanced, hot_expert"):
        logits("lukewarm", SHAPE)
