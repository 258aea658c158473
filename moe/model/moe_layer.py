"""The sparse layer: route, dispatch, experts, combine, inside one `shard_map`.

The three parts never see each other: a router returns an Assignment, a transport moves
tokens by it, experts see rows.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from moe.dispatch import all_to_all, einsum
from moe.model.feed_forward import FeedForward, expert_feed_forward, matrices
from moe.model.parameters import normal
from moe.routing.assignment import Assignment, RouterSums
from moe.routing.token_choice import RouterContext, route
from moe.settings import ModelSettings, RouterSettings, capacity
from partitioning import rules

TRANSPORTS: dict[str, ModuleType] = {"all_to_all": all_to_all, "einsum": einsum}


class MoE(nnx.Module):
    """Router and expert weights of one sparse layer."""

    def __init__(self, key: jax.Array, settings: ModelSettings):
        router_key, experts_key = jax.random.split(key)
        M, E = settings.model_dim, settings.num_experts
        self.router = normal(router_key, (M, E), ("embed", None), stddev=0.02)
        self.experts = FeedForward(
            experts_key,
            model_dim=M,
            mlp_dim=settings.expert_mlp_dim,
            activation=settings.activation,
            num_experts=E,
        )


def moe_layer(
    weights: MoE,
    x_BLM: jax.Array,
    mask_BL: jax.Array,
    row_B: jax.Array,
    key: jax.Array | None,
    *,
    model: ModelSettings,
    router: RouterSettings,
    mesh: Mesh,
) -> tuple[jax.Array, RouterSums]:
    """Sends every token through the experts that its router picks.

    Groups are cuts of `router.group_size` tokens of one sequence, so a group is the
    same set of tokens on every mesh.

    Args:
        weights: the layer's parameters.
        x_BLM: activations, normalised.
        mask_BL: True for real tokens.
        row_B: int32, global row number of each sequence in its batch; names the group
            whose random draws are made, wherever it is computed.
        key: of this layer and step in training, None outside it.
        model: settings of the model.
        router: settings of the router; S divides L.
        mesh: the mesh; its `expert` axis divides E.
    Returns:
        y_BLM, zero for dropped tokens, and the router's sums per group.
    """
    B, L, M = x_BLM.shape
    S = router.group_size
    group_G = (row_B[:, None] * (L // S) + jnp.arange(L // S)).reshape(-1)
    core = functools.partial(
        _core,
        model=model,
        router=router,
        capacity=capacity(router, model.num_experts, train=key is not None),
        axis_size=mesh.shape["expert"],
    )
    experts = matrices(weights.experts)
    by_group = rules.spec(["group"])
    by_expert = rules.spec(["expert"])
    y_GSM, sums = jax.shard_map(
        core,
        mesh=mesh,
        in_specs=(
            PartitionSpec(),
            {name: by_expert for name in experts},
            by_group,
            by_group,
            by_group,
            PartitionSpec(),
        ),
        out_specs=(by_group, by_group),
    )(
        weights.router[...],
        experts,
        x_BLM.reshape(-1, S, M),
        mask_BL.reshape(-1, S),
        group_G,
        key,
    )
    return y_GSM.reshape(B, L, M), sums


def _core(
    router_ME: jax.Array,
    experts: dict[str, jax.Array],
    x_gSM: jax.Array,
    mask_gS: jax.Array,
    group_g: jax.Array,
    key: jax.Array | None,
    *,
    model: ModelSettings,
    router: RouterSettings,
    capacity: int,
    axis_size: int,
) -> tuple[jax.Array, RouterSums]:
    """What one device does: its groups, its experts."""
    transport = TRANSPORTS[model.transport]
    assignment = _assign(
        router_ME, x_gSM, mask_gS, group_g, key, router=router, capacity=capacity
    )
    rows_eRM, _, plan = transport.dispatch(x_gSM, assignment, axis_size)
    rows_eRM = expert_feed_forward(experts, rows_eRM, model.activation)
    y_gSM = transport.combine(rows_eRM, assignment, plan, axis_size)
    return y_gSM, assignment.sums


def _assign(
    router_ME: jax.Array,
    x_gSM: jax.Array,
    mask_gS: jax.Array,
    group_g: jax.Array,
    key: jax.Array | None,
    *,
    router: RouterSettings,
    capacity: int,
) -> Assignment:
    """Router logits in true float32, and the choice made from them."""
    x_gSM = x_gSM.astype(jnp.float32)
    route_key_g = None
    if key is not None:
        jitter_key_g, route_key_g = _group_keys(key, group_g)
        if router.jitter > 0:
            noise_gSM = jax.vmap(
                lambda k: jax.random.uniform(k, x_gSM.shape[1:], minval=-1, maxval=1)
            )(jitter_key_g)
            x_gSM = x_gSM * (1 + router.jitter * noise_gSM)
    # On TPU, and with TF32, a plain float32 product would multiply in lower precision.
    logits_gSE = jnp.einsum(
        "gSM,ME->gSE", x_gSM, router_ME, precision=jax.lax.Precision.HIGHEST
    )
    context = RouterContext(mask_GS=mask_gS, key_G=route_key_g)
    return route(logits_gSE, context, router, capacity=capacity)


def _group_keys(key: jax.Array, group_g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two keys per group, functions of its global index alone."""
    pair_g2 = jax.vmap(lambda g: jax.random.split(jax.random.fold_in(key, g)))(group_g)
    return pair_g2[:, 0], pair_g2[:, 1]
