"""The sparse layer: route, dispatch, experts, combine, on each device of a mesh.

The three parts never see each other: a router returns an Assignment, a transport moves
tokens by it, experts see rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from moe.dispatch import all_to_all, choice, einsum, ragged, ring
from moe.dispatch.room import Room, room_for
from moe.model.experts import Layer, compute
from moe.model.feed_forward import (
    FeedForward,
    arrays,
    feed_forward,
)
from moe.model.parameters import constant, logical_axes, normal
from moe.model.weights import whole
from moe.routing import expert_choice, hashed, prototypes, sinkhorn, token_choice
from moe.routing.assignment import Assignment, RouterContext, RouterSums
from moe.settings import ModelSettings, RouterSettings, capacity
from partitioning import rules

ROUTERS: dict[str, Callable[..., Assignment]] = {
    "token_choice": token_choice.route,
    "prototypes": prototypes.route,
    "expert_choice": expert_choice.route,
    "hashed": hashed.route,
    "sinkhorn": sinkhorn.route,
}
TRANSPORTS: dict[str, ModuleType] = {
    "all_to_all": all_to_all,
    "einsum": einsum,
    "ring": ring,
    "ragged": ragged,
}


class MoE(nnx.Module):
    """Router and expert weights of one sparse layer."""

    def __init__(self, key: jax.Array, settings: ModelSettings, router: RouterSettings):
        router_key, experts_key, shared_key = jax.random.split(key, 3)
        M, E = settings.model_dim, settings.num_experts
        if router.family != "hashed":
            self.router = normal(router_key, (M, E), ("embed", "routed"), stddev=0.02)
        if router.selection_bias:
            # Moved by loads after each step; its gradient is always zero.
            self.selection_bias = constant((E,), ("routed",), 0.0)
        feed_forward_of = functools.partial(
            FeedForward, model_dim=M, init_scale=settings.init_scale
        )
        self.experts = feed_forward_of(
            experts_key,
            mlp_dim=settings.expert_mlp_dim,
            activation=settings.activation_of_experts,
            biases=settings.expert_biases,
            num_experts=E,
        )
        if settings.shared_expert_mlp_dim:
            self.shared_expert = feed_forward_of(
                shared_key,
                mlp_dim=settings.shared_expert_mlp_dim,
                activation=settings.activation,
                biases=settings.mlp_biases,
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a sparse layer is told of its tokens beside their activations.

    Attributes:
        mask_BL: True for real tokens.
        row_B: int32, global row number of each sequence in its batch; names the group
            whose random draws are made, wherever it is computed.
        id_BL: int32, for hash routing.
    """

    mask_BL: jax.Array
    row_B: jax.Array
    id_BL: jax.Array


def moe_layer(
    weights: MoE,
    x_BLM: jax.Array,
    tokens: Tokens,
    key: jax.Array | None,
    index: jax.Array | int,
    layer: Layer,
) -> tuple[jax.Array, RouterSums]:
    """Sends every token through the experts that its router picks.

    The layer by itself, on whole arrays; in a model all layers share one `shard_map`.

    Args:
        weights: the layer's parameters.
        x_BLM: activations, normalised.
        tokens: their mask, rows and ids.
        key: of this layer and step in training, None outside it.
        index: the layer's number in the model, for hash routing.
        layer: settings and mesh.
    Returns:
        y_BLM, zero for dropped tokens but for what a shared expert adds, and the
        router's sums per group.
    """
    definition, state = nnx.split(weights)
    axes, pure = logical_axes(weights), nnx.to_pure_dict(state)
    piece, by_row = rules.spec(["batch", "piece"]), rules.spec(["batch"])
    none = PartitionSpec()

    def on_device(
        arrays: Any, x_BLM: jax.Array, tokens: Tokens, key: Any, index: Any
    ) -> tuple[jax.Array, RouterSums]:
        arrays = whole(arrays, axes, layer.model, layer.grid)
        y_BLM, sums = sparse(
            nnx.merge(definition, arrays), x_BLM, tokens, key, index, layer
        )
        blocks = len(x_BLM) // layer.router.group_rows
        by_row = jax.tree.map(
            lambda sum_G: sum_G.reshape(blocks, -1, *sum_G.shape[1:]), sums
        )
        return y_BLM, by_row

    y_BLM, sums = layer.grid.run(
        on_device,
        in_specs=(
            rules.specs(pure, axes, layer.grid.table),
            piece,
            Tokens(piece, by_row, piece),  # type: ignore[arg-type]
            none,
            none,
        ),
        out_specs=(piece, piece),
    )(pure, x_BLM, tokens, key, jnp.asarray(index))
    return y_BLM, jax.tree.map(
        lambda sum_BG: sum_BG.reshape(-1, *sum_BG.shape[2:]), sums
    )


def sparse(
    weights: MoE,
    x_BLM: jax.Array,
    tokens: Tokens,
    key: jax.Array | None,
    index: jax.Array | int,
    layer: Layer,
) -> tuple[jax.Array, RouterSums]:
    """What one device does of the layer: its tokens, its experts; see `moe_layer`.

    A group is the same cut of `router.group_rows` consecutive sequences,
    `router.group_size` tokens in all: the same set of tokens on every mesh.

    Args:
        weights: the router, and this device's experts.
        x_BLM: this device's pieces of its sequences.
        tokens: those of the pieces.
        key: of this layer and step in training, None outside it.
        index: the layer's number in the model.
        layer: settings and mesh.
    """
    B, L, M = x_BLM.shape
    model, router, grid = layer.model, layer.router, layer.grid
    rows, length = router.group_rows, router.group_length
    cuts = () if layer.routes_alike else ("context", "model")
    here = L // length  # groups of this device's pieces of the same rows
    first = grid.index(*cuts) * here + jnp.arange(here)
    block_B = tokens.row_B[::rows] // rows
    group_BG = block_B[:, None] * (grid.size(*cuts) * here) + first

    def grouped(x_BL: jax.Array) -> jax.Array:
        x_BrGL = x_BL.reshape(B // rows, rows, here, length, *x_BL.shape[2:])
        return x_BrGL.swapaxes(1, 2).reshape(-1, router.group_size, *x_BL.shape[2:])

    def ungrouped(y_GSM: jax.Array) -> jax.Array:
        y_BGrLM = y_GSM.reshape(B // rows, here, rows, length, M)
        return y_BGrLM.swapaxes(1, 2).reshape(B, L, M)

    routing = {
        name: getattr(weights, name)[...]
        for name in ("router", "selection_bias")
        if hasattr(weights, name)
    }
    if router.family == "hashed":
        routing["order"] = hashed.vocabulary_order(
            router.hash_seed, jnp.asarray(index), model.vocab_size
        )
    y_GSM, sums = _core(
        routing,
        arrays(weights.experts),
        grouped(x_BLM),
        grouped(tokens.mask_BL),
        grouped(tokens.id_BL),
        group_BG.reshape(-1),
        key,
        layer=layer,
    )
    y_BLM = ungrouped(y_GSM)
    if hasattr(weights, "shared_expert"):
        y_BLM += _shared(weights.shared_expert, x_BLM, layer)
    return y_BLM, sums


def _shared(weights: FeedForward, x_BLM: jax.Array, layer: Layer) -> jax.Array:
    """The experts that every token visits: a dense layer, cut over `model`."""
    grid, dim = layer.grid, 1
    if layer.routes_alike:
        add_up = functools.partial(grid.sum, axes=["model"])
    else:
        x_BLM = grid.gather(x_BLM, ["model"], dim)
        add_up = functools.partial(grid.scatter_sum, axes=["model"], dim=dim)
    return feed_forward(weights, x_BLM, layer.model.activation, add_up)


def _core(
    routing: dict[str, jax.Array],
    experts: dict[str, jax.Array],
    x_gSM: jax.Array,
    mask_gS: jax.Array,
    id_gS: jax.Array,
    group_g: jax.Array,
    key: jax.Array | None,
    *,
    layer: Layer,
) -> tuple[jax.Array, RouterSums]:
    """Route, dispatch, experts, combine."""
    transport, _, room = exchange_of(layer, mask_gS.size, train=key is not None)
    keys_g = None if key is None else _group_keys(key, group_g)
    assignment = _assign(routing, x_gSM, mask_gS, id_gS, keys_g, layer)
    dropout_g = None
    if keys_g is not None and layer.model.expert_dropout > 0:
        dropout_g = keys_g["dropout"]

    def one_round(
        x_gSM: jax.Array, first_row: jax.Array | int
    ) -> tuple[jax.Array, jax.Array]:
        rows, size_e, plan = transport.dispatch(x_gSM, assignment, room, first_row)
        rows = compute(experts, rows, size_e, dropout_g, room, layer)
        y_GSM = transport.combine(rows, assignment, plan, room)
        return y_GSM, jnp.zeros((), jnp.int32) if plan is None else plan.excess

    if layer.in_rounds and room.num_rounds > 1:
        y_GSM = _in_rounds(one_round, x_gSM, assignment, room, layer)
        return transport.finish(y_GSM, room, x_gSM.dtype), assignment.sums
    y_GSM, excess = one_round(x_gSM, 0)
    y_gSM = transport.finish(y_GSM, room, x_gSM.dtype)
    excess_G = assignment.sums.excess_G.at[0].set(excess)
    return y_gSM, dataclasses.replace(assignment.sums, excess_G=excess_G)


def exchange_of(layer: Layer, tokens: int, *, train: bool) -> tuple[Any, str, Room]:
    """Returns the transport of a pass, its name, and the sizes of its exchange.

    Args:
        layer: settings and mesh.
        tokens: tokens that each device routes at once.
        train: whether capacity is that of training.
    """
    axis_size = layer.mesh.shape["expert"]
    has_ragged = choice.mesh_has_ragged_exchange(layer.mesh)
    name, _ = choice.pick(layer.model, layer.router, axis_size, has_ragged, train=train)
    room = room_for(
        layer.router,
        layer.model.num_experts,
        tokens,
        axis_size,
        layer.mesh.devices.flat[0].platform,
        train=train,
    )
    if name in choice.PADDED:  # the rectangle holds all that have a slot
        room = dataclasses.replace(room, num_rounds=1)
    return TRANSPORTS[name], name, room


def _in_rounds(
    one_round: Callable[..., tuple[jax.Array, jax.Array]],
    x_gSM: jax.Array,
    assignment: Assignment,
    room: Room,
    layer: Layer,
) -> jax.Array:
    """Computes R rows at a time, as many times as the fullest device needs.

    Each round keeps nothing for the backward pass but its inputs, so memory is that of
    one round; the static number of rounds is that of the worst assignment, and those
    that no device needs are skipped. Outputs, and the gradients of tokens, are summed
    over the rounds in float32, as within one.
    """
    wide_gSM = x_gSM.astype(jnp.float32)
    size_E = jnp.sum(assignment.sums.kept_GE, axis=0)
    size_E = lax.psum(size_E, "expert")
    fullest = jnp.max(jnp.sum(size_E.reshape(room.axis_size, -1), axis=1))
    fullest = layer.grid.max(fullest)

    def output(first_row: jax.Array) -> jax.Array:
        return one_round(wide_gSM.astype(x_gSM.dtype), first_row)[0]

    @jax.checkpoint
    def add_round(y_GSM: jax.Array, first_row: jax.Array) -> tuple[jax.Array, None]:
        more_GSM = lax.cond(
            fullest > first_row,
            lambda: output(first_row),
            lambda: jnp.zeros_like(y_GSM),
        )
        return y_GSM + more_GSM, None

    first_rows = jnp.arange(room.num_rounds, dtype=jnp.int32) * room.num_rows
    shape = jax.eval_shape(output, first_rows[0]).shape
    return lax.scan(add_round, jnp.zeros(shape, jnp.float32), first_rows)[0]


def _assign(
    routing: dict[str, jax.Array],
    x_gSM: jax.Array,
    mask_gS: jax.Array,
    id_gS: jax.Array,
    keys_g: dict[str, jax.Array] | None,
    layer: Layer,
) -> Assignment:
    """Router logits in true float32, and the choice made from them."""
    router, E = layer.router, layer.model.num_experts
    clean_gSE = None
    if "router" in routing:
        x_gSM = x_gSM.astype(router.logit_dtype)
        if keys_g is not None and router.jitter > 0:
            noise_gSM = jax.vmap(
                lambda k: jax.random.uniform(k, x_gSM.shape[1:], minval=-1, maxval=1)
            )(keys_g["jitter"])
            x_gSM = x_gSM * (1 + router.jitter * noise_gSM)
        # On TPU, and with TF32, a plain float32 product would multiply in lower
        # precision.
        logits_gSE = jnp.einsum(
            "gSM,ME->gSE",
            x_gSM.astype(router.logit_dtype),
            routing["router"].astype(router.logit_dtype),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        if keys_g is not None and router.logit_noise > 0:
            clean_gSE = logits_gSE
            noise_gSE = jax.vmap(lambda k: jax.random.normal(k, clean_gSE.shape[1:]))(
                keys_g["noise"]
            )
            logits_gSE = clean_gSE + router.logit_noise / E * noise_gSE
    else:
        logits_gSE = jnp.zeros((*mask_gS.shape, E))
    context = RouterContext(
        mask_GS=mask_gS,
        key_G=None if keys_g is None else keys_g["route"],
        bias_E=routing.get("selection_bias"),
        clean_logits_GSE=clean_gSE,
        token_GS=id_gS if "order" in routing else None,
        order_V=routing.get("order"),
    )
    slots = capacity(router, E, train=keys_g is not None)
    return ROUTERS[router.family](logits_gSE, context, router, capacity=slots)


def _group_keys(key: jax.Array, group_g: jax.Array) -> dict[str, jax.Array]:
    """Keys per group for each use, functions of its global index alone."""
    uses = ("jitter", "route", "noise", "dropout")
    key_gU = jax.vmap(
        lambda g: jax.random.split(jax.random.fold_in(key, g), len(uses))
    )(group_g)
    return {use: key_gU[:, i] for i, use in enumerate(uses)}
