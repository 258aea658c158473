"""Feed-forward layers: one for every token, or one per expert over its rows."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe.model.parameters import scaled

GATED = {"geglu": jax.nn.gelu, "swiglu": jax.nn.silu}  # arXiv:2002.05202
PLAIN = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


class FeedForward(nnx.Module):
    """Weights of a two-layer feed-forward, with a third matrix if it is gated.

    With `num_experts` each matrix has a leading dimension of experts.
    """

    def __init__(
        self,
        key: jax.Array,
        *,
        model_dim: int,
        mlp_dim: int,
        activation: str,
        num_experts: int | None = None,
    ):
        lead, name = ((), ()) if num_experts is None else ((num_experts,), ("expert",))
        up_key, gate_key, down_key = jax.random.split(key, 3)
        up, up_axes = (*lead, model_dim, mlp_dim), (*name, "embed", "mlp")
        self.up = scaled(up_key, up, up_axes, fan_in=model_dim)
        if activation in GATED:
            self.gate = scaled(gate_key, up, up_axes, fan_in=model_dim)
        self.down = scaled(
            down_key,
            (*lead, mlp_dim, model_dim),
            (*name, "mlp", "embed"),
            fan_in=mlp_dim,
        )


def feed_forward(weights: FeedForward, x_BLM: jax.Array, activation: str) -> jax.Array:
    """Applies the dense layer to every token, in the dtype of x."""
    w = _in_dtype(weights, x_BLM.dtype)
    up_BLF = jnp.einsum("BLM,MF->BLF", x_BLM, w["up"])
    gate_BLF = jnp.einsum("BLM,MF->BLF", x_BLM, w["gate"]) if "gate" in w else None
    hidden_BLF = _activate(up_BLF, gate_BLF, activation)
    return jnp.einsum("BLF,FM->BLM", hidden_BLF, w["down"])


def expert_feed_forward(
    w: dict[str, jax.Array], rows_eRM: jax.Array, activation: str
) -> jax.Array:
    """Applies each expert to its own rows, as batched products.

    Args:
        w: "up" and, if gated, "gate" [e, M, F], and "down" [e, F, M].
        rows_eRM: rows of each local expert; a zero row gives a zero row.
        activation: name of the non-linearity.
    """
    w = {name: matrix.astype(rows_eRM.dtype) for name, matrix in w.items()}
    up_eRF = jnp.einsum("eRM,eMF->eRF", rows_eRM, w["up"])
    up_eRF = checkpoint_name(up_eRF, "expert_hidden")
    gate_eRF = None
    if "gate" in w:
        gate_eRF = jnp.einsum("eRM,eMF->eRF", rows_eRM, w["gate"])
        gate_eRF = checkpoint_name(gate_eRF, "expert_hidden")
    hidden_eRF = _activate(up_eRF, gate_eRF, activation)
    return jnp.einsum("eRF,eFM->eRM", hidden_eRF, w["down"])


def matrices(weights: FeedForward) -> dict[str, jax.Array]:
    """Returns the layer's matrices by name."""
    there = (name for name in ("up", "gate", "down") if hasattr(weights, name))
    return {name: getattr(weights, name)[...] for name in there}


def _in_dtype(weights: FeedForward, dtype: jnp.dtype) -> dict[str, jax.Array]:
    return {name: w.astype(dtype) for name, w in matrices(weights).items()}


def _activate(up: jax.Array, gate: jax.Array | None, activation: str) -> jax.Array:
    if gate is None:
        return PLAIN[activation](up)
    return GATED[activation](gate) * up
