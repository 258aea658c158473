"""Random parameters large enough that every part of the model changes the result."""

from typing import Any

import jax
import jax.numpy as jnp

from moe.model import transformer
from moe.settings import ModelSettings, RouterSettings


def draw(seed: int, model: ModelSettings, router: RouterSettings) -> Any:
    """Draws parameters; biases and scales are no longer 0 and 1, routers decide.

    Gates of an untrained router are all alike, and biases of 0 hide one that is added
    twice.
    """
    params = transformer.init_params(jax.random.key(seed), model, router)

    def louder(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = jax.random.normal(jax.random.key(hash_of(name) ^ seed), x.shape)
        if name.endswith("moe/router"):
            return noise * model.model_dim**-0.5
        if name.endswith("scale"):
            return 1 + 0.2 * noise
        if name.endswith(("bias", "table", "positions")):
            return 0.2 * noise
        return x

    return jax.tree_util.tree_map_with_path(louder, params)


def hash_of(name: str) -> jax.Array | int:
    """A number of 31 bits that a name always has."""
    number = 0
    for byte in name.encode():
        number = (number * 257 + byte) % (2**31 - 1)
    return number


def count(params: Any) -> int:
    """How many there are."""
    return sum(jnp.size(x) for x in jax.tree.leaves(params))
