"""What the backward pass keeps of a layer, by name."""

from collections.abc import Callable
from typing import Any

import jax

from moe.dispatch.exchange import TRAVELLED_NAMES
from moe.model.attention.attend import OUTPUT_NAME
from moe.model.attention.blocks import ATTENDED_NAMES


def rematerialised(
    layer: Callable, remat: str, *, gathers_weights: bool = False
) -> Callable:
    """Wraps one layer in the named policy.

    Args:
        layer: a function of arrays, called in a scan.
        remat: "none" keeps all, "minimal" the products without batch dimensions and
            what travelled between devices, "full" the arguments alone.
        gathers_weights: whether the layer gathers fully sharded weights, which no
            policy keeps.
    """
    if remat == "none":
        if not gathers_weights:
            return layer
        return jax.checkpoint(layer, policy=_all_but_weights, prevent_cse=False)
    if remat == "full":
        return jax.checkpoint(layer, prevent_cse=False)
    policies = jax.checkpoint_policies
    policy = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(
            *TRAVELLED_NAMES, *ATTENDED_NAMES, OUTPUT_NAME, "expert_hidden"
        ),
    )
    policy = policies.save_from_both_policies(policy, _attended_by_cudnn)
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _attended_by_cudnn(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps what cuDNN's attention returns, which has no name of ours."""
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _all_but_weights(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keeps everything but gathered weights, which `products.gather` returns."""
    if primitive.name != "custom_vjp_call":
        return True
    inner = parameters["call_jaxpr"].eqns
    return not any(equation.primitive.name == "all_gather" for equation in inner)
