"""The same model as ours, with arrays made of theirs by the rules."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_models import names
from benchmarks.public_models.families import Family
from benchmarks.public_models.names import Rules
from moe.model.build import build
from moe.model.transformer import Model
from moe.settings import ExecutionSettings
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings


def computed(
    family: Family, theirs: Mapping[str, np.ndarray], token_BL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits_BLV and whom each token chose, as `theirs.computed` does."""
    model = described(family)
    params = parameters(model, family.all_rules(), theirs)
    B, L = token_BL.shape
    batch = {
        "decoder_input_tokens": jnp.asarray(token_BL, jnp.int32),
        "decoder_positions": jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
        "decoder_segment_ids": jnp.ones((B, L), jnp.int32),
    }
    run = jax.jit(lambda params, batch: forward(model, params, batch, jnp.arange(B)))
    logits_BLV, sums = run(params, batch)
    by_layer: dict[int, Any] = {}
    for place, each in zip(model.layers.sparse(), sums, strict=True):
        by_layer.update(zip(place.numbers, each.chosen_GE, strict=True))
    chosen = np.array([by_layer[number] for number in sorted(by_layer)])
    return np.asarray(logits_BLV), chosen > 0


def described(family: Family) -> Model:
    """Returns the model on one device, in float32."""
    execution = ExecutionSettings(dtype="float32", attention_block=0, remat="none")
    settings = family.model_settings(), family.router_settings()
    return build(*settings, execution, make_mesh(MeshSettings()))


def parameters(model: Model, rules: Rules, theirs: Mapping[str, np.ndarray]) -> Any:
    """Returns all parameters of a model, each made of theirs by its rule.

    Raises:
        KeyError: a parameter has no rule, or a rule's array is missing.
        ValueError: an array has another shape, or no rule reads it.
    """
    read: set[str] = set()
    segments = model.layers.stacks["decoder"].segments

    def made(prefix: str, path: str, shape: tuple[int, ...]) -> np.ndarray:
        read.update(prefix + name for name in rules[path][0].split(" + "))
        return names.read(theirs, prefix, rules[path], shape)

    def leaf(keys: Any, spec: Any) -> np.ndarray:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not path.startswith("decoder/layers/"):
            return made("", path, spec.shape)
        _, _, segment, block, of_layer = path.split("/", 4)
        numbers = segments[int(segment)].numbers(int(block))
        return np.stack(
            [made(f"model.layers.{n}.", of_layer, spec.shape[1:]) for n in numbers]
        )

    tree = jax.tree_util.tree_map_with_path(leaf, model.specs)
    if unread := sorted(set(theirs) - read):
        raise ValueError(f"no rule reads {', '.join(unread)}")
    return tree
