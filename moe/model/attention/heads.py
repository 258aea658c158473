"""Multi-head attention (arXiv:1706.03762), whose heads may share keys and values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe.model import norms
from moe.model.attention.attend import (
    Kind,
    LargestLogits,
    Memory,
    Weights,
    attend,
)
from moe.model.attention.positions import (
    bias_of,
    falling,
    rotate,
    slopes,
    table_spec,
)
from moe.model.attention.scoring import Scoring
from moe.model.execution import Execution
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product
from moe.model.view import View
from moe.settings import HeadsSettings
from partitioning.grid import Grid


def specs(s: HeadsSettings, width: int) -> dict[str, Any]:
    """Describes the projections, with U heads of keys (arXiv:2305.13245).

    With `score_scale` queries start as much smaller as scores would be larger.
    """
    M, N, U, D = width, s.num_heads, s.kv_heads, s.head_dim
    asking, asked = ("heads", "head_dim"), ("kv_heads", "head_dim")

    def projection(heads: int, axes: tuple[str, ...], scale: float = 1.0) -> Spec:
        scale *= s.init_scale
        return matrix((M, heads, D), ("embed", *axes), (0,), (1, 2), scale)

    # Scores start alike whatever their factor is; T5's, of 1, do so too.
    first = 1 / (D * s.score_scale**2) if s.score_scale else 1.0
    found: dict[str, Any] = {
        "query": projection(N, asking, first),
        "key": projection(U, asked),
        "value": projection(U, asked),
        "output": matrix((N, D, M), (*asking, "embed"), (0, 1), (2,), s.init_scale),
    }
    if s.biases:
        found |= {
            "query_bias": vector((N, D), asking),
            "key_bias": vector((U, D), asked),
            "value_bias": vector((U, D), asked),
        }
    if s.output_bias:
        found["output_bias"] = vector((M,), ("norm",))
    if s.qk_norm in ("head", "width"):
        found["query_norm"] = _norm_specs(s, N, asking)
        found["key_norm"] = _norm_specs(s, U, asked)
    if s.sinks:
        found["sink"] = vector((N,), ("heads",))
    if s.gated:
        found["gate"] = projection(N, asking)
    if s.positions.kind == "distance" and not s.shares_bias:
        found["distance"] = table_spec(s.positions, N, s.init_scale)
    return found


def _norm_specs(s: HeadsSettings, heads: int, axes: tuple[str, str]) -> dict[str, Spec]:
    """Describes a norm of one head, which all share, or of so many."""
    D = s.head_dim
    if s.qk_norm == "head":
        return norms.specs(s.norm, D)
    return {
        name: dataclasses.replace(spec, shape=(heads, D), axes=axes, outputs=(0, 1))
        for name, spec in norms.specs(s.norm, heads * D).items()
    }


def memory(s: HeadsSettings) -> dict[str, Spec]:
    """Describes what drawing keeps of a token: keys, turned if any are, and values."""
    one = vector((s.kv_heads, s.head_dim), ("kv_heads", "head_dim"))
    return {"key": one, "value": one}


def apply(
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: Memory | None,
    s: HeadsSettings,
    key: jax.Array | None,
    number: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, Memory | None, LargestLogits | None]:
    """Attends; see `attend`. Nothing is drawn."""
    del key, number
    w = w if memory else own_keys(w, s, execution.grid)
    return attend(kind(execution.grid), w, x_BLM, view, memory, s, execution)


def with_logits_times(
    w: Weights, factor_N: jax.Array, s: HeadsSettings
) -> dict[str, jax.Array]:
    """Returns those weights that change, so that a head's logits are times a factor.

    Queries and keys share it by its root, as in arXiv:2507.20534, section 2.1. Where
    keys have several heads of queries, these alone change: their factors differ; and
    where queries or keys are frozen, the others have all of it.

    Args:
        w: the sublayer's parameters, led by layers; None in place of frozen ones.
        factor_N: positive, led by layers too.
        s: record of the sublayer.
    """
    shared = s.kv_heads < s.num_heads
    names = [n for n in ("query", "key")[: 1 if shared else 2] if w[n] is not None]
    if not names:
        return {}
    factor_N1 = (factor_N if len(names) == 1 else jnp.sqrt(factor_N))[..., None]
    changed = {name: w[name] * factor_N1[..., None, :, :] for name in names}
    biases = [f"{name}_bias" for name in names]
    changed |= {n: w[n] * factor_N1 for n in biases if w.get(n) is not None}
    return {name: array.astype(w[name].dtype) for name, array in changed.items()}


def own_keys(w: Weights, s: HeadsSettings, grid: Grid) -> Weights:
    """Leaves of weights of all keys those of the one head that queries here need.

    Where a device needs more than one, or remembers all, `expand` takes them instead.
    """
    if grid.size("model") % s.kv_heads or grid.partition.cuts_kv_heads:
        return w

    def own(array: jax.Array, spec: Spec) -> jax.Array:
        return _needed(array, spec.axes.index("kv_heads"), s, grid)

    asked = {
        name: spec
        for name, spec in specs(s, len(w["key"])).items()
        if all("kv_heads" in each.axes for each in jax.tree.leaves(spec))
    }
    return w | {name: jax.tree.map(own, w[name], spec) for name, spec in asked.items()}


def _needed(x: jax.Array, dim: int, s: HeadsSettings, grid: Grid) -> jax.Array:
    """Takes from all heads of keys those that the queries of this device share."""
    size = grid.size("model")
    if size % s.kv_heads == 0:
        own = grid.index("model") * s.kv_heads // size
        return lax.dynamic_slice_in_dim(x, own, 1, dim)
    heads = s.num_heads // size
    head_n = grid.index("model") * heads + jnp.arange(heads)
    return jnp.take(x, head_n * s.kv_heads // s.num_heads, axis=dim)


def kind(grid: Grid) -> Kind:
    """Returns what this kind of attention does on one device of a mesh."""

    def projected(
        name: str, w: Weights, x_BLM: jax.Array, position_BL: Any, s: HeadsSettings
    ) -> jax.Array:
        y_BLND = product(x_BLM, w[name], w.get(f"{name}_bias"))
        return _placed(w.get(f"{name}_norm"), y_BLND, position_BL, s, grid)

    def remember(
        w: Weights, x_BLM: jax.Array, position_BL: jax.Array, s: HeadsSettings
    ) -> Memory:
        value_BLUD = product(x_BLM, w["value"], w.get("value_bias"))
        return {"key": projected("key", w, x_BLM, position_BL, s), "value": value_BLUD}

    def scoring(w: Weights, view: View, reach: int, s: HeadsSettings) -> Scoring:
        table = view.distance_table if s.shares_bias else w.get("distance")
        bias = None if table is None else bias_of(table, reach, s.positions)
        if s.positions.kind == "alibi":
            slope_N = grid.piece(jnp.asarray(slopes(s.num_heads)), ["model"], 0)
            bias = falling(slope_N, reach)
        return Scoring(s.scale, s.window, s.cap, bias, w.get("sink"), causal=s.causal)

    def expand(
        w: Weights, memory: Memory, s: HeadsSettings
    ) -> tuple[jax.Array, jax.Array]:
        key_BTUD, value_BTUD = memory["key"], memory["value"]
        if not grid.partition.cuts_kv_heads and key_BTUD.shape[2] == s.kv_heads:
            key_BTUD = _needed(key_BTUD, 2, s, grid)
            value_BTUD = _needed(value_BTUD, 2, s, grid)
        return key_BTUD, value_BTUD

    def ask(
        w: Weights, x_BLM: jax.Array, position_BL: jax.Array, s: HeadsSettings
    ) -> jax.Array:
        query_BLND = projected("query", w, x_BLM, position_BL, s)
        if not s.growth:
            return query_BLND
        steps_BL = (position_BL + 1) // s.growth_length
        factor_BL = 1 + s.growth * jnp.log1p(steps_BL.astype(jnp.float32))
        grown_BLND = query_BLND.astype(jnp.float32) * factor_BL[..., None, None]
        return grown_BLND.astype(query_BLND.dtype)

    return Kind(ask, remember, expand, scoring)


def _placed(
    w: Weights | None,
    x_BLND: jax.Array,
    position_BL: jax.Array,
    s: HeadsSettings,
    grid: Grid,
) -> jax.Array:
    """Normalises queries or keys, and turns them."""
    if w is not None:
        mean = norms.over_last
        if s.qk_norm == "width":
            mean = functools.partial(_over_all_heads, grid)
        x_BLND = norms.normalise(w, x_BLND, s.norm, mean)
    if s.positions.kind != "rotary":
        return x_BLND
    x_BLND = rotate(x_BLND, position_BL, s.positions)
    if s.qk_norm == "unit":
        x = x_BLND.astype(jnp.float32)
        square = norms.over_last(x * x)
        x_BLND = (x * lax.rsqrt(square + s.norm.epsilon)).astype(x_BLND.dtype)
    return x_BLND


def _over_all_heads(grid: Grid, x_BLND: jax.Array) -> jax.Array:
    """Averages over heads, of which each device of `model` has as many, and width."""
    own_BL11 = jnp.mean(x_BLND, axis=(-2, -1), keepdims=True)
    return grid.sum(own_BL11, ["model"]) / grid.size("model")
