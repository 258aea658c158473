"""Feed-forward layers: one for every token, or one per expert over its rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moe.model.parameters import constant, scaled

GATED = {"geglu": jax.nn.gelu, "swiglu": jax.nn.silu}  # arXiv:2002.05202
PLAIN = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}


class FeedForward(nnx.Module):
    """Weights of a two-layer feed-forward.

    `up` is [M, F], or [M, 2, F] if gated: the gate, then what it gates, so that one
    product computes both. With `num_experts` each array leads with experts.
    """

    def __init__(
        self,
        key: jax.Array,
        *,
        model_dim: int,
        mlp_dim: int,
        activation: str,
        biases: bool = False,
        init_scale: float = 1.0,
        num_experts: int | None = None,
    ):
        lead: tuple[int, ...] = ()
        name: tuple[str, ...] = ()
        embed, mlp = "embed", "mlp"
        if num_experts is not None:
            lead, name = (num_experts,), ("expert",)
            embed, mlp = "expert_embed", "expert_mlp"
        pair, pair_axes = ((2,), ("pair",)) if activation in GATED else ((), ())
        up_key, down_key = jax.random.split(key)
        self.up = scaled(
            up_key,
            (*lead, model_dim, *pair, mlp_dim),
            (*name, embed, *pair_axes, mlp),
            fan_in=model_dim,
            scale=init_scale,
        )
        self.down = scaled(
            down_key,
            (*lead, mlp_dim, model_dim),
            (*name, mlp, embed),
            fan_in=mlp_dim,
            scale=init_scale,
        )
        if biases:
            up_axes = (*name, *pair_axes, mlp)
            self.up_bias = constant((*lead, *pair, mlp_dim), up_axes, 0.0)
            self.down_bias = constant((*lead, model_dim), (*name, "norm"), 0.0)


def feed_forward(
    weights: FeedForward,
    x_BLM: jax.Array,
    activation: str,
    add_up: Callable[[jax.Array], jax.Array] = lambda y_BLM: y_BLM,
) -> jax.Array:
    """Applies the dense layer to every token, in the dtype of x.

    Args:
        weights: the layer's; F may be a part of its width.
        x_BLM: activations.
        activation: name of the non-linearity.
        add_up: makes whole outputs of those of the parts.
    """
    w = {name: array.astype(x_BLM.dtype) for name, array in arrays(weights).items()}
    up_BLF = _product(x_BLM, w["up"], "BLM")
    if "up_bias" in w:
        up_BLF += w["up_bias"]
    y_BLM = jnp.einsum("BLF,FM->BLM", activate(up_BLF, activation), w["down"])
    y_BLM = add_up(y_BLM)
    return y_BLM + w["down_bias"] if "down_bias" in w else y_BLM


def expert_feed_forward(
    w: dict[str, jax.Array],
    rows_eRM: jax.Array,
    activation: str,
    keep_eRF: jax.Array | None = None,
) -> jax.Array:
    """Applies each expert to its own rows, as batched products.

    Args:
        w: the arrays of `FeedForward` with a leading dimension of experts.
        rows_eRM: rows of each local expert.
        activation: name of the non-linearity.
        keep_eRF: what dropout multiplies the hidden activations by.
    """
    w = {name: array.astype(rows_eRM.dtype) for name, array in w.items()}
    up_eRF = _product(rows_eRM, w["up"], "eRM")
    up_eRF = checkpoint_name(up_eRF, "expert_hidden")
    if "up_bias" in w:
        up_eRF += w["up_bias"][:, None]
    hidden_eRF = activate(up_eRF, activation)
    if keep_eRF is not None:
        hidden_eRF *= keep_eRF.astype(hidden_eRF.dtype)
    y_eRM = jnp.einsum("eRF,eFM->eRM", hidden_eRF, w["down"])
    return y_eRM + w["down_bias"][:, None] if "down_bias" in w else y_eRM


def arrays(weights: FeedForward) -> dict[str, jax.Array]:
    """Returns the layer's arrays by name."""
    names = ("up", "up_bias", "down", "down_bias")
    there = (name for name in names if hasattr(weights, name))
    return {name: getattr(weights, name)[...] for name in there}


def activate(up: jax.Array, activation: str) -> jax.Array:
    """Applies the non-linearity; gated ones halve the dimension before the last."""
    if activation in PLAIN:
        return PLAIN[activation](up)
    return GATED[activation](up[..., 0, :]) * up[..., 1, :]


def _product(x: jax.Array, up: jax.Array, x_axes: str) -> jax.Array:
    """x·up, with the pair of gated activations kept apart."""
    expert = "e" if x_axes[0] == "e" else ""
    pair = "p" if up.ndim == 3 + len(expert) else ""
    return jnp.einsum(f"{x_axes},{expert}M{pair}F->{x_axes[:-1]}{pair}F", x, up)
