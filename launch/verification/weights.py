"""Random parameters large enough that every part of the model changes the result."""

import math
import zlib
from typing import Any

import jax
import numpy as np

from moe.layers import Layers
from moe.model import inventory
from moe.model.parameters import Spec


def draw(seed: int, layers: Layers) -> Any:
    """Draws parameters as NumPy arrays, each by its own name.

    Not those that training starts from: gates of an untrained router are all alike,
    and a bias of 0 hides one that is added twice.
    """

    def one(path: Any, spec: Spec) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = rng.standard_normal(spec.shape, np.float32)
        if not spec.is_matrix:
            return np.float32(spec.value) + np.float32(0.2) * drawn
        fan_in = math.prod(spec.shape[dim] for dim in spec.inputs)
        if name == "embedding":
            fan_in = layers.embedding.width
        return drawn * np.float32(fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(one, inventory.specs(layers))
