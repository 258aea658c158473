"""A configuration as it would run on another slice."""

import functools
import importlib.resources
from typing import Any

from launch.config import edit, reader
from launch.config.reader import ResolvedConfig
from launch.planning.hardware.topologies import Topology
from partitioning.settings import MeshSettings

_PLATFORM_OF_KIND = {"tpu": "tpu", "gpu": "cuda"}


def moved(config: ResolvedConfig, topology: Topology) -> ResolvedConfig:
    """Returns the configuration as it would run there: its own flags, or the chip's.

    A plan asks nothing of this machine's devices.
    """
    knobs: dict[str, Any] = {
        "PLATFORM": _PLATFORM_OF_KIND[topology.chip.kind],
        "SIMULATED_DEVICES": 0,
        "NUM_PROCESSES": 0,
    }
    platform = config.settings.platform
    if not (platform.xla_flags or platform.libtpu_init_args):
        knobs |= flags(topology)
    return edit.reconfigured(config, knobs)


@functools.cache
def hardware_file(chip_name: str) -> str:
    """Returns the hardware file that has a chip's flags, "" if there is none."""
    folder = importlib.resources.files("configs") / "hardware"
    start = f"{chip_name.replace('-', '_')}_"
    found = sorted(
        file.name for file in folder.iterdir() if file.name.startswith(start)
    )
    return f"hardware/{found[0]}" if found else ""


@functools.cache
def flags(topology: Topology) -> dict[str, Any]:
    """Returns the compilers' flags that the hardware file of a chip has."""
    name = hardware_file(topology.chip.name)
    if not name:
        return {}
    # A mesh is beside the point here, and any run that can be read will do.
    uncut = [
        f"{macro}={size}" for macro, size in edit.mesh_knobs(MeshSettings()).items()
    ]
    platform = reader.read(["runs/tiny.gin", name], uncut).settings.platform
    return {
        "XLA_FLAGS": platform.xla_flags,
        "LIBTPU_INIT_ARGS": platform.libtpu_init_args,
    }
