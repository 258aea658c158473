"""Multi-head attention (arXiv:1706.03762), whose heads may share keys and values."""

import jax

from moe.model.attention.attend import Kind, Memory, Weights, attend
from moe.model.attention.positions import bias_of, rotate, table_spec
from moe.model.attention.scoring import Scoring
from moe.model.execution import Execution
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product
from moe.model.view import View
from moe.settings import HeadsSettings


def specs(s: HeadsSettings, width: int) -> dict[str, Spec]:
    """Describes the projections, with U heads of keys (arXiv:2305.13245)."""
    M, N, U, D = width, s.num_heads, s.kv_heads, s.head_dim
    asking, asked = ("heads", "head_dim"), ("kv_heads", "head_dim")

    def projection(heads: int, axes: tuple[str, ...]) -> Spec:
        return matrix((M, heads, D), ("embed", *axes), (0,), (1, 2), s.init_scale)

    found = {
        "query": projection(N, asking),
        "key": projection(U, asked),
        "value": projection(U, asked),
        "output": matrix((N, D, M), (*asking, "embed"), (0, 1), (2,), s.init_scale),
    }
    if s.biases:
        found |= {
            "query_bias": vector((N, D), asking),
            "key_bias": vector((U, D), asked),
            "value_bias": vector((U, D), asked),
            "output_bias": vector((M,), ("norm",)),
        }
    if s.positions.kind == "distance" and not s.shares_bias:
        found["distance"] = table_spec(s.positions, N, s.init_scale)
    return found


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
) -> tuple[jax.Array, Memory | None, None]:
    """Attends; see `attend`. Nothing is drawn, and nothing counted."""
    del key, number
    return *attend(KIND, w, x_BLM, view, memory, s, execution), None


def _ask(
    w: Weights, x_BLM: jax.Array, position_BL: jax.Array, s: HeadsSettings
) -> jax.Array:
    return _turned(product(x_BLM, w["query"], w.get("query_bias")), position_BL, s)


def _remember(
    w: Weights, x_BLM: jax.Array, position_BL: jax.Array, s: HeadsSettings
) -> Memory:
    key_BLUD = product(x_BLM, w["key"], w.get("key_bias"))
    value_BLUD = product(x_BLM, w["value"], w.get("value_bias"))
    return {"key": _turned(key_BLUD, position_BL, s), "value": value_BLUD}


def _expand(
    w: Weights, memory: Memory, s: HeadsSettings
) -> tuple[jax.Array, jax.Array]:
    del w, s
    return memory["key"], memory["value"]


def _scoring(w: Weights, view: View, reach: int, s: HeadsSettings) -> Scoring:
    table = view.distance_table if s.shares_bias else w.get("distance")
    bias = None if table is None else bias_of(table, reach, s.positions)
    return Scoring(s.scale, s.window, bias=bias, causal=s.causal)


def _turned(x_BLND: jax.Array, position_BL: jax.Array, s: HeadsSettings) -> jax.Array:
    if s.positions.kind != "rotary":
        return x_BLND
    return rotate(x_BLND, position_BL, s.positions)


KIND = Kind(_ask, _remember, _expand, _scoring)
