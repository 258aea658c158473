"""The experts' feed-forward over rows sorted by expert: no capacity, no padding.

Compiled for any platform but TPU, `jax.lax.ragged_dot` multiplies every row by every
expert; so does its gradient of the weights on TPU. Hence a way of its own for each
platform (`grouped_method.pick`): loops on CPU, and elsewhere two products with
gradients of their own, between which the rest is shared. Each is imported where it is
used: a platform's kernels may be of no other.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe.model.feed_forward.grouped_method import Method
from moe.model.feed_forward.grouped_rows import activate, split_inputs, zero_past

Weights = dict[str, jax.Array]


def grouped_feed_forward(
    w: Weights,
    rows_RM: jax.Array,
    size_e: jax.Array,
    activation: str,
    *,
    method: Method,
) -> jax.Array:
    """Applies each expert to its own rows, which lie together, expert after expert.

    Inside `shard_map` it needs `check_vma=False`.

    Args:
        w: "up" [e, M, F] or, if gated, [e, M, 2, F]: first what goes through the
            non-linearity, then what that is multiplied by; "down" [e, F, M]; and maybe
            "up_bias" [e, F] or [e, 2, F] and "down_bias" [e, M]. Used in the dtype of
            the rows, with sums and gradients in float32.
        rows_RM: the first size_e[0] rows are of expert 0, and so on. Rows past the last
            expert's may hold anything.
        size_e: int32, rows of each expert; their sum is at most R.
        activation: name of the non-linearity.
        method: what `grouped_method.pick` returns; "tpu_interpreted" and
            "hopper_interpreted" do on CPU what those do, for tests.
    Returns:
        rows_RM, zero past the last expert's. Its inputs to the non-linearity are saved
        for the way back under the name "expert_hidden".
    """
    w = {name: _flat(name, array) for name, array in w.items()}
    if method == "blocked":
        from moe.model.feed_forward.grouped_cpu import blocked

        return blocked(w, rows_RM, size_e, activation)
    rows_RM = zero_past(rows_RM, size_e)
    up_RU = checkpoint_name(_product(w, "up", rows_RM, size_e, method), "expert_hidden")
    hidden_RF = activate(activation, *split_inputs(activation, up_RU))
    return _product(w, "down", hidden_RF, size_e, method)


def _flat(name: str, array: jax.Array) -> jax.Array:
    """Makes "up" [e, M, U] and its bias [e, U]; U is F, or 2F of a gated layer.

    In products of two dimensions only, XLA on CPU copies nothing.
    """
    kept = {"up": 2, "up_bias": 1}.get(name, array.ndim - 1)
    return array.reshape(*array.shape[:kept], -1)


def _product(
    w: Weights, name: str, rows_RX: jax.Array, size_e: jax.Array, method: Method
) -> jax.Array:
    """One matrix and its bias; kernels leave rows of no expert unwritten."""
    bias = f"{name}_bias"
    if method in ("tpu", "tpu_interpreted"):
        from moe.model.feed_forward import grouped_tpu

        matrix_eXY = w[name].astype(rows_RX.dtype)
        interpreted = method == "tpu_interpreted"
        y_RY = grouped_tpu.product(rows_RX, matrix_eXY, size_e, interpreted)
        if bias in w:
            place_R = jnp.arange(rows_RX.shape[0])
            expert_R = jnp.searchsorted(jnp.cumsum(size_e), place_R, side="right")
            expert_R = jnp.minimum(expert_R, size_e.shape[0] - 1)
            y_RY += w[bias].astype(y_RY.dtype)[expert_R]
    else:
        from moe.model.feed_forward import grouped_gpu

        y_RY = grouped_gpu.product(rows_RX, w[name], size_e, method)
        if bias in w:
            y_RY = grouped_gpu.add_bias(y_RY, w[bias], size_e)
    return zero_past(y_RY, size_e)
