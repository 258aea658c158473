"""Which kernel of a library attends on a platform, and why. Standard library only."""

import re
from typing import Any, Literal

from moe.settings import ExecutionSettings, HeadsSettings, LatentSettings

Kernel = Literal["cudnn", "cudnn_interpreted", "splash", "splash_interpreted"]

# GPUs of compute capability 8.0 and more, as their drivers name them.
AMPERE_OR_LATER = re.compile(
    r"\b(A100|A800|A10G?|A30|A40|L4|L40S?|G?H\d{2,3}|G?B\d{3})\b", re.IGNORECASE
)
CUDNN_DTYPES = ("bfloat16", "float16")
CUDNN_WIDTH = 128  # of a head, backward too, and a multiple of 8
# cuDNN is told who sees whom in an array of all queries by all keys, in 2 bytes each.
CUDNN_LENGTH = 8192
CUDNN_BLOCK = 128
SPLASH_BLOCKS = (512, 256, 128)  # the first that divides a row


def pick(
    platform: str,
    device_kind: str,
    dtype: str,
    *,
    length: int,
    width: int,
    value_width: int,
    whole: bool = True,
    bias: bool = False,
    prefix: bool = False,
    sink: bool = False,
    cap: bool = False,
) -> tuple[Kernel | None, str]:
    """Returns the kernel, or None to attend without one; and the reason.

    Args:
        platform: "cpu", "gpu" or "tpu".
        device_kind: name of the devices, as jax gives it.
        dtype: name of the dtype of queries, keys and values.
        length: tokens of a row, queries and keys.
        width: D.
        value_width: X.
        whole: whether a device has all of a row, and its tokens see one another.
        bias: whether scores have a bias by distance.
        prefix: whether tokens of a prefix see one another.
        sink: whether every softmax has a score that no key has.
        cap: whether scores are bounded.
    """
    if platform == "cpu":
        return None, "kernels are for TPU and GPU"
    obstacles: dict[str, Any] = {
        "rows are cut over devices, or see those of another stack": not whole,
        "no kernel takes a bias by distance with its gradient": bias,
    }
    taken: Kernel
    if platform == "tpu":
        taken, words = "splash", "jax's splash attention"
        least = SPLASH_BLOCKS[-1]
        obstacles |= {
            f"splash wants multiples of {least} tokens, rows have {length}": (
                length % least
            ),
            "splash takes no prefixes": prefix,
        }
    else:
        taken, words = "cudnn", "cuDNN's attention, by jax.nn.dot_product_attention"
        obstacles |= {
            f"cuDNN's kernel is for Ampere and later, this is {device_kind}": (
                not AMPERE_OR_LATER.search(device_kind)
            ),
            f"cuDNN takes {' and '.join(CUDNN_DTYPES)} only": dtype not in CUDNN_DTYPES,
            f"cuDNN wants heads of a multiple of 8 up to {CUDNN_WIDTH}, keys as wide "
            f"as values; these are {width} and {value_width}": (
                width % 8 or width > CUDNN_WIDTH or value_width != width
            ),
            f"cuDNN wants an even number of tokens, rows have {length}": length % 2,
            f"cuDNN takes a mask of all queries by all keys, too large for {length} "
            f"tokens (at most {CUDNN_LENGTH})": length > CUDNN_LENGTH,
            "cuDNN takes no sinks": sink,
            "cuDNN takes no bound on scores": cap,
        }
    reasons = [why for why, stands in obstacles.items() if stands]
    return (None, reasons[0]) if reasons else (taken, words)


def of_heads(
    s: HeadsSettings | LatentSettings,
    execution: ExecutionSettings,
    platform: str,
    device_kind: str,
    *,
    length: int,
    whole: bool,
    prefix: bool,
) -> tuple[Kernel | None, str]:
    """Returns what `pick` does for a kind of layer, in training and scoring."""
    if execution.attention_kernel == "off":
        return None, "ATTENTION_KERNEL = 'off'"
    return pick(
        platform,
        device_kind,
        execution.dtype,
        length=length,
        width=s.key_width,
        value_width=s.value_width,
        whole=whole,
        bias=s.positions.kind in ("distance", "alibi"),
        prefix=prefix,
        sink=s.sinks,
        cap=s.cap > 0,
    )


def block(method: Kernel, length: int) -> int:
    """Returns the tokens of a block of queries, and of keys, in a kernel."""
    if method in ("cudnn", "cudnn_interpreted"):
        return CUDNN_BLOCK
    return next(size for size in SPLASH_BLOCKS if length % size == 0)
