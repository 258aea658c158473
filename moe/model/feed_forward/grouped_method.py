"""How a platform computes experts over sorted rows, and why. Standard library only."""

import re
from typing import Literal

Method = Literal[
    "blocked", "tpu", "tpu_interpreted", "hopper", "hopper_interpreted", "batched"
]

# GPUs of compute capability 9.0, as their drivers name them.
HOPPER = re.compile(r"\b(GH200|H20|H100|H200|H800)\b")
HOPPER_DTYPES = ("bfloat16", "float16")
HOPPER_BLOCK = 128  # divides both dimensions of every matrix
HOPPER_EXPERTS = 64  # the kernel is unrolled over them


def pick(
    platform: str,
    device_kind: str,
    dtype: str,
    *,
    num_experts: int,
    mlp_dim: int,
    model_dim: int,
) -> tuple[Method, str]:
    """Returns the method for the experts of a device, and the reason in a few words.

    Args:
        platform: kind of the mesh's devices: "cpu", "gpu" or "tpu".
        device_kind: name of these devices, as jax gives it.
        dtype: name of the dtype of the rows.
        num_experts: e, on one device.
        mlp_dim: F, the part of an expert that one device has.
        model_dim: M.
    """
    if platform == "cpu":
        return "blocked", "loops over the experts that have rows"
    if platform == "tpu":
        return "tpu", "ragged_dot, and a kernel for the gradient of the weights"
    if not HOPPER.search(device_kind):
        return "batched", f"the grouped kernel is for Hopper, this is {device_kind}"
    if dtype not in HOPPER_DTYPES:
        return "batched", f"the grouped kernel takes {' and '.join(HOPPER_DTYPES)} only"
    if mlp_dim % HOPPER_BLOCK or model_dim % HOPPER_BLOCK:
        return "batched", (
            f"the grouped kernel wants multiples of {HOPPER_BLOCK}, and on a device "
            f"experts are {mlp_dim} wide, the model {model_dim}"
        )
    if num_experts > HOPPER_EXPERTS:
        return "batched", (
            f"the grouped kernel is unrolled over experts, {HOPPER_EXPERTS} at most, "
            f"and a device has {num_experts}"
        )
    return "hopper", f"a grouped kernel of jax for {device_kind}"
