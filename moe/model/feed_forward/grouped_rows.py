"""What every way to compute experts over sorted rows needs."""

import jax
import jax.numpy as jnp

from moe.model.feed_forward.dense import GATED, PLAIN


def zero_past(x_RX: jax.Array, size_e: jax.Array, pad: int = 0) -> jax.Array:
    """Zeroes rows of no expert, and appends `pad` zero rows."""
    real_R1 = jnp.arange(x_RX.shape[0])[:, None] < jnp.sum(size_e)
    return jnp.pad(jnp.where(real_R1, x_RX, 0), ((0, pad), (0, 0)))


def split_inputs(activation: str, up_RU: jax.Array) -> list[jax.Array]:
    """Splits [R, U] into the inputs of the activation, each [R, F]."""
    return jnp.split(up_RU, 2, axis=1) if activation in GATED else [up_RU]


def activate(activation: str, *inputs: jax.Array) -> jax.Array:
    """Applies the non-linearity to one input, or to a gate and what it gates."""
    if activation in GATED:
        return GATED[activation](*inputs)
    return PLAIN[activation](*inputs)
