"""The sparse layer: route, dispatch, experts, combine, inside one `shard_map`.

The three parts never see each other: a router returns an Assignment, a transport moves
tokens by it, experts see rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from moe.dispatch import all_to_all, choice, einsum, ragged, ring
from moe.dispatch.exchange import all_maps
from moe.dispatch.room import Room, room_for
from moe.model.feed_forward import (
    FeedForward,
    arrays,
    expert_feed_forward,
    feed_forward,
)
from moe.model.grouped import grouped_feed_forward
from moe.model.parameters import constant, normal
from moe.routing import expert_choice, hashed, prototypes, sinkhorn, token_choice
from moe.routing.assignment import Assignment, RouterContext, RouterSums
from moe.settings import ModelSettings, RouterSettings, capacity
from partitioning import rules
from partitioning.settings import BATCH_AXES

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
            self.router = normal(router_key, (M, E), ("embed", None), stddev=0.02)
        if router.selection_bias:
            # Moved by loads after each step; its gradient is always zero.
            self.selection_bias = constant((E,), (None,), 0.0)
        feed_forward_of = functools.partial(
            FeedForward,
            model_dim=M,
            activation=settings.activation,
            biases=settings.mlp_biases,
            init_scale=settings.init_scale,
        )
        self.experts = feed_forward_of(
            experts_key, mlp_dim=settings.expert_mlp_dim, num_experts=E
        )
        if settings.shared_expert_mlp_dim:
            self.shared_expert = feed_forward_of(
                shared_key, mlp_dim=settings.shared_expert_mlp_dim
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """What all sparse layers of a model share; static under `jit`.

    Attributes:
        model: settings of the model.
        router: settings of the router; S divides L.
        mesh: the mesh; its `expert` axis divides E.
        in_rounds: compute rows beyond the row budget in further rounds instead of
            reporting them.
    """

    model: ModelSettings
    router: RouterSettings
    mesh: Mesh
    in_rounds: bool = False


def moe_layer(
    weights: MoE,
    x_BLM: jax.Array,
    tokens: Tokens,
    key: jax.Array | None,
    index: jax.Array | int,
    layer: Layer,
) -> tuple[jax.Array, RouterSums]:
    """Sends every token through the experts that its router picks.

    Groups are cuts of `router.group_size` tokens of one sequence, so a group is the
    same set of tokens on every mesh.

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
    B, L, M = x_BLM.shape
    S = layer.router.group_size
    model, router = layer.model, layer.router
    group_G = (tokens.row_B[:, None] * (L // S) + jnp.arange(L // S)).reshape(-1)
    routing = {
        name: getattr(weights, name)[...]
        for name in ("router", "selection_bias")
        if hasattr(weights, name)
    }
    if router.family == "hashed":
        routing["order"] = hashed.vocabulary_order(
            router.hash_seed, jnp.asarray(index), model.vocab_size
        )
    experts = arrays(weights.experts)
    by_group, by_expert, whole = (
        rules.spec(["group"]),
        rules.spec(["expert"]),
        PartitionSpec(),
    )
    core = functools.partial(_core, layer=layer)
    if layer.mesh.size > 1:  # else XLA would still copy gradients in its reductions
        core = jax.shard_map(
            core,
            mesh=layer.mesh,
            in_specs=(
                dict.fromkeys(routing, whole),
                dict.fromkeys(experts, by_expert),
                by_group,
                by_group,
                by_group,
                by_group,
                whole,
            ),
            out_specs=(by_group, by_group),
            check_vma=False,  # kernels and loops of dynamic length have no such types
        )
    y_GSM, sums = core(
        routing,
        experts,
        x_BLM.reshape(-1, S, M),
        tokens.mask_BL.reshape(-1, S),
        tokens.id_BL.reshape(-1, S),
        group_G,
        key,
    )
    y_BLM = y_GSM.reshape(B, L, M)
    if hasattr(weights, "shared_expert"):
        y_BLM += feed_forward(weights.shared_expert, x_BLM, model.activation)
    return y_BLM, sums


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
    """What one device does: its groups, its experts."""
    model, router, train = layer.model, layer.router, key is not None
    axis_size = layer.mesh.shape["expert"]
    platform = layer.mesh.devices.flat[0].platform
    name, _ = choice.pick(model, router, axis_size, platform, train=train)
    transport = TRANSPORTS[name]
    tokens = mask_gS.size
    room = room_for(router, model.num_experts, tokens, axis_size, platform, train=train)
    keys_g = None if key is None else _group_keys(key, group_g)
    assignment = _assign(routing, x_gSM, mask_gS, id_gS, keys_g, layer)

    def one_round(first_row: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        rows, size_e, plan = transport.dispatch(x_gSM, assignment, room, first_row)
        if size_e is None:
            keep_eRF = None
            if keys_g is not None and model.expert_dropout > 0:
                keep_eRF = _expert_dropout(keys_g["dropout"], rows.shape, model, room)
            rows = expert_feed_forward(experts, rows, model.activation, keep_eRF)
        else:
            rows = grouped_feed_forward(
                experts,
                rows,
                size_e,
                model.activation,
                method="blocked" if platform == "cpu" else "ragged_dot",
            )
        y_gSM = transport.combine(rows, assignment, plan, room)
        return y_gSM, jnp.zeros((), jnp.int32) if plan is None else plan.excess

    if layer.in_rounds and name not in choice.PADDED and room.num_rounds > 1:
        return _in_rounds(one_round, x_gSM, assignment, room), assignment.sums
    y_gSM, excess = one_round(0)
    excess_g = jnp.zeros_like(group_g).at[0].set(excess)
    return y_gSM, dataclasses.replace(assignment.sums, excess_G=excess_g)


def _in_rounds(
    one_round: Callable[..., tuple[jax.Array, jax.Array]],
    x_gSM: jax.Array,
    assignment: Assignment,
    room: Room,
) -> jax.Array:
    """Computes R rows at a time, as many times as the fullest device needs.

    Each round keeps nothing for the backward pass but its inputs, so memory is that of
    one round; the static number of rounds is that of the worst assignment, and those
    that no device needs are skipped.
    """
    size_E = jnp.sum(assignment.sums.kept_GE, axis=0)
    size_E = lax.psum(size_E, "expert")
    fullest = jnp.max(jnp.sum(size_E.reshape(room.axis_size, -1), axis=1))
    fullest = lax.pmax(fullest, BATCH_AXES)

    @jax.checkpoint
    def add_round(y_gSM: jax.Array, first_row: jax.Array) -> tuple[jax.Array, None]:
        more_gSM = lax.cond(
            fullest > first_row,
            lambda: one_round(first_row)[0].astype(jnp.float32),
            lambda: jnp.zeros_like(y_gSM),
        )
        return y_gSM + more_gSM, None

    first_rows = jnp.arange(room.num_rounds, dtype=jnp.int32) * room.num_rows
    start_gSM = jnp.zeros(x_gSM.shape, jnp.float32)
    return lax.scan(add_round, start_gSM, first_rows)[0].astype(x_gSM.dtype)


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
        x_gSM = x_gSM.astype(jnp.float32)
        if keys_g is not None and router.jitter > 0:
            noise_gSM = jax.vmap(
                lambda k: jax.random.uniform(k, x_gSM.shape[1:], minval=-1, maxval=1)
            )(keys_g["jitter"])
            x_gSM = x_gSM * (1 + router.jitter * noise_gSM)
        # On TPU, and with TF32, a plain float32 product would multiply in lower
        # precision.
        logits_gSE = jnp.einsum(
            "gSM,ME->gSE", x_gSM, routing["router"], precision=lax.Precision.HIGHEST
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


def _expert_dropout(
    key_g: jax.Array, shape_eRM: tuple[int, ...], model: ModelSettings, room: Room
) -> jax.Array:
    """What hidden activations of capacity slots are multiplied by.

    A draw belongs to (group, expert, slot), which are the same on every mesh.
    """
    e, R, _ = shape_eRM
    data_g = jax.random.key_data(key_g)
    first = jnp.int32(0)
    if room.axis_size > 1:
        data_g = all_maps(data_g).reshape(-1, data_g.shape[-1])
        first = lax.axis_index("expert") * e
    key_G = jax.random.wrap_key_data(data_g)
    rate, C = model.expert_dropout, R // key_G.shape[0]

    def keep(expert: jax.Array, key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, expert)
        return jax.random.bernoulli(key, 1 - rate, (C, model.expert_mlp_dim))

    by_group = jax.vmap(keep, in_axes=(None, 0))
    keep_eGCF = jax.vmap(by_group, in_axes=(0, None))(first + jnp.arange(e), key_G)
    return keep_eGCF.reshape(e, R, -1) / (1 - rate)


def _group_keys(key: jax.Array, group_g: jax.Array) -> dict[str, jax.Array]:
    """Keys per group for each use, functions of its global index alone."""
    uses = ("jitter", "route", "noise", "dropout")
    key_gU = jax.vmap(
        lambda g: jax.random.split(jax.random.fold_in(key, g), len(uses))
    )(group_g)
    return {use: key_gU[:, i] for i, use in enumerate(uses)}
