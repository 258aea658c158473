"""The forward pass of a decoder-only transformer.

The whole pass is one `shard_map` over all mesh axes: what follows is what one device
does, and each collective, forward and backward, is one that is written here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe.model.attention import Attention, Cache, attend, attend_cached, sight
from moe.model.containers import (
    Block,
    Model,
    Transformer,
    build,
    init_params,
    param_axes,
    param_shapes,
)
from moe.model.embedding import logits_of, look_up
from moe.model.feed_forward import feed_forward
from moe.model.moe_layer import Tokens, sparse
from moe.model.norms import normalise
from moe.model.parameters import logical_axes
from moe.model.remat import rematerialised
from moe.model.weights import whole
from moe.routing.assignment import RouterSums
from partitioning import rules
from partitioning.settings import BATCH_AXES

__all__ = [
    "Batch",
    "Model",
    "Transformer",
    "batch_spec",
    "build",
    "forward",
    "forward_cached",
    "head",
    "hidden",
    "init_params",
    "param_axes",
    "param_shapes",
]

Batch = dict[str, jax.Array]  # SeqIO's decoder features, each [B, L]


# ------------------------------------------------------------------ on whole arrays


def forward(
    model: Model,
    params: Any,
    batch: Batch,
    row_B: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, RouterSums | None]:
    """Computes logits of every position, and what the routers saw.

    Args:
        model: the static description.
        params: as `init_params` returns them.
        batch: `decoder_input_tokens`, `decoder_positions`, `decoder_segment_ids`, and
            `decoder_causal_attention` if it has prefixes, 1 on their tokens.
        row_B: int32, global row number of each sequence; names its random draws.
        key: of this step, in training; None draws nothing and drops no token unless
            `eval_capacity_factor` says so.
    Returns:
        logits_BLV in float32, and RouterSums with a leading dimension of sparse
        layers, None in a dense model.
    """

    def on_device(params: Any, batch: Batch, row_B: Any, key: Any) -> Any:
        x_BLM, sums = hidden(model, params, batch, row_B, key)
        logits_BLV = logits_of(head(model, params), x_BLM, model.settings, model.grid)
        if sums is not None:  # groups of the same rows are neighbours
            blocks = len(row_B) // model.router.group_rows
            sums = jax.tree.map(
                lambda s: s.reshape(s.shape[0], blocks, -1, *s.shape[2:]), sums
            )
        return logits_BLV, sums

    by_row, piece = rules.spec(["batch"]), rules.spec([None, "batch", "piece"])
    logits_BLV, sums = model.grid.run(
        on_device,
        in_specs=(model.param_specs, batch_spec(batch), by_row, PartitionSpec()),
        out_specs=(rules.spec(["batch", "length", "vocab"]), piece),
    )(params, batch, row_B, key)
    if sums is not None:
        sums = jax.tree.map(lambda s: s.reshape(s.shape[0], -1, *s.shape[3:]), sums)
    return logits_BLV, sums


def batch_spec(batch: Batch) -> dict[str, PartitionSpec]:
    """How the features of a batch are cut."""
    return dict.fromkeys(batch, rules.spec(["batch", "length"]))


def forward_cached(
    model: Model,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array,
    start: jax.Array,
    first_B: jax.Array,
    cache: tuple[Cache, ...],
    *,
    whole: bool = False,
    last_only: bool = False,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Computes logits of L new tokens after `start` tokens already in the cache.

    No sequence is cut: devices along `context` do the same, those along `model` their
    heads and widths.

    Args:
        model: the static description; its groups are the L tokens of one sequence.
        params: as `init_params` returns them.
        tokens_BL: input tokens.
        mask_BL: False for padding, which takes no slot of an expert.
        start: int32 scalar, where the first of them goes.
        first_B: int32, where the first token of each row is; before it is padding.
        cache: one for each stack, `[periods, layers of a period, B, T, U, D]`.
        whole: whether the new tokens are a prefix, and so see one another whole.
        last_only: whether logits are wanted of the last token alone.
    Returns:
        logits_BLV, or those of the last token, [B, 1, V], and the cache with the new
        tokens in it.
    """
    model = dataclasses.replace(
        model,
        partition=dataclasses.replace(model.partition, sequence_parallel=False),
        routes_alike=True,
    )
    rows = rules.spec(["batch", None])
    caches = PartitionSpec(None, None, BATCH_AXES, None, "model", None)
    return model.grid.run(
        functools.partial(_cached, model, whole=whole, last_only=last_only),
        in_specs=(
            model.param_specs,
            rows,
            rows,
            PartitionSpec(),
            rules.spec(["batch"]),
            caches,
        ),
        out_specs=(rules.spec(["batch", None, "vocab"]), caches),
    )(params, tokens_BL, mask_BL, start, first_B, cache)


# ------------------------------------------------------------------- on one device


def hidden(
    model: Model,
    params: Any,
    batch: Batch,
    row_B: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, RouterSums | None]:
    """Computes the activations that logits are made of, on one device; see `forward`.

    Returns:
        x_BLM, normalised, of this device's cut of its rows, the same on all of `model`;
        and the router sums of its groups.
    """
    grid, settings = model.grid, model.settings
    weights = model.bind(params)
    id_BL, segment_BL = batch["decoder_input_tokens"], batch["decoder_segment_ids"]
    x_BLM = _embed(model, weights, id_BL, batch["decoder_positions"])
    seen = sight(
        batch["decoder_positions"],
        segment_BL,
        batch.get("decoder_causal_attention"),
        _shared_table(weights),
        grid,
    )
    piece = functools.partial(grid.piece, axes=["model"], dim=1)
    tokens = Tokens(mask_BL=piece(segment_BL > 0), row_B=row_B, id_BL=piece(id_BL))

    def mix(attention: Attention, y_BLM: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return attend(attention, y_BLM, seen, settings, grid), None

    sums = None
    for period in _stacks(model, weights):
        layers = [_layer(model, block, mix, tokens, key) for block in period.blocks]

        def one_period(
            x_BLM: jax.Array, scanned: Any, layers: Any = layers
        ) -> tuple[jax.Array, Any]:
            arrays, first = scanned
            sums = None
            for i, layer in enumerate(layers):
                x_BLM, block_sums, _ = layer(x_BLM, arrays[i], first + i, None)
                sums = block_sums if block_sums is not None else sums
            return x_BLM, sums

        x_BLM, sums = jax.lax.scan(
            one_period,
            x_BLM,
            (period.arrays, period.first),
            unroll=not settings.scan_layers,
        )
    return grid.enter(normalise(weights.final_norm, x_BLM)), sums


def head(model: Model, params: Any) -> jax.Array:
    """Returns this device's part of the output projection, [M, V]."""
    tied = model.settings.tie_embeddings
    return params["embedding"].T if tied else params["head"]


def _cached(
    model: Model,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array,
    start: jax.Array,
    first_B: jax.Array,
    cache: tuple[Cache, ...],
    *,
    whole: bool,
    last_only: bool,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """What one device does of `forward_cached`."""
    weights, grid = model.bind(params), model.grid
    position_BL = start + jnp.arange(tokens_BL.shape[1]) - first_B[:, None]
    x_BLM = _embed(model, weights, tokens_BL, position_BL)
    index = grid.index(*BATCH_AXES)
    row_B = index * len(first_B) + jnp.arange(len(first_B))
    tokens = Tokens(mask_BL=mask_BL, row_B=row_B, id_BL=tokens_BL)

    def mix(
        attention: Attention, y_BLM: jax.Array, layer_cache: Cache
    ) -> tuple[jax.Array, Cache]:
        return attend_cached(
            attention,
            y_BLM,
            start,
            first_B,
            layer_cache,
            _shared_table(weights),
            model.settings,
            grid,
            whole=whole,
        )

    new_caches = []
    for period, old_cache in zip(_stacks(model, weights), cache, strict=True):
        layers = [_layer(model, block, mix, tokens, None) for block in period.blocks]

        def one_period(
            x_BLM: jax.Array, scanned: Any, layers: Any = layers
        ) -> tuple[jax.Array, Cache]:
            arrays, first, cache_I = scanned
            filled = []
            for i, layer in enumerate(layers):
                layer_cache = jax.tree.map(lambda c, i=i: c[i], cache_I)
                x_BLM, _, new_cache = layer(x_BLM, arrays[i], first + i, layer_cache)
                filled.append(new_cache)
            return x_BLM, jax.tree.map(lambda *c: jnp.stack(c), *filled)

        x_BLM, new_cache = jax.lax.scan(
            one_period, x_BLM, (period.arrays, period.first, old_cache)
        )
        new_caches.append(new_cache)
    x_BLM = normalise(weights.final_norm, x_BLM[:, -1:] if last_only else x_BLM)
    logits_BLV = logits_of(head(model, params), x_BLM, model.settings, grid)
    return logits_BLV, tuple(new_caches)


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Periods of one kind.

    Attributes:
        blocks: containers of the layers of a period, stacked, for what is static.
        arrays: their arrays, one tree per layer, with a leading dimension of periods.
        first: number of the first layer of each period.
    """

    blocks: list[Block]
    arrays: list[Any]
    first: jax.Array


def _stacks(model: Model, weights: Transformer) -> list[_Stack]:
    """The stacks of periods from the bottom up."""
    dense = model.settings.num_first_layers
    per_period = max(model.settings.moe_every, 1)
    first = dense + per_period * jnp.arange(model.settings.num_periods)
    found = [(weights.first_layers, jnp.arange(dense))] if dense else []
    return [
        _Stack(
            list(stack.blocks),
            [nnx.to_pure_dict(nnx.state(block)) for block in stack.blocks],
            first,
        )
        for stack, first in [*found, (weights.periods, first)]
    ]


def _layer(
    model: Model,
    stacked: Block,
    mix: Callable[[Attention, jax.Array, Any], tuple[jax.Array, Any]],
    tokens: Tokens,
    key: jax.Array | None,
) -> Callable[..., tuple[jax.Array, RouterSums | None, Any]]:
    """Makes one layer a function of activations, its arrays, its number and a cache."""
    definition = nnx.graphdef(stacked)
    axes = jax.tree.map(lambda axes: axes[1:], logical_axes(stacked), is_leaf=_is_axes)
    settings, table = model.settings, model.grid.table
    remat = settings.remat
    if hasattr(stacked, "moe") and settings.sparse_remat != "same":
        remat = settings.sparse_remat

    def layer(x_BLM: jax.Array, arrays: Any, index: jax.Array, cache: Any) -> Any:
        arrays = whole(arrays, axes, settings, model.grid)
        block = nnx.merge(definition, arrays)
        layer_key = None if key is None else jax.random.fold_in(key, index)
        return _block(model, block, x_BLM, mix, tokens, layer_key, index, cache)

    gathers = any(model.grid.size(*table[axis]) > 1 for axis in rules.FULLY_SHARDED)
    return rematerialised(layer, remat, gathers_weights=gathers)


def _is_axes(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _block(
    model: Model,
    block: Block,
    x_BLM: jax.Array,
    mix: Callable[[Attention, jax.Array, Any], tuple[jax.Array, Any]],
    tokens: Tokens,
    key: jax.Array | None,
    index: jax.Array,
    cache: Any,
) -> tuple[jax.Array, RouterSums | None, Any]:
    """Adds attention and feed-forward to the residual stream."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    grid = model.grid

    y_BLM, cache = mix(block.attention, normalise(block.attention_norm, x_BLM), cache)
    x_BLM = x_BLM + _dropout(y_BLM, keys[0], tokens.row_B, model)

    y_BLM, sums = normalise(block.feed_forward_norm, x_BLM), None
    if hasattr(block, "moe"):
        alike = model.routes_alike or grid.cuts_sequence or grid.size("model") == 1
        if not alike:  # activations are whole on all of `model`: each routes a piece
            y_BLM = grid.piece(y_BLM, ["model"], 1)
        y_BLM, sums = sparse(block.moe, y_BLM, tokens, keys[1], index, model.layer)
        if not alike:
            y_BLM = grid.gather(y_BLM, ["model"], 1)
    else:
        y_BLM = feed_forward(
            block.feed_forward, grid.enter(y_BLM), model.settings.activation, grid.leave
        )
    return x_BLM + _dropout(y_BLM, keys[2], tokens.row_B, model), sums, cache


def _embed(
    model: Model, weights: Transformer, tokens_BL: jax.Array, position_BL: jax.Array
) -> jax.Array:
    # Scaled to unit variance: beside a smaller residual stream the first attention's
    # mean would dominate, all tokens look alike, and the routers send them to the same
    # experts. A tied output then starts out predicting its own input.
    settings, grid = model.settings, model.grid
    x_BLM = look_up(weights.embedding[...], tokens_BL, settings, grid)
    x_BLM = x_BLM * settings.model_dim**0.5
    if settings.positions == "learned":
        position_BL = grid.residual(position_BL)
        x_BLM += jnp.take(weights.positions[...], position_BL, axis=0).astype(
            x_BLM.dtype
        )
    return x_BLM.astype(settings.dtype)


def _shared_table(weights: Transformer) -> jax.Array | None:
    """The relative bias of all layers, if they share one."""
    return weights.relative.table[...] if hasattr(weights, "relative") else None


def _dropout(
    x_BLM: jax.Array, key: jax.Array | None, row_B: jax.Array, model: Model
) -> jax.Array:
    """Zeroes activations; draws depend on the global row and place of a token alone."""
    rate, grid = model.settings.dropout, model.grid
    if key is None or rate == 0:
        return x_BLM
    axes = ("context", "model") if grid.cuts_sequence else ("context",)
    length = x_BLM.shape[1]
    place_L = grid.index(*axes) * length + jnp.arange(length)

    def keep(row: jax.Array, place: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), place)
        return jax.random.bernoulli(token_key, 1 - rate, x_BLM.shape[2:])

    keep_BLM = jax.vmap(jax.vmap(keep, (None, 0)), (0, None))(row_B, place_L)
    return jnp.where(keep_BLM, x_BLM / (1 - rate), 0).astype(x_BLM.dtype)
