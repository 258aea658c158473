"""The experts of one device, over the rows that came to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moe.dispatch.exchange import all_maps
from moe.dispatch.room import Room
from moe.model.execution import Execution
from moe.model.feed_forward import dense, grouped_method
from moe.model.feed_forward.dense import activate
from moe.model.feed_forward.grouped import grouped_feed_forward
from moe.model.parameters import Spec, stack
from moe.settings import DenseSettings, SparseSettings

Weights = dict[str, jax.Array]


def specs(s: DenseSettings, num_experts: int, width: int) -> dict[str, Spec]:
    """Describes the arrays of a dense feed-forward, for each expert."""
    names = {"embed": "expert_embed", "mlp": "expert_mlp"}

    def of_expert(spec: Spec) -> Spec:
        axes = tuple(names.get(axis or "", axis) for axis in spec.axes)
        return dataclasses.replace(spec, axes=axes)

    one = jax.tree.map(of_expert, dense.specs(s, width))
    return stack(one, num_experts, "expert")


def compute(
    w: Weights,
    rows: jax.Array,
    size_e: jax.Array | None,
    dropout_g: jax.Array | None,
    room: Room,
    s: SparseSettings,
    execution: Execution,
) -> jax.Array:
    """Sends rows through this device's experts.

    Where experts are cut over `model`, each device of that axis has brought its own
    rows here, and computes its share of the width for the rows of all.

    Args:
        w: the experts' arrays.
        rows: [e, R, M], or [R, M] sorted by expert.
        size_e: rows of each expert, if they are sorted.
        dropout_g: keys of this device's groups, if there is dropout.
        room: sizes of the exchange.
        s: record of the layer.
        execution: the mesh.
    """
    grid, activation = execution.grid, s.experts.activation
    cut = execution.cuts_experts
    joined = cut and not execution.tokens_replicated
    if cut and "down_bias" in w:  # shares add up to one bias
        w = w | {"down_bias": w["down_bias"] * (grid.index("model") == 0)}
    if size_e is None:
        if joined:
            rows = grid.gather(rows, ["model"], 1)
            rows = checkpoint_name(rows, "dispatched_rows")
        keep_eRF = None
        if dropout_g is not None:
            keep_eRF = _dropout(dropout_g, rows.shape, room, s, execution)
        rows = padded(w, rows, activation, keep_eRF)
        if joined:
            rows = grid.scatter_sum(rows, ["model"], 1)
    else:
        method, _ = grouped_method.pick(
            execution.mesh.devices.flat[0].platform,
            execution.mesh.devices.flat[0].device_kind,
            rows.dtype.name,
            num_experts=w["down"].shape[0],
            mlp_dim=w["down"].shape[1],
            model_dim=w["down"].shape[2],
        )
        products = functools.partial(
            grouped_feed_forward, w, activation=activation, method=method
        )
        if joined:
            rows_DRM = grid.gather(rows[None], ["model"], 0)
            rows_DRM = checkpoint_name(rows_DRM, "dispatched_rows")
            size_De = grid.gather(size_e[None], ["model"], 0)
            rows_DRM = lax.map(lambda x: products(*x), (rows_DRM, size_De))
            rows = grid.scatter_sum(rows_DRM, ["model"], 0)[0]
        else:
            rows = products(rows, size_e)
    if cut and not joined:
        rows = grid.sum(rows, ["model"])
    return rows


def padded(
    w: Weights,
    rows_eRM: jax.Array,
    activation: str,
    keep_eRF: jax.Array | None = None,
) -> jax.Array:
    """Applies each expert to its own rows, as batched products.

    Args:
        w: the experts' arrays.
        rows_eRM: rows of each local expert.
        activation: name of the non-linearity.
        keep_eRF: what dropout multiplies the hidden activations by.
    """
    w = {name: array.astype(rows_eRM.dtype) for name, array in w.items()}
    pair = "p" if w["up"].ndim == 4 else ""
    up_eRF = jnp.einsum(f"eRM,eM{pair}F->eR{pair}F", rows_eRM, w["up"])
    up_eRF = checkpoint_name(up_eRF, "expert_hidden")
    if "up_bias" in w:
        up_eRF += w["up_bias"][:, None]
    hidden_eRF = activate(up_eRF, activation)
    if keep_eRF is not None:
        hidden_eRF *= keep_eRF.astype(hidden_eRF.dtype)
    y_eRM = jnp.einsum("eRF,eFM->eRM", hidden_eRF, w["down"])
    return y_eRM + w["down_bias"][:, None] if "down_bias" in w else y_eRM


def _dropout(
    key_g: jax.Array,
    shape_eRM: tuple[int, ...],
    room: Room,
    s: SparseSettings,
    execution: Execution,
) -> jax.Array:
    """What hidden activations of capacity slots are multiplied by.

    A draw belongs to (group, expert, slot), which are the same on every mesh.
    """
    e, R, _ = shape_eRM
    grid = execution.grid
    data_g = jax.random.key_data(key_g)
    first = jnp.int32(0)
    if room.axis_size > 1:
        data_g = all_maps(data_g).reshape(-1, data_g.shape[-1])
        first = lax.axis_index("expert") * e
    if execution.cuts_experts:  # rows of all devices of `model` are here
        data_g = grid.gather(data_g, ["model"], 0)
    key_G = jax.random.wrap_key_data(data_g)
    rate, C = s.dropout, R // key_G.shape[0]

    def keep(expert: jax.Array, key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, expert)
        return jax.random.bernoulli(key, 1 - rate, (C, s.experts.mlp_dim))

    by_group = jax.vmap(keep, in_axes=(None, 0))
    keep_eGCF = jax.vmap(by_group, in_axes=(0, None))(first + jnp.arange(e), key_G)
    keep_eRF = keep_eGCF.reshape(e, R, -1) / (1 - rate)
    return grid.piece(keep_eRF, ["model"], 2) if execution.cuts_experts else keep_eRF
