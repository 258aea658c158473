"""Changes knobs of a configuration that has been read: settings and gin text together.

Standard library only, beside `launch.config.reader`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.errors import nearest
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


def with_values(config: str, values: Mapping[str, Any]) -> str:
    """Returns a configuration, as runs keep it, with other values of some knobs."""
    for macro, value in values.items():
        line = f"{macro} = {value!r}".replace("\\", r"\\")  # as a template has it
        config = re.sub(rf"(?m)^{macro} = .*$", line, config)
    return config


def mesh_knobs(mesh: MeshSettings) -> dict[str, int]:
    """Returns the macros of a mesh."""
    return {f"MESH_{axis.upper()}": getattr(mesh, axis) for axis in AXES}


def parse_mesh(text: str) -> tuple[MeshSettings, list[str]]:
    """Reads a mesh such as "data=2,expert=4"; axes that are not named have size 1.

    Returns:
        The mesh, and what is wrong with the text.
    """
    sizes: dict[str, int] = {}
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = (part.strip() for part in word.partition("="))
        if axis not in AXES:
            found.append(
                f"--mesh={text}: {axis!r} is not an axis of the mesh"
                f"{nearest(axis, AXES)}; the axes are {', '.join(AXES)}"
            )
        elif axis in sizes:
            found.append(f"--mesh={text}: {axis} is given twice")
        elif not size.isdecimal():
            found.append(
                f"--mesh={text}: {word!r} has no size: write {axis}=2, and commas "
                "between axes"
            )
        else:
            sizes[axis] = int(size)
    mesh = MeshSettings(**sizes)
    if not sizes and not found:
        found.append(f"--mesh={text}: names no axis: write --mesh=data=2,expert=4")
    return mesh, found


def describe_mesh(mesh: MeshSettings) -> str:
    """Names the axes larger than 1: "data 2 × expert 2", or "one device"."""
    sizes = dataclasses.asdict(mesh)
    large = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return " × ".join(large) or "one device"
