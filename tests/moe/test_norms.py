"""Normalisations, compared with loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.architecture import EPSILONS
from moe.model.norms import normalise, specs
from moe.model.parameters import axes, draw
from moe.settings import NormSettings

pytestmark = pytest.mark.fast

M = 6


def settings_of(norm: str) -> NormSettings:
    return NormSettings(norm, EPSILONS[norm])


def weights_of(norm: str) -> dict[str, jax.Array]:
    return draw(specs(settings_of(norm), M), jax.random.key(0), "float32")


def in_loops(x_TM, scale_M, bias_M) -> np.ndarray:
    y_TM = np.zeros(x_TM.shape)
    for t, x_M in enumerate(x_TM.astype(np.float64)):
        if bias_M is None:  # of "rms_plus_one" the caller has added 1
            y_TM[t] = scale_M * x_M / np.sqrt(sum(x_M**2) / M + 1e-6)
        else:
            mean = sum(x_M) / M
            variance = sum((x_M - mean) ** 2) / M
            y_TM[t] = scale_M * (x_M - mean) / np.sqrt(variance + 1e-5) + bias_M
    return y_TM


def test_root_mean_square_as_worked_out_by_hand():
    # The squares 9 and 16 and four zeros: their mean is 25/6, its root 2.04124.
    weights = weights_of("rms")
    x_BLM = jnp.array([[[3.0, 4, 0, 0, 0, 0]]])
    y_M = normalise(weights, x_BLM, settings_of("rms"))[0, 0]
    np.testing.assert_allclose(y_M[:2], [3 / 2.04124, 4 / 2.04124], rtol=1e-5)


@pytest.mark.parametrize("norm", EPSILONS)
def test_norms_agree_with_loops(norm):
    weights = weights_of(norm)
    draw = np.random.default_rng(0)
    scale_M, bias_M = draw.normal(size=(2, M)).astype(np.float32)
    weights["scale"] = jnp.asarray(scale_M)
    if norm == "layer":
        weights["bias"] = jnp.asarray(bias_M)
    # The last token is nearly constant: there the epsilon is what counts.
    x_TM = draw.normal(size=(5, M)).astype(np.float32) * 3 + 1
    x_TM[-1] = 1e-3 * draw.normal(size=M)
    y_TM = normalise(weights, x_TM[None], settings_of(norm))[0]
    factor_M = scale_M + 1.0 if norm == "rms_plus_one" else scale_M
    expected = in_loops(x_TM, factor_M, bias_M if norm == "layer" else None)
    np.testing.assert_allclose(y_TM, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.fast
def test_every_norm_starts_by_multiplying_by_one():
    x_BLM = jax.random.normal(jax.random.key(0), (1, 4, M))
    wanted = normalise(weights_of("rms"), x_BLM, settings_of("rms"))
    plus_one = weights_of("rms_plus_one")
    assert not plus_one["scale"].any()
    got = normalise(plus_one, x_BLM, settings_of("rms_plus_one"))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_bfloat16_is_rounded_once_at_the_end(norm):
    x_BLM = jax.random.normal(jax.random.key(0), (1, 4, M), jnp.bfloat16)
    weights = weights_of(norm)
    y_BLM = normalise(weights, x_BLM, settings_of(norm))
    assert y_BLM.dtype == jnp.bfloat16
    exact_BLM = normalise(weights, x_BLM.astype(jnp.float32), settings_of(norm))
    assert (y_BLM == exact_BLM.astype(jnp.bfloat16)).all()


def test_only_the_layer_norm_has_a_bias_and_neither_is_cut_over_devices():
    of_rms, of_layer = (axes(specs(settings_of(norm), M)) for norm in ("rms", "layer"))
    assert of_rms == {"scale": ("norm",)}
    assert of_layer == {"scale": ("norm",), "bias": ("norm",)}
