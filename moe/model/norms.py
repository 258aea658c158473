"""Normalisation of activations: by root mean square, or by mean and variance."""

import jax
import jax.numpy as jnp

from moe.model.parameters import Spec, vector
from moe.settings import NormSettings


def specs(settings: NormSettings, width: int) -> dict[str, Spec]:
    """Returns the parameters: `scale`, and `bias` of a "layer" norm, each [M]."""
    scale = vector((width,), ("norm",), 1.0)
    if settings.kind == "layer":
        return {"scale": scale, "bias": vector((width,), ("norm",))}
    return {"scale": scale}


def normalise(
    w: dict[str, jax.Array], x_BLM: jax.Array, settings: NormSettings
) -> jax.Array:
    """Returns normalised activations in their dtype; in between all is float32.

    "rms" divides by the root mean square (arXiv:1910.07467, eq. 4), "layer" subtracts
    the mean and divides by the deviation (arXiv:1607.06450, eq. 4).
    """
    x = x_BLM.astype(jnp.float32)
    if settings.kind == "layer":
        x -= jnp.mean(x, axis=-1, keepdims=True)
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(square + settings.epsilon)
    x *= w["scale"].astype(jnp.float32)
    if settings.kind == "layer":
        x += w["bias"].astype(jnp.float32)
    return x.astype(x_BLM.dtype)
