"""What a model of ours makes of a few tokens, one layer in memory at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from launch.exchange.seen import EMBEDDED, Seen, Tokens
from moe.layers import Block, Layers, Stack, with_routers
from moe.model import block, embedding, head, inventory, norms
from moe.model.execution import Execution
from moe.model.transformer import Batch, Model, view_of
from moe.model.view import Source
from moe.routing.assignment import RouterSums
from moe.settings import ExecutionSettings
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

_BELOW = ("embedding", "positions", "token_types", "embedding_norm", "patches")
_ABOVE = {  # by whether the output is the embedding
    True: ("embedding", "output_bias", "transform"),
    False: ("head", "output_bias", "transform"),
}

# Function of a path in the tree of parameters and of a place in the array's first dim,
# None where all of it is wanted.
Reader = Callable[[str, int | None], np.ndarray]


class _Layer(NamedTuple):
    """One layer, and where its arrays are."""

    number: int
    block: Block
    path: str
    place: int


def observe(layers: Layers, read: Reader, tokens: Tokens) -> Seen:
    """Computes in float32 what each layer makes of tokens, if no expert is ever full.

    Args:
        layers: what the model is. Its routers choose token by token.
        read: function that gives an array of it.
        tokens: int32[B, L] of each stack.
    """
    layers = token_by_token(layers)
    settings = ExecutionSettings(dtype="float32", attention_block=0, remat="none")
    model = Model(layers, Execution(settings, make_mesh(MeshSettings())))
    batch = batch_of(tokens)
    streams: dict[str, np.ndarray] = {}
    choices: dict[str, np.ndarray] = {}
    x_BLM: jax.Array | None = None
    with jax.default_matmul_precision("highest"):
        tables = _of_no_layer(layers, read, _BELOW)
        embedded = {
            name: _embedded(model, name, tables, batch) for name in layers.stacks
        }
        del tables  # which are large
        whole = _of_no_layer(layers, read, layers.stacks)
        for name, each in layers.stacks.items():
            source, x_BLM = x_BLM, embedded[name]
            streams[EMBEDDED.format(name)] = _flat(x_BLM)
            for one in _each_layer(name, each):
                w = _weights(one, each.width, read)
                x_BLM, chosen_TE = _through(
                    model, name, one.block, w, x_BLM, whole, batch, source, one.number
                )
                place = f"{name} layer {one.number}"
                streams[place] = _flat(x_BLM)
                if chosen_TE is not None:
                    choices[place] = np.asarray(chosen_TE) > 0
            x_BLM = _normed(model, name, whole, x_BLM)
        above = _of_no_layer(layers, read, _ABOVE[layers.embedding.tied])
        if "transform" in above:
            x_BLM = _transformed(model, above, x_BLM)
        logits_BLV = _logits(model, above, x_BLM)
    return Seen(streams, choices, _flat(logits_BLV))


def token_by_token(layers: Layers) -> Layers:
    """Returns the layers with experts that are never full, and a group a token."""
    return with_routers(
        layers,
        lambda router: dataclasses.replace(
            router, group_size=1, capacity_factor=0.0, eval_capacity_factor=0.0
        ),
    )


def _flat(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, x.shape[-1])


def batch_of(tokens: Tokens) -> Batch:
    """Returns a model's features of rows of one segment each."""
    batch: Batch = {}
    for name, token_BL in tokens.items():
        place_L = jnp.arange(token_BL.shape[1], dtype=jnp.int32)
        batch |= {
            f"{name}_input_tokens": jnp.asarray(token_BL, jnp.int32),
            f"{name}_positions": jnp.broadcast_to(place_L, token_BL.shape),
            f"{name}_segment_ids": jnp.ones(token_BL.shape, jnp.int32),
        }
    return batch


# --------------------------------------------------------------------- what is read


def _of_no_layer(layers: Layers, read: Reader, names: Iterable[str]) -> dict[str, Any]:
    """Reads what no layer has, of the names that there are."""
    found = inventory.specs(layers)
    specs = {
        name: {key: value for key, value in found[name].items() if key != "layers"}
        if name in layers.stacks
        else found[name]
        for name in names
        if name in found
    }
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: read(_name(keys), None), specs
    )


def _each_layer(name: str, described: Stack) -> Iterator[_Layer]:
    """Yields the layers of a stack from the bottom up."""
    for s, segment in enumerate(described.segments):
        for repeat in range(segment.repeats):
            for b, each in enumerate(segment.blocks):
                number = segment.numbers(b)[repeat]
                yield _Layer(number, each, f"{name}/layers/{s}/{b}", repeat)


def _weights(layer: _Layer, width: int, read: Reader) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: read(f"{layer.path}/{_name(keys)}", layer.place),
        block.specs(layer.block, width),
    )


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


# ----------------------------------------------------------------- what is computed


def _on_device(model: Model, function: Callable[..., Any], *given: Any) -> Any:
    """Runs a part of a pass on one device, where nothing is cut."""
    everything = PartitionSpec()
    return model.grid.run(function, in_specs=everything, out_specs=everything)(*given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _embedded(model: Model, name: str, tables: Any, batch: Batch) -> jax.Array:
    def run(tables: Any, batch: Batch) -> jax.Array:
        seen = view_of(model, name, {name: {}}, batch, _rows(batch, name))
        ids, s = batch[f"{name}_input_tokens"], model.layers.embedding
        return embedding.embed(tables, ids, seen, s, model.execution)

    return _on_device(model, run, tables, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _through(
    model: Model,
    name: str,
    each: Block,
    w: Any,
    x_BLM: jax.Array,
    whole: Any,
    batch: Batch,
    source_BLM: jax.Array | None,
    number: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Sends a stream through one layer; returns it, and whom each token chose."""

    def run(w: Any, x_BLM: Any, whole: Any, batch: Batch, source: Any, n: Any) -> Any:
        row_B = _rows(batch, name)
        if source is not None:
            keys = view_of(model, "encoder", whole, batch, row_B).keys
            source = Source(keys, source)
        seen = view_of(model, name, whole, batch, row_B, source)
        given = seen, None, None, n, model.layers.stacks[name], model.execution
        x_BLM, _, counted = block.run(each, w, x_BLM, *given)
        chosen = [sums.chosen_GE for sums in counted if isinstance(sums, RouterSums)]
        return x_BLM, chosen[0] if chosen else None

    given = w, x_BLM, whole, batch, source_BLM, jnp.asarray(number)
    return _on_device(model, run, *given)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normed(model: Model, name: str, whole: Any, x_BLM: jax.Array) -> jax.Array:
    norm = model.layers.stacks[name].norm
    if norm is None:
        return x_BLM
    return norms.normalise(whole[name]["norm"], x_BLM, norm)


@functools.partial(jax.jit, static_argnums=(0,))
def _transformed(model: Model, above: Any, x_BLM: jax.Array) -> jax.Array:
    def run(w: Any, x_BLM: jax.Array) -> jax.Array:
        return head.transform(w, x_BLM, model.layers.embedding, model.execution)

    return _on_device(model, run, above["transform"], x_BLM)


@functools.partial(jax.jit, static_argnums=(0,))
def _logits(model: Model, whole: Any, x_BLM: jax.Array) -> jax.Array:
    def run(whole: Any, x_BLM: jax.Array) -> jax.Array:
        output = head.projection(whole, model.layers.embedding)
        return head.logits_of(output, x_BLM, model.execution)

    return _on_device(model, run, whole, x_BLM)


def _rows(batch: Batch, name: str) -> jax.Array:
    return jnp.arange(len(batch[f"{name}_input_tokens"]))
