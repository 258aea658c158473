"""Normalisation of activations: by root mean square, or by mean and variance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.model.parameters import Spec, vector
from moe.settings import NormSettings


def specs(settings: NormSettings, width: int) -> dict[str, Spec]:
    """Returns the parameters: `scale`, and `bias` of a "layer" norm, each [M]."""
    scale = vector((width,), ("norm",), float(settings.kind != "rms_plus_one"))
    if settings.kind == "layer":
        return {"scale": scale, "bias": vector((width,), ("norm",))}
    return {"scale": scale}


def over_last(x: jax.Array) -> jax.Array:
    """Averages the last dimension, which stays as one of 1."""
    return jnp.mean(x, axis=-1, keepdims=True)


def normalise(
    w: dict[str, jax.Array],
    x_BLM: jax.Array,
    settings: NormSettings,
    mean: Callable[[jax.Array], jax.Array] = over_last,
) -> jax.Array:
    """Returns normalised activations in their dtype; in between all is float32.

    "rms" divides by the root mean square (arXiv:1910.07467, eq. 4), "layer" subtracts
    the mean and divides by the deviation (arXiv:1607.06450, eq. 4). The scale of
    "rms_plus_one" is 1 + w.

    Args:
        w: what `specs` describes.
        x_BLM: activations.
        settings: kind and epsilon.
        mean: average over what is normalised together, whose dimensions stay.
    """
    x = x_BLM.astype(jnp.float32)
    if settings.kind == "layer":
        x -= mean(x)
    square = mean(x * x)
    x *= jax.lax.rsqrt(square + settings.epsilon)
    scale = w["scale"].astype(jnp.float32)
    x *= 1.0 + scale if settings.kind == "rms_plus_one" else scale
    if settings.kind == "layer":
        x += w["bias"].astype(jnp.float32)
    return x.astype(x_BLM.dtype)
