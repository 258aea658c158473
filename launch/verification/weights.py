"""Random parameters large enough that every part of the model changes the result."""

import math
import zlib
from typing import Any

import jax
import numpy as np

from moe.model import transformer
from moe.settings import ModelSettings, RouterSettings
from moe.training.optimizer import STACKED
from partitioning.rules import FULLY_SHARDED


def draw(seed: int, model: ModelSettings, router: RouterSettings) -> Any:
    """Draws parameters as NumPy arrays, each by its own name.

    Not those that training starts from: gates of an untrained router are all alike,
    and a bias of 0 hides one that is added twice.
    """
    shapes = transformer.param_shapes(model, router)

    def one(path: Any, array: jax.ShapeDtypeStruct, axes: tuple) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        drawn = rng.standard_normal(array.shape, np.float32)
        if name.endswith("scale"):
            return 1 + np.float32(0.2) * drawn
        if name.endswith(("bias", "table", "positions")):
            return np.float32(0.2) * drawn
        fan_in = model.model_dim
        if name != "embedding" and axes[-1] in FULLY_SHARDED:
            sizes = zip(array.shape[:-1], axes[:-1], strict=True)
            fan_in = math.prod(size for size, axis in sizes if axis not in STACKED)
        return drawn * np.float32(fan_in**-0.5)

    axes = transformer.param_axes(model, router)
    return jax.tree_util.tree_map_with_path(one, shapes, axes)
