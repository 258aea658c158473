"""The containers of a decoder-only transformer, and what describes one to `jit`."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from moe.model.attention import Attention
from moe.model.feed_forward import FeedForward
from moe.model.moe_layer import Layer, MoE
from moe.model.norms import Norm
from moe.model.parameters import logical_axes, normal, scaled
from moe.model.positions import RelativeBias
from moe.settings import ModelSettings, RouterSettings
from partitioning import rules
from partitioning.grid import Grid
from partitioning.settings import UNCUT, PartitionSettings

# Of learned positions, beside tokens of unit variance: GPT-2 and GPT-3 draw positions
# with 0.01 and tokens with 0.02.
POSITION_STDDEV = 0.5


class Block(nnx.Module):
    """One layer: attention, then a dense or sparse feed-forward, each normalised."""

    def __init__(
        self,
        key: jax.Array,
        settings: ModelSettings,
        router: RouterSettings,
        *,
        sparse: bool,
    ):
        attention_key, feed_forward_key = jax.random.split(key)
        self.attention_norm = Norm(settings)
        self.attention = Attention(attention_key, settings)
        self.feed_forward_norm = Norm(settings)
        if sparse:
            self.moe = MoE(feed_forward_key, settings, router)
        else:
            self.feed_forward = FeedForward(
                feed_forward_key,
                model_dim=settings.model_dim,
                mlp_dim=settings.mlp_dim,
                activation=settings.activation,
                biases=settings.mlp_biases,
                init_scale=settings.init_scale,
            )


class Period(nnx.Module):
    """The layers that repeat: `moe_every - 1` dense ones, and a sparse one.

    Those at the bottom that are dense are periods of one layer.
    """

    def __init__(
        self,
        key: jax.Array,
        settings: ModelSettings,
        router: RouterSettings,
        *,
        dense: bool = False,
    ):
        num_blocks = 1 if dense else max(settings.moe_every, 1)
        keys = jax.random.split(key, num_blocks)
        place = -1 if dense else settings.sparse_in_period
        self.blocks = nnx.List(
            Block(keys[i], settings, router, sparse=i == place)
            for i in range(num_blocks)
        )


class Transformer(nnx.Module):
    """All parameters; those of the periods are stacked, for `jax.lax.scan`.

    `first_layers`, the dense ones at the bottom, are there only if there are any.
    """

    def __init__(self, key: jax.Array, settings: ModelSettings, router: RouterSettings):
        embedding_key, head_key, periods_key, first_key = jax.random.split(key, 4)
        V, M = settings.vocab_size, settings.model_dim

        def stack(key: jax.Array, number: int, **kind: bool) -> Period:
            keys = jax.random.split(key, number)
            definition = nnx.graphdef(
                nnx.eval_shape(lambda: Period(keys[0], settings, router, **kind))
            )
            return nnx.merge(
                definition,
                jax.vmap(lambda k: nnx.state(Period(k, settings, router, **kind)))(
                    keys
                ),
            )

        self.embedding = normal(
            embedding_key, (V, M), ("vocab", "embed"), stddev=M**-0.5
        )
        if settings.positions == "learned":
            self.positions = normal(
                jax.random.fold_in(embedding_key, 1),
                (settings.max_positions, M),
                ("position", "norm"),
                stddev=POSITION_STDDEV,
            )
        if settings.positions == "relative":
            self.relative = RelativeBias(jax.random.fold_in(embedding_key, 1), settings)
        if settings.num_first_layers:
            self.first_layers = stack(first_key, settings.num_first_layers, dense=True)
        self.periods = stack(periods_key, settings.num_periods)
        self.final_norm = Norm(settings)
        if not settings.tie_embeddings:
            self.head = scaled(
                head_key,
                (M, V),
                ("embed", "vocab"),
                fan_in=M,
                scale=settings.init_scale,
            )


@dataclasses.dataclass(frozen=True)
class Model:
    """Everything about a model but its parameters; static under `jit`.

    Attributes:
        settings: sizes and choices.
        router: settings of its routers.
        mesh: the mesh it runs on.
        definition: NNX's description of the containers.
        partition: what is cut over the mesh beside the batch and the experts.
        in_rounds: whether sparse layers compute what exceeds their row budget.
        routes_alike: whether no sequence is cut; see `moe_layer.Layer`.
    """

    settings: ModelSettings
    router: RouterSettings
    mesh: Mesh
    definition: Any
    partition: PartitionSettings = UNCUT
    in_rounds: bool = False
    routes_alike: bool = False

    @property
    def layer(self) -> Layer:
        """What the sparse layers share."""
        return Layer(
            self.settings,
            self.router,
            self.mesh,
            self.in_rounds,
            self.partition,
            self.routes_alike,
        )

    @property
    def grid(self) -> Grid:
        """The mesh as one device sees it."""
        return Grid(self.mesh, self.partition)

    @property
    def param_specs(self) -> Any:
        """How every parameter is cut, the same tree as the parameters."""
        axes = param_axes(self.settings, self.router)
        return rules.specs(
            param_shapes(self.settings, self.router), axes, self.grid.table
        )

    def bind(self, params: Any) -> Transformer:
        """Puts the arrays back into their containers."""
        return nnx.merge(self.definition, params)


def build(
    settings: ModelSettings,
    router: RouterSettings,
    mesh: Mesh,
    partition: PartitionSettings = UNCUT,
) -> Model:
    """Describes a model without allocating it."""
    definition = nnx.graphdef(_containers(settings, router))
    return Model(settings, router, mesh, definition, partition)


def init_params(key: jax.Array, settings: ModelSettings, router: RouterSettings) -> Any:
    """Draws all parameters: a pure dict of arrays of `param_dtype`.

    Selection biases stay float32: they move by less than bfloat16 can tell apart.
    """
    drawn = nnx.to_pure_dict(nnx.state(Transformer(key, settings, router)))

    def cast(path: Any, array: jax.Array) -> jax.Array:
        is_bias = jax.tree_util.keystr(path, simple=True).endswith("selection_bias")
        return array if is_bias else array.astype(settings.param_dtype)

    return jax.tree_util.tree_map_with_path(cast, drawn)


@functools.lru_cache
def param_shapes(settings: ModelSettings, router: RouterSettings) -> Any:
    """Returns the shape and type of every parameter, without drawing any."""
    return jax.eval_shape(lambda: init_params(jax.random.key(0), settings, router))


@functools.lru_cache
def param_axes(settings: ModelSettings, router: RouterSettings) -> Any:
    """Returns the logical axes of every parameter: the same dict, of tuples."""
    return logical_axes(_containers(settings, router))


@functools.lru_cache
def _containers(settings: ModelSettings, router: RouterSettings) -> Transformer:
    """The containers, with shapes for arrays."""
    return nnx.eval_shape(lambda: Transformer(jax.random.key(0), settings, router))
