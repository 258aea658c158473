"""Self-attention: projections, positions, and a cache; scores are in their own file."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe.model.attention_scores import (
    Bias,
    Seen,
    attend_blocked,
    attend_ring,
    attend_whole,
)
from moe.model.parameters import constant, scaled
from moe.model.positions import RelativeBias, rotate
from moe.settings import ModelSettings
from partitioning.grid import Grid

OUTPUT_NAME = "attention_output"  # kept by remat, so that no sum over devices repeats
NEVER = -1e30  # a logit that is never drawn


class Attention(nnx.Module):
    """Weights of multi-head attention (arXiv:1706.03762), with U heads of keys."""

    def __init__(self, key: jax.Array, settings: ModelSettings):
        M, N, D = settings.model_dim, settings.num_heads, settings.head_dim
        U = settings.kv_heads
        query_key, key_key, value_key, output_key = jax.random.split(key, 4)
        of_keys = ("embed", "kv_heads", "head_dim")
        drawn = functools.partial(scaled, scale=settings.init_scale)
        self.query = drawn(
            query_key, (M, N, D), ("embed", "heads", "head_dim"), fan_in=M
        )
        self.key = drawn(key_key, (M, U, D), of_keys, fan_in=M)
        self.value = drawn(value_key, (M, U, D), of_keys, fan_in=M)
        self.output = drawn(
            output_key, (N, D, M), ("heads", "head_dim", "embed"), fan_in=N * D
        )
        if settings.attention_biases:
            self.query_bias = constant((N, D), ("heads", "head_dim"), 0.0)
            self.key_bias = constant((U, D), ("kv_heads", "head_dim"), 0.0)
            self.value_bias = constant((U, D), ("kv_heads", "head_dim"), 0.0)
            self.output_bias = constant((M,), ("norm",), 0.0)
        if settings.positions == "relative_per_layer":
            self.relative = RelativeBias(jax.random.fold_in(key, 4), settings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far; T is the room for tokens.

    Attributes:
        key_BTUD: keys, rotated if positions are.
        value_BTUD: values.
    """

    key_BTUD: jax.Array
    value_BTUD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sight:
    """Who the queries and the keys of a pass are, in all of its layers.

    Attributes:
        queries: this device's cut of each row, [B, L].
        keys: the same if a ring brings the keys of other cuts, else the whole row.
        shared_table: of a relative bias that all layers share; None without.
    """

    queries: Seen
    keys: Seen
    shared_table: jax.Array | None = None


def sight(
    position_BL: jax.Array,
    segment_BL: jax.Array,
    prefix_BL: jax.Array | None,
    shared_table: jax.Array | None,
    grid: Grid,
) -> Sight:
    """Prepares what all layers of a pass need to know of its tokens.

    Args:
        position_BL: position of each token in its segment; this device's cut.
        segment_BL: segment of each token; 0 is padding.
        prefix_BL: above 0 for tokens of their segment's prefix, which also see those of
            the prefix that follow (arXiv:1910.10683, section 3.2.1); None without.
        shared_table: of a relative bias that all layers share.
        grid: the mesh.
    """
    length = segment_BL.shape[1]
    place_L = grid.index("context") * length + jnp.arange(length, dtype=jnp.int32)
    queries = Seen(
        place_BL=jnp.broadcast_to(place_L, segment_BL.shape),
        position_BL=position_BL,
        segment_BL=segment_BL,
        prefix_BL=prefix_BL,
    )
    keys = queries
    if grid.partition.context_attention == "all_gather":
        keys = jax.tree.map(lambda x_BL: grid.gather(x_BL, ["context"], 1), queries)
    return Sight(queries, keys, shared_table)


def attend(
    weights: Attention,
    x_BLM: jax.Array,
    seen: Sight,
    settings: ModelSettings,
    grid: Grid,
) -> jax.Array:
    """Attends within each segment to the tokens before and the token itself.

    Args:
        weights: the layer's, whole but for the heads, which are cut over `model`.
        x_BLM: this device's cut of the residual stream, normalised; the result has its
            dtype and cut, scores are float32.
        seen: of the pass.
        settings: of the model.
        grid: the mesh.
    """
    x_BLM = grid.enter(x_BLM)
    query_BLND, key_BLUD, value_BLUD = _project(
        weights, x_BLM, seen.queries.position_BL, settings
    )
    bias = _bias(weights, seen.shared_table, settings)
    given = (seen.queries, seen.keys, bias)
    ring = grid.partition.context_attention == "ring" and grid.size("context") > 1
    if not ring:
        key_BLUD, value_BLUD = (
            grid.gather(x, ["context"], 1) for x in (key_BLUD, value_BLUD)
        )
    length, block = key_BLUD.shape[1], settings.attention_block
    if ring:
        mixed_BLND = attend_ring(
            query_BLND,
            key_BLUD,
            value_BLUD,
            *given,
            axis="context",
            axis_size=grid.size("context"),
            block=block or length,
        )
    elif 0 < block <= length:
        mixed_BLND = attend_blocked(
            query_BLND, key_BLUD, value_BLUD, *given, block=block
        )
    else:
        mixed_BLND = attend_whole(query_BLND, key_BLUD, value_BLUD, *given)
    return _output(weights, mixed_BLND, grid)


def attend_cached(
    weights: Attention,
    x_BLM: jax.Array,
    start: jax.Array,
    first_B: jax.Array,
    cache: Cache,
    shared_table: jax.Array | None,
    settings: ModelSettings,
    grid: Grid,
    *,
    whole: bool = False,
) -> tuple[jax.Array, Cache]:
    """Attends from L new tokens, at `start` and on, to everything before them.

    Args:
        weights: the layer's parameters.
        x_BLM: activations of the new tokens, the same on all of `context` and `model`.
        start: int32 scalar, slots of the cache that are in use.
        first_B: int32, the slot of each row's first token. Slots before it are padding
            and never seen; positions count from it.
        cache: keys and values so far; slots from `start` on are overwritten.
        shared_table: of a relative bias that all layers share.
        settings: of the model.
        grid: the mesh, which cuts no sequence.
        whole: whether the new tokens are a prefix, and so see one another whole.
    """

    def there(place_T: jax.Array, end: jax.Array | int, prefix_T: jax.Array) -> Seen:
        place_BT = jnp.broadcast_to(place_T, (first_B.shape[0], place_T.shape[0]))
        inside_BT = (place_BT >= first_B[:, None]) & (place_BT < end)
        return Seen(
            place_BL=place_BT,
            position_BL=place_BT - first_B[:, None],
            segment_BL=inside_BT.astype(jnp.int32),
            prefix_BL=jnp.broadcast_to(prefix_T.astype(jnp.int32), place_BT.shape)
            if whole
            else None,
        )

    place_L = start + jnp.arange(x_BLM.shape[1], dtype=jnp.int32)
    end = start + x_BLM.shape[1]
    queries = there(place_L, end, jnp.ones_like(place_L))
    # Padding before a row's first token sees nothing, and is seen by none.
    queries = dataclasses.replace(queries, segment_BL=jnp.ones_like(queries.segment_BL))
    query_BLND, key_BLUD, value_BLUD = _project(
        weights, x_BLM, queries.position_BL, settings
    )
    cache = Cache(
        key_BTUD=jax.lax.dynamic_update_slice_in_dim(
            cache.key_BTUD, key_BLUD, start, axis=1
        ),
        value_BTUD=jax.lax.dynamic_update_slice_in_dim(
            cache.value_BTUD, value_BLUD, start, axis=1
        ),
    )
    place_T = jnp.arange(cache.key_BTUD.shape[1], dtype=jnp.int32)
    keys = there(place_T, end, place_T >= start)
    block = settings.attention_block
    mix = attend_whole
    if 0 < block <= x_BLM.shape[1]:  # a long prompt
        mix = functools.partial(attend_blocked, block=block)
    mixed_BLND = mix(
        query_BLND,
        cache.key_BTUD,
        cache.value_BTUD,
        queries,
        keys,
        _bias(weights, shared_table, settings),
    )
    return _output(weights, mixed_BLND, grid), cache


def _bias(
    weights: Attention, shared_table: jax.Array | None, settings: ModelSettings
) -> Bias | None:
    """What is added to the scores by distance."""
    table = (
        weights.relative.table[...] if hasattr(weights, "relative") else shared_table
    )
    return None if table is None else Bias(table, settings.relative_max_distance)


def _project(
    weights: Attention,
    x_BLM: jax.Array,
    position_BL: jax.Array,
    settings: ModelSettings,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values; the first two turned by their positions."""

    def project(name: str) -> jax.Array:
        matrix = getattr(weights, name)[...].astype(x_BLM.dtype)
        y_BLND = jnp.einsum("BLM,MND->BLND", x_BLM, matrix)
        if settings.attention_biases:
            y_BLND += getattr(weights, f"{name}_bias")[...].astype(x_BLM.dtype)
        return y_BLND

    query_BLND, key_BLUD, value_BLUD = map(project, ("query", "key", "value"))
    if settings.positions == "rotary":
        query_BLND, key_BLUD = (
            rotate(x, position_BL, settings.rope_base) for x in (query_BLND, key_BLUD)
        )
    return query_BLND, key_BLUD, value_BLUD


def _output(weights: Attention, mixed_BLND: jax.Array, grid: Grid) -> jax.Array:
    """The output projection, summed over the heads of all devices of `model`."""
    output_NDM = weights.output[...].astype(mixed_BLND.dtype)
    y_BLM = grid.leave(jnp.einsum("BLND,NDM->BLM", mixed_BLND, output_NDM))
    y_BLM = checkpoint_name(y_BLM, OUTPUT_NAME)
    if hasattr(weights, "output_bias"):
        y_BLM += weights.output_bias[...].astype(y_BLM.dtype)
    return y_BLM
