"""Biases that are quantiles: what tokens would have needed, counted and solved for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import token_choice
from moe.routing.assignment import RouterContext
from moe.routing.needed_bias import BINS, counted, quantile
from moe.settings import RouterSettings

G, S, E, K = 4, 128, 8, 2
SETTINGS = RouterSettings(
    num_selected=K,
    scores="sigmoid",
    selection_bias=True,
    bias_update="quantile",
    group_size=S,
    capacity_factor=0.0,
)


def drawn(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of which some experts are liked much better; a third is padding."""
    rng = np.random.default_rng(seed)
    logits_GSE = rng.normal(size=(G, S, E)) + np.linspace(2, -2, E)
    return logits_GSE.astype(np.float32), rng.random((G, S)) < 0.67


@functools.cache
def compiled(scores: str = "sigmoid", *, train: bool = True):
    settings = RouterSettings(**{**vars(SETTINGS), "scores": scores})

    def run(logits_GSE, mask_GS, bias_E):
        keys_G = jax.random.split(jax.random.key(0), len(mask_GS)) if train else None
        context = RouterContext(mask_GS, keys_G, bias_E)
        sums = token_choice.route(logits_GSE, context, settings, capacity=S).sums
        return sums.chosen_GE, sums.needed_1EH

    return jax.jit(run)


solve = jax.jit(functools.partial(quantile, share=K / E))


def needed(score_TE: np.ndarray, bias_E: np.ndarray) -> np.ndarray:
    """The oracle: each token's threshold less its scores, in float64."""
    needed_TE = np.zeros_like(score_TE)
    for t in range(len(score_TE)):
        cutoff = sorted(score_TE[t] + bias_E, reverse=True)[K]
        needed_TE[t] = cutoff - score_TE[t]
    return needed_TE


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_a_bias_is_the_quantile_of_what_tokens_would_have_needed(scores):
    logits_GSE, mask_GS = drawn()
    bias_E = np.linspace(-0.2, 0.3, E).astype(np.float32)
    _, below_1EH = compiled(scores)(logits_GSE, mask_GS, bias_E)
    logits_TE = logits_GSE[mask_GS].astype(np.float64)
    score_TE = 1 / (1 + np.exp(-logits_TE))
    if scores == "softmax":
        score_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    needed_TE = needed(score_TE, bias_E)
    np.testing.assert_array_equal(below_1EH[0, :, -1], mask_GS.sum())
    # Of a range of [min b - 1, max b + 1] = [-1.2, 1.3], bin by bin.
    width = 2.5 / BINS
    for h in (300, 480, 520, 700):
        exact_E = np.sum(needed_TE < -1.2 + width * (h + 1), axis=0)
        assert np.abs(below_1EH[0, :, h] - exact_E).max() <= 1  # of rounding
    # Between two neighbours of the sorted needs there may be a gap.
    found_E = np.asarray(solve(below_1EH[0], bias_E))
    low_E, high_E = np.quantile(needed_TE, [K / E - 0.005, K / E + 0.005], axis=0)
    centre = np.quantile(needed_TE, K / E, axis=0).mean()
    assert np.all(found_E + centre > low_E - 2 * width)
    assert np.all(found_E + centre < high_E + 2 * width)
    np.testing.assert_allclose(found_E.mean(), 0, atol=1e-6)


def test_counts_of_halves_add_up_to_those_of_the_whole():
    logits_GSE, mask_GS = drawn()
    bias_E = np.zeros(E, np.float32)
    run = compiled()
    halves = [
        run(logits_GSE[i], mask_GS[i], bias_E)[1] for i in np.split(np.arange(G), 2)
    ]
    _, whole = run(logits_GSE, mask_GS, bias_E)
    np.testing.assert_array_equal(halves[0] + halves[1], whole)


def test_a_few_batches_even_out_the_loads_of_the_next():
    run, bias_E = compiled(), jnp.zeros(E)
    worst = []
    for batch in range(12):
        chosen_GE, below_1EH = run(*drawn(batch), bias_E)
        load_E = np.sum(chosen_GE, axis=0)
        worst.append(load_E.max() / load_E.mean() - 1)
        bias_E = solve(below_1EH[0], bias_E)
    assert worst[0] > 1.0, "the draws are meant to be uneven"
    # Of 343 tokens · 2 / 8 ≈ 86 a deviation is 9 %.
    assert max(worst[6:]) < 0.25


def test_without_tokens_a_bias_stays_and_outside_training_nothing_is_counted():
    logits_GSE, mask_GS = drawn()
    bias_E = np.linspace(0, 1, E).astype(np.float32)
    _, below_1EH = compiled()(logits_GSE, np.zeros_like(mask_GS), bias_E)
    assert not np.any(below_1EH)
    np.testing.assert_array_equal(solve(below_1EH[0], bias_E), bias_E)
    assert compiled(train=False)(logits_GSE, mask_GS, bias_E)[1] is None


@pytest.mark.fast
def test_counts_by_hand():
    # K = 1 of 2: scores (0.9, 0.4), bias 0, so α = 0.4 and needs are -0.5 and 0: places
    # 250 and 500 of [-1, 1) in 1,000 bins.
    score_GSE = jnp.array([[[0.9, 0.4]]])
    below_1EH = counted(
        score_GSE, jnp.array([[0.4]]), jnp.zeros(2), jnp.ones((1, 1), bool)
    )
    first_E = np.argmax(np.asarray(below_1EH[0]) > 0, axis=1)
    np.testing.assert_array_equal(np.abs(first_E - [250, 500]) <= 1, True)
