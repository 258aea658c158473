"""How well a run uses its devices, from the speed that its records say."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from launch.run.assemble import Run
from launch.run.chip_peaks import peak_flops
from moe.accounting import count

Record = Mapping[str, Any]


def derive(run: Run) -> Callable[[Record], Record]:
    """Returns what makes of a record of training what it says of the devices.

    Speed per device; utilisation (MFU, arXiv:2204.02311, appendix B) where the peak of
    the chip is known: the model's operations, without slots left empty and without what
    is computed again, over what the devices could have done in bfloat16; and the
    memory that was in use at most, where the backend counts it.
    """
    devices = run.mesh.devices.flat
    data = run.settings.data
    per_token = count(
        run.settings.layers, data.length, data.encoder_length
    ).train_flops_per_token
    # Speed counts the tokens of the scored side.
    flops = per_token * data.tokens_per_row / data.length
    peak = peak_flops(devices[0].platform, devices[0].device_kind)

    def known(record: Record) -> Record:
        found: dict[str, Any] = {}
        speed = record["perf/tokens_per_second"]
        found["perf/tokens_per_second_per_device"] = speed / len(devices)
        if peak is not None:
            able = peak * len(devices)
            found["perf/model_flops_utilization"] = flops * speed / able
        memory = memory_peak_bytes()
        if memory is not None:
            found["perf/memory_peak_bytes"] = memory
        return found

    return known


def memory_peak_bytes() -> int | None:
    """Returns the greatest memory in use so far on any device of this process.

    Returns:
        Bytes; None where the backend does not count them, as on CPU.
    """
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if (stats := device.memory_stats()) and "peak_bytes_in_use" in stats
    ]
    return max(peaks, default=None)
