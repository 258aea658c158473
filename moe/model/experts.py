"""The experts of one device, over the rows that came to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from moe.dispatch.exchange import all_maps
from moe.dispatch.room import Room
from moe.model import grouped_method
from moe.model.feed_forward import expert_feed_forward
from moe.model.grouped import grouped_feed_forward
from moe.settings import ModelSettings, RouterSettings
from partitioning.grid import Grid
from partitioning.settings import UNCUT, PartitionSettings


@dataclasses.dataclass(frozen=True)
class Layer:
    """What all sparse layers of a model share; static under `jit`.

    Attributes:
        model: settings of the model.
        router: settings of the router; S divides the tokens of a sequence that one
            device routes, L / (context · model).
        mesh: the mesh; its `expert` axis divides E.
        in_rounds: compute rows beyond the row budget in further rounds instead of
            reporting them.
        partition: what is cut over the mesh beside the batch and the experts.
        routes_alike: whether the devices of `context` and `model` all have the same
            tokens, as when tokens are drawn one by one; else each has a piece of every
            sequence.
    """

    model: ModelSettings
    router: RouterSettings
    mesh: Mesh
    in_rounds: bool = False
    partition: PartitionSettings = UNCUT
    routes_alike: bool = False

    @property
    def grid(self) -> Grid:
        """The mesh as one device sees it."""
        return Grid(self.mesh, self.partition)

    @property
    def cuts_experts(self) -> bool:
        """Whether each expert is cut over `model`."""
        return self.mesh.shape["model"] > 1 and self.partition.expert_tensor_parallel


def compute(
    experts: dict[str, jax.Array],
    rows: jax.Array,
    size_e: jax.Array | None,
    dropout_g: jax.Array | None,
    room: Room,
    layer: Layer,
) -> jax.Array:
    """Sends rows through this device's experts.

    Where experts are cut over `model`, each device of that axis has brought its own
    rows here, and computes its share of the width for the rows of all.

    Args:
        experts: their arrays.
        rows: [e, R, M], or [R, M] sorted by expert.
        size_e: rows of each expert, if they are sorted.
        dropout_g: keys of this device's groups, if there is dropout.
        room: of the exchange.
        layer: settings and mesh.
    """
    grid, model = layer.grid, layer.model
    joined = layer.cuts_experts and not layer.routes_alike
    if layer.cuts_experts and "down_bias" in experts:  # shares add up to one bias
        mine = grid.index("model") == 0
        experts = experts | {"down_bias": experts["down_bias"] * mine}
    if size_e is None:
        if joined:
            rows = grid.gather(rows, ["model"], 1)
            rows = checkpoint_name(rows, "dispatched_rows")
        keep_eRF = None
        if dropout_g is not None:
            keep_eRF = _expert_dropout(dropout_g, rows.shape, room, layer)
        rows = expert_feed_forward(experts, rows, model.activation_of_experts, keep_eRF)
        if joined:
            rows = grid.scatter_sum(rows, ["model"], 1)
    else:
        device, (e, F, M) = layer.mesh.devices.flat[0], experts["down"].shape
        method, _ = grouped_method.pick(
            device.platform,
            device.device_kind,
            rows.dtype.name,
            num_experts=e,
            mlp_dim=F,
            model_dim=M,
        )
        products = functools.partial(
            grouped_feed_forward,
            experts,
            activation=model.activation_of_experts,
            method=method,
        )
        if joined:
            rows_XRM = grid.gather(rows[None], ["model"], 0)
            rows_XRM = checkpoint_name(rows_XRM, "dispatched_rows")
            size_Xe = grid.gather(size_e[None], ["model"], 0)
            rows_XRM = lax.map(lambda x: products(*x), (rows_XRM, size_Xe))
            rows = grid.scatter_sum(rows_XRM, ["model"], 0)[0]
        else:
            rows = products(rows, size_e)
    if layer.cuts_experts and not joined:
        rows = grid.sum(rows, ["model"])
    return rows


def _expert_dropout(
    key_g: jax.Array, shape_eRM: tuple[int, ...], room: Room, layer: Layer
) -> jax.Array:
    """What hidden activations of capacity slots are multiplied by.

    A draw belongs to (group, expert, slot), which are the same on every mesh.
    """
    e, R, _ = shape_eRM
    model, grid = layer.model, layer.grid
    data_g = jax.random.key_data(key_g)
    first = jnp.int32(0)
    if room.axis_size > 1:
        data_g = all_maps(data_g).reshape(-1, data_g.shape[-1])
        first = lax.axis_index("expert") * e
    if layer.cuts_experts:  # rows of all devices of `model` are here
        data_g = grid.gather(data_g, ["model"], 0)
    key_G = jax.random.wrap_key_data(data_g)
    rate, C = model.expert_dropout, R // key_G.shape[0]

    def keep(expert: jax.Array, key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, expert)
        return jax.random.bernoulli(key, 1 - rate, (C, model.expert_mlp_dim))

    by_group = jax.vmap(keep, in_axes=(None, 0))
    keep_eGCF = jax.vmap(by_group, in_axes=(0, None))(first + jnp.arange(e), key_G)
    keep_eRF = keep_eGCF.reshape(e, R, -1) / (1 - rate)
    return grid.piece(keep_eRF, ["model"], 2) if layer.cuts_experts else keep_eRF
