"""The same model as ours, with arrays made of theirs by the rules."""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.public_models.families import Family
from launch.checkpoints.names import unnamed
from launch.exchange.matching import matched, ours_of
from launch.exchange.rules import read
from moe.model.build import build
from moe.model.transformer import Model
from moe.settings import ExecutionSettings
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings


class Computed(NamedTuple):
    """What a model makes of tokens.

    Attributes:
        gradients: those of the loss, as the parameters are.
        logits_BLV: its logits.
        chosen: how often each group chose each expert, [G, E] of each sparse layer, the
            encoder's first.
    """

    gradients: Any
    logits_BLV: np.ndarray
    chosen: list[np.ndarray]


def computed(
    family: Family,
    theirs: Mapping[str, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    label_BL: np.ndarray,
) -> Computed:
    """Computes what `theirs.computed` does, with the same arrays."""
    model = described(family)
    params = parameters(family, model, theirs)
    batch: dict[str, jax.Array] = {}
    for stack, token_BL in tokens.items():
        B, L = token_BL.shape
        place_L = jnp.arange(L, dtype=jnp.int32)
        batch |= {
            f"{stack}_input_tokens": jnp.asarray(token_BL, jnp.int32),
            f"{stack}_positions": jnp.broadcast_to(place_L, (B, L)),
            f"{stack}_segment_ids": jnp.ones((B, L), jnp.int32),
        }

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits_BLV, sums = forward(model, params, batch, jnp.arange(len(label_BL)))
        log_BLV = jax.nn.log_softmax(logits_BLV)
        of_label_BL = jnp.take_along_axis(log_BLV, label_BL[..., None], axis=-1)
        return -of_label_BL.mean(), (logits_BLV, sums)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (logits_BLV, sums)), gradients = run(params)
    by_layer: dict[tuple[int, int], Any] = {}
    stacks = list(model.layers.stacks)
    for place, each in zip(model.layers.sparse(), sums, strict=True):
        for number, chosen_GE in zip(place.numbers, each.chosen_GE, strict=True):
            by_layer[stacks.index(place.stack), number] = np.asarray(chosen_GE)
    chosen = [by_layer[place] for place in sorted(by_layer)]
    return Computed(gradients, np.asarray(logits_BLV), chosen)


def described(family: Family) -> Model:
    """Returns the model on one device, in float32."""
    execution = ExecutionSettings(dtype="float32", attention_block=0, remat="none")
    settings = family.model_settings(), family.router_settings()
    router = settings[1]
    if router.group_size > 1:  # a group is a row
        length = family.lengths().get("encoder", router.group_size)
        router = dataclasses.replace(router, group_size=length)
    return build(*settings, execution, make_mesh(MeshSettings()), encoder_router=router)


def parameters(family: Family, model: Model, theirs: Mapping[str, np.ndarray]) -> Any:
    """Returns all parameters of a model, each made of theirs by its rule.

    Raises:
        ExchangeError: a parameter cannot be made, or no rule reads one of theirs.
        ValueError: an array has another shape.
    """
    ours = list(ours_of(model.layers, family.layers))
    chosen, _ = matched(ours, [family.all_rules()], theirs, "", "the model")
    made: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    for each, rule in zip(ours, chosen, strict=True):
        made[each.path].append(read(theirs, each.prefix, rule, each.shape))
    of_layers = {each.path: each.layer is not None for each in ours}
    arrays = {
        path: np.stack(layers) if of_layers[path] else layers[0]
        for path, layers in made.items()
    }
    return unnamed(arrays, model.specs)
