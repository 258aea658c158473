"""The devices of a run that are elsewhere, as its hardware file is named for them.

Of a `jax.Device` they have what it takes to lay out a mesh and to place arrays on it;
nothing can run there. Names are those of `configs/hardware/`: "v5e_2x16x16.gin" is for
two slices of 16×16, "h100_64.gin" for 64 GPUs.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from launch.config.reader import ResolvedConfig
from launch.errors import ConfigError
from launch.planning.hardware.chips import CHIPS, Chip
from launch.planning.hardware.topologies import Topology, problems
from launch.run.chip_peaks import TPU_KINDS

_KINDS = {"tpu": "tpu", "cuda": "gpu"}
# Knobs that a hardware file of an accelerator sets.
_TOLD_BY = ("PLATFORM", "LIBTPU_INIT_ARGS", "XLA_FLAGS")


class _Elsewhere:
    """The client of devices of which this process has none, as jax asks it."""

    def process_index(self) -> int:
        return -1


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not here.

    Attributes:
        id: its number.
        platform: "tpu" or "gpu".
        device_kind: name of its kind, as jax gives it.
        coords: place on the torus; None if it has none, or it is not known.
        core_on_chip: its number among those of its chip.
        slice_index: number of its slice.
        process_index: number of its host.
    """

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] | None = None
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    client = _Elsewhere()


def devices(config: ResolvedConfig) -> tuple[list[Any] | None, str]:
    """Describes the devices that a run would have, without asking for any.

    Returns:
        As many as the mesh has, and what is known of them, in words. None and "" where
        jax finds them on this machine: with PLATFORM "cpu" or "auto".
    Raises:
        ConfigError: the mesh cannot lie on the slices of the file's name.
    """
    kind = _KINDS.get(config.settings.platform.name)
    if kind is None:
        return None, ""
    mesh = config.settings.mesh
    number = mesh.num_devices
    chip, topology, file = _told(config, kind)
    if chip is None:
        unknown = f"{kind.upper()} of unknown kind"
        return [Device(n, kind, unknown) for n in range(number)], (
            f"{number:,} of a kind that no file is named for, as v4_8x8x16.gin and "
            "h100_8.gin are: what depends on the kind may be chosen otherwise there"
        )
    name = TPU_KINDS.get(chip.name, chip.name.upper())
    if topology is None or topology.num_devices != number:
        words = f"{number:,} × {name}, by the name of {file}"
        if kind == "tpu":
            words += "; where they lie is not known, nor the mesh's order on the torus"
        return [Device(n, kind, name) for n in range(number)], words
    if found := problems(topology, mesh):
        raise ConfigError(config.where, found)
    words = f"{number:,} × {name} of {topology}, by the name of {file}"
    if kind == "gpu":
        return [Device(n, kind, name) for n in range(number)], words
    # On two dimensions the third place is 0.
    shape = (*topology.shape, 1)[:3]
    places = itertools.product(
        range(topology.num_slices), np.ndindex(shape), range(chip.devices)
    )
    return [
        Device(n, kind, name, coords, core, slice_index)
        for n, (slice_index, coords, core) in enumerate(places)
    ], words


def _told(
    config: ResolvedConfig, kind: str
) -> tuple[Chip | None, Topology | None, str]:
    """The chip that a file is named for, the slices if it names them, and the file."""
    origins = {knob.macro: knob.origin for knob in config.knobs}
    for macro in _TOLD_BY:
        file = origins[macro].rpartition(":")[0]
        for chip in CHIPS.values():
            start = f"{chip.name.replace('-', '_')}_"
            stem = Path(file).stem
            if chip.kind == kind and stem.startswith(start):
                return chip, _slices(chip, stem.removeprefix(start)), file
    return None, None, ""


def _slices(chip: Chip, words: str) -> Topology | None:
    """The topology of "8x8x16", "64", or "2x16x16" of a torus of two dimensions."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", words):
        return None
    sizes = tuple(map(int, words.split("x")))
    dimensions = max(1, chip.links // 2)
    if len(sizes) == dimensions:
        return Topology(chip, sizes)
    if len(sizes) == dimensions + 1 and chip.kind == "tpu":
        return Topology(chip, sizes[1:], sizes[0])
    return None
