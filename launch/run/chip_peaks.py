"""What a chip multiplies at most, and how jax names it: of every kind that is known.

A running job needs no more of a chip; `launch/planning/hardware/chips.py` has the rest,
and where each number was read.
"""

import re
from collections.abc import Mapping

# Floating-point operations per second of a chip, multiply-adds counted twice, dense;
# in bfloat16, float16 on V100.
PEAK_FLOPS: Mapping[str, float] = {
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "7x": 2307e12,
    "v100-32g": 125e12,
    "a100-40g": 312e12,
    "a100-80g": 312e12,
    "h100": 989e12,
    "h200": 989e12,
    "b200": 2250e12,
}

# As jax names TPUs; of a GPU the name of the chip is a part of its driver's.
TPU_KINDS: Mapping[str, str] = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5p",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
}
DEVICES_PER_CHIP: Mapping[str, int] = {"7x": 2}

_SLOWER = re.compile(r"PCIe|NVL", re.IGNORECASE)  # cards of the same name


def peak_flops(platform: str, device_kind: str) -> float | None:
    """Returns the peak of one device, or None where its chip is not known.

    Args:
        platform: name of the device's platform, as jax gives it.
        device_kind: likewise, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    for chip, peak in PEAK_FLOPS.items():
        if chip in TPU_KINDS:
            found = platform == "tpu" and device_kind == TPU_KINDS[chip]
        else:
            name = re.escape(chip.partition("-")[0])
            found = platform in ("gpu", "cuda") and bool(
                re.search(rf"\b{name}\b", device_kind, re.IGNORECASE)
                and not _SLOWER.search(device_kind)
            )
        if found:
            return peak / DEVICES_PER_CHIP.get(chip, 1)
    return None
