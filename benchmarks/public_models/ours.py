"""The same model as ours, with arrays made of theirs by the rules."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_models.families import Family
from launch.checkpoints.names import unnamed
from launch.exchange.matching import matched, ours_of
from launch.exchange.rules import Rules, read
from moe.model.build import build
from moe.model.transformer import Model
from moe.settings import ExecutionSettings
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

LAYERS = {"decoder": "model.layers.{}."}


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
        ExchangeError: a parameter cannot be made, or no rule reads one of theirs.
        ValueError: an array has another shape.
    """
    ours = list(ours_of(model.layers, LAYERS))
    chosen, _ = matched(ours, [rules], theirs, "", "the model")
    made: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for each, rule in zip(ours, chosen, strict=True):
        made[each.path].append(read(theirs, each.prefix, rule, each.shape))
    of_layers = {each.path: each.layer is not None for each in ours}
    arrays = {
        path: np.stack(layers) if of_layers[path] else layers[0]
        for path, layers in made.items()
    }
    return unnamed(arrays, model.specs)
