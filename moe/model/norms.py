"""Normalisation of activations: by root mean square, or by mean and variance."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.parameters import constant
from moe.settings import ModelSettings

RMS_EPSILON = 1e-6
LAYER_EPSILON = 1e-5


class Norm(nnx.Module):
    """Weights of one normalisation; "layer" is the one that has a bias."""

    def __init__(self, settings: ModelSettings):
        M = settings.model_dim
        self.scale = constant((M,), ("norm",), 1.0)
        if settings.norm == "layer":
            self.bias = constant((M,), ("norm",), 0.0)


def normalise(weights: Norm, x_BLM: jax.Array) -> jax.Array:
    """Returns normalised activations in their dtype; in between all is float32.

    Without a bias it divides by the root mean square (arXiv:1910.07467, eq. 4), with
    one it subtracts the mean and divides by the deviation (arXiv:1607.06450, eq. 4).
    """
    x = x_BLM.astype(jnp.float32)
    layer = hasattr(weights, "bias")
    if layer:
        x -= jnp.mean(x, axis=-1, keepdims=True)
    square = jnp.mean(x * x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(square + (LAYER_EPSILON if layer else RMS_EPSILON))
    x *= weights.scale[...].astype(jnp.float32)
    if layer:
        x += weights.bias[...].astype(jnp.float32)
    return x.astype(x_BLM.dtype)
