"""Changes knobs of a configuration that has been read: settings and gin text together.

Standard library only, beside `launch.config.reader`.
"""

import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

from launch.config import reader
from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.planning.hardware.topologies import Topology
from partitioning.settings import AXES, MeshSettings

# Knobs that a plan may set, and the setting that each of them fills.
PLACES: Mapping[str, tuple[str, str]] = {
    "PLATFORM": ("platform", "name"),
    "SIMULATED_DEVICES": ("platform", "simulated_devices"),
    "NUM_PROCESSES": ("platform", "num_processes"),
    "XLA_FLAGS": ("platform", "xla_flags"),
    "LIBTPU_INIT_ARGS": ("platform", "libtpu_init_args"),
    **{f"MESH_{axis.upper()}": ("mesh", axis) for axis in AXES},
    "FSDP": ("partition", "fsdp"),
    "EXPERT_TENSOR_PARALLEL": ("partition", "expert_tensor_parallel"),
    "CONTEXT_ATTENTION": ("partition", "context_attention"),
    "GROUP_SIZE": ("router", "group_size"),
    "GROUP_ROWS": ("router", "group_rows"),
    "REMAT": ("execution", "remat"),
    "SPARSE_REMAT": ("execution", "sparse_remat"),
    "TRANSPORT": ("execution", "transport"),
    "VOCAB_CHUNKS": ("execution", "vocab_chunks"),
    "ATTENTION_BLOCK": ("execution", "attention_block"),
    "MICROBATCHES": ("train", "microbatches"),
}
_PLATFORM_OF_KIND = {"tpu": "tpu", "gpu": "cuda"}


def changed(settings: Settings, knobs: Mapping[str, Any]) -> Settings:
    """Returns the settings with these knobs, by macro, in place of theirs."""
    records: dict[str, dict[str, Any]] = {}
    for macro, value in knobs.items():
        record, field = PLACES[macro]
        records.setdefault(record, {})[field] = value
    return dataclasses.replace(
        settings,
        **{
            record: dataclasses.replace(getattr(settings, record), **fields)
            for record, fields in records.items()
        },
    )


def reconfigured(config: ResolvedConfig, knobs: Mapping[str, Any]) -> ResolvedConfig:
    """Returns a configuration with these knobs; its gin text says so too."""
    kept = tuple(
        knob._replace(value=knobs[knob.macro], origin="plan", same_as="")
        if knob.macro in knobs
        else knob
        for knob in config.knobs
    )
    return ResolvedConfig(
        settings=changed(config.settings, knobs),
        knobs=kept,
        operative="".join(f"{knob.macro} = {knob.text}\n" for knob in kept),
        where=config.where,
    )


def mesh_knobs(mesh: MeshSettings) -> dict[str, int]:
    """Returns the macros of a mesh."""
    return {f"MESH_{axis.upper()}": getattr(mesh, axis) for axis in AXES}


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
    return reconfigured(config, knobs)


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
    uncut = [f"{macro}={size}" for macro, size in mesh_knobs(MeshSettings()).items()]
    platform = reader.read(["runs/tiny.gin", name], uncut).settings.platform
    return {
        "XLA_FLAGS": platform.xla_flags,
        "LIBTPU_INIT_ARGS": platform.libtpu_init_args,
    }
