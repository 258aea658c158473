"""The feed-forward that every token visits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe.model.execution import Execution
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product
from moe.model.view import View
from moe.settings import DenseSettings

gelu_exact = functools.partial(jax.nn.gelu, approximate=False)


def _clamped(gate: jax.Array, linear: jax.Array) -> jax.Array:
    """The gated unit of gpt-oss: σ(1.702·x) makes about a gelu of x·σ(1.702·x)."""
    gate, linear = jnp.minimum(gate, 7.0), jnp.clip(linear, -7.0, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1.0)


# Of the gate and of what it gates (arXiv:2002.05202).
GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "geglu": lambda gate, linear: jax.nn.gelu(gate) * linear,
    "geglu_exact": lambda gate, linear: gelu_exact(gate) * linear,
    "swiglu": lambda gate, linear: jax.nn.silu(gate) * linear,
    "swiglu_clamped": _clamped,
}
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "gelu": jax.nn.gelu,
    "gelu_exact": gelu_exact,
}

Weights = dict[str, jax.Array]


def specs(s: DenseSettings, width: int) -> dict[str, Spec]:
    """Describes both matrices.

    `up` is [M, F], or [M, 2, F] if gated: the gate, then what it gates, so that one
    product computes both.
    """
    M, F = width, s.mlp_dim
    pair, pair_axes = ((2,), ("pair",)) if s.activation in GATED else ((), ())
    own = 1 + len(pair)
    found = {
        "up": matrix(
            (M, *pair, F), ("embed", *pair_axes, "mlp"), (0,), (own,), s.init_scale
        ),
        "down": matrix((F, M), ("mlp", "embed"), (0,), (1,), s.init_scale),
    }
    if s.biases:
        up_axes = (*pair_axes, "mlp")
        found["up_bias"] = vector((*pair, F), up_axes, stacked=len(pair))
        found["down_bias"] = vector((M,), ("norm",))
    return found


def memory(s: DenseSettings) -> dict[str, Spec]:
    """Nothing is kept of tokens that came before."""
    del s
    return {}


def apply(
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: None,
    s: DenseSettings,
    key: jax.Array | None,
    number: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, None, None]:
    """Applies it to every token; nothing is drawn, remembered or counted."""
    del view, key, number
    grid = execution.grid
    return feed_forward(w, grid.enter(x_BLM), s.activation, grid.leave), memory, None


def feed_forward(
    w: Weights,
    x_BLM: jax.Array,
    activation: str,
    add_up: Callable[[jax.Array], jax.Array] = lambda y_BLM: y_BLM,
) -> jax.Array:
    """Applies both matrices, in the dtype of x.

    Args:
        w: weights, as `specs` describes; F may be a part of the width.
        x_BLM: activations.
        activation: name of the non-linearity.
        add_up: makes whole outputs of those of the parts.
    """
    up_BLF = product(x_BLM, w["up"], w.get("up_bias"))
    y_BLM = add_up(product(activate(up_BLF, activation), w["down"]))
    return y_BLM + w["down_bias"].astype(y_BLM.dtype) if "down_bias" in w else y_BLM


def activate(up: jax.Array, activation: str) -> jax.Array:
    """Applies the non-linearity; gated ones halve the dimension before the last."""
    if activation in PLAIN:
        return PLAIN[activation](up)
    return GATED[activation](up[..., 0, :], up[..., 1, :])
