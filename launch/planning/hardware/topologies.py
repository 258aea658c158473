"""Slices of TPUs and nodes of GPUs, described by name: standard library only.

"v4:8x8x16" is one slice, "2*v5e:16x16" two joined by the slow network, "h100:64"
eight nodes. A mesh counts jax's devices; all chips have one, but 7x has two.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable
from typing import Literal

from launch.errors import UserError
from launch.planning.hardware.chips import CHIPS, Chip
from launch.planning.hardware.torus import Cut, lay_out, ring, spread
from partitioning.settings import (
    AXES,
    FASTEST_FIRST,
    WOUND_DEVICES,
    MeshSettings,
    by_links,
)

_NAME = re.compile(r"(?:(\d+)\*)?([a-z0-9-]+):(\d+(?:x\d+)*)")

# Slice shapes that are offered, smallest first. Not every shape of a torus is.
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    *("4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"),
)
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SHAPES = {
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": (*_CUBES, "16x16x24"),
    "v6e": _FLAT,
    "7x": (*_CUBES, "16x16x36"),
}
_MOST_SLICES = 64


class TopologyError(UserError):
    """A topology that cannot be understood."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are joined.

    Attributes:
        chip: what each is.
        shape: chips along each dimension of one slice; of GPUs their number.
        num_slices: slices joined by the slow network; 1 for GPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return str(self)

    @property
    def slice_name(self) -> str:
        """The name of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        """What the mesh's axes multiply to."""
        return self.num_chips * self.chip.devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Per dimension, whether its ends are joined to a ring.

        The cubes of v4, v5p and 7x close on themselves; v5e and v6e do over a whole
        side of their pod.
        """
        closing = 4 if self.chip.links == 6 else 16
        whole = all(size % closing == 0 for size in self.shape)
        if self.chip.links == 6:
            return (whole,) * len(self.shape)
        return tuple(size == closing for size in self.shape)

    def __str__(self) -> str:
        many = f"{self.num_slices}*" if self.num_slices > 1 else ""
        return many + self.slice_name


def parse(name: str) -> Topology:
    """Reads the name of a topology.

    Args:
        name: "v4:8x8x16", "2*v5e:16x16" or "h100:64".
    Raises:
        TopologyError: what is wrong with it, and the nearest that are offered.
    """
    match = _NAME.fullmatch(name.strip().lower())
    if match is None:
        raise TopologyError(
            f"{name!r} is not a topology: write CHIP:SHAPE, such as 'v5e:4x8', "
            "'v4:8x8x16', '2*v5p:4x4x8' for two slices, or 'h100:64'"
        )
    slices, chip_name, sizes = match.groups()
    slices = 1 if slices is None else int(slices)
    shape = tuple(map(int, sizes.split("x")))
    chip = CHIPS.get(chip_name)
    if chip is None:
        raise TopologyError(
            f"unknown chip {chip_name!r} in {name!r}; chips are "
            f"{', '.join(CHIPS)}{_nearest_chips(chip_name, sizes)}"
        )
    if not 1 <= slices <= _MOST_SLICES:
        raise TopologyError(f"{name!r}: slices are 1 to {_MOST_SLICES}")
    if chip.kind == "gpu":
        return _gpus(name, chip, shape, slices)
    shape = (*shape, 1) if len(shape) == 2 and chip.links == 6 else shape
    text = "x".join(map(str, shape))
    if text not in _SHAPES[chip.name]:
        offered = _nearest_shapes(chip.name, shape)
        raise TopologyError(
            f"unknown topology {name!r}: {chip.name} has no slice of {text}; nearest: "
            f"{', '.join(f'{chip.name}:{shape}' for shape in offered)}"
        )
    return Topology(chip, shape, slices)


def _gpus(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    number = shape[0]
    if len(shape) > 1 or slices > 1:
        raise TopologyError(
            f"{name!r}: GPUs have no torus and no slices; write their number, such as "
            f"'{chip.name}:{math.prod(shape) * slices}'"
        )
    nodes = number // chip.node_size * chip.node_size
    if number < 1 or (number > chip.node_size and number != nodes):
        near = [n for n in (nodes, nodes + chip.node_size) if n]
        raise TopologyError(
            f"{name!r}: {number} GPUs are not whole nodes of {chip.node_size}; "
            f"nearest: {', '.join(f'{chip.name}:{n}' for n in near)}"
        )
    return Topology(chip, shape)


def _nearest_chips(chip_name: str, sizes: str) -> str:
    """Chips spelt alike that have a slice of this shape first."""
    near = difflib.get_close_matches(chip_name, CHIPS, n=3, cutoff=0.5)
    named = [
        f"{chip}:{sizes}" if sizes in _SHAPES.get(chip, ()) else f"{chip}:…"
        for chip in near
    ]
    named.sort(key=lambda text: text.endswith("…"))
    return f"; nearest: {', '.join(named)}" if named else ""


def _nearest_shapes(chip_name: str, shape: tuple[int, ...]) -> list[str]:
    """The three slices that are nearest in number of chips."""
    wanted = math.log(max(math.prod(shape), 1))

    def distance(text: str) -> float:
        return abs(math.log(math.prod(map(int, text.split("x")))) - wanted)

    near = sorted(_SHAPES[chip_name], key=distance)[:3]
    return [text for text in _SHAPES[chip_name] if text in near]


def standard(chip_name: str) -> tuple[Topology, ...]:
    """Returns the slices of a chip that are offered, or whole nodes, growing."""
    chip = CHIPS[chip_name]
    if chip.kind == "gpu":
        return tuple(Topology(chip, (8 * 2**n,)) for n in range(12))
    return tuple(
        Topology(chip, tuple(map(int, text.split("x")))) for text in _SHAPES[chip_name]
    )


# --------------------------------------------------------------------- with a mesh


def problems(topology: Topology, mesh: MeshSettings) -> list[str]:
    """Lists what keeps a mesh from being laid out on a topology."""
    found = []
    number = topology.num_devices
    if mesh.num_devices != number:
        found.append(
            f"the mesh ({_described(mesh)}) has {mesh.num_devices:,} devices and "
            f"{topology} has {number:,}{_repair(mesh, number)}"
        )
    if topology.num_slices > 1 and mesh.replica != topology.num_slices:
        found.append(
            f"MESH_REPLICA = {mesh.replica}, and {topology} has "
            f"{topology.num_slices} slices: set MESH_REPLICA to their number, so that "
            "only gradients cross the slow network"
        )
    return found


def warnings(topology: Topology, mesh: MeshSettings) -> list[str]:
    """Lists axes that share a dimension of the torus, which costs bandwidth.

    A mesh whose axes are products of whole dimensions has a ring, or a torus, per axis.
    Any other is laid out too, by cutting dimensions.
    """
    if topology.chip.kind == "gpu" or problems(topology, mesh):
        return []
    if _has_its_own_order(topology):
        return []
    cuts = _cuts(topology, mesh)
    shared = [
        axis
        for axis, parts in cuts.items()
        if any(part.size < part.whole for part in parts)
    ]
    if not shared:
        return []
    dimensions = [
        *topology.shape,
        *([topology.chip.devices] * (topology.chip.devices > 1)),
    ]
    whole = sorted(_products(dimensions) - {1})
    return [
        f"{' and '.join(f'MESH_{a.upper()} = {getattr(mesh, a)}' for a in shared)} "
        f"cut a dimension of {topology.slice_name}: sizes that need no cut are "
        f"{', '.join(map(str, whole))}, if together they use each dimension once"
    ]


def axis_bandwidth(
    topology: Topology,
    mesh: MeshSettings,
    pattern: Literal["ring", "all_to_all"] = "ring",
) -> dict[str, float]:
    """Says how fast one device sends within each axis larger than 1, bytes/s one way.

    An upper bound for one collective at a time, without latency. Torus: a ring around
    a closed dimension uses both of its links, a line only one, and an axis of several
    dimensions those of all; `torus.ring` and `torus.spread` have the arithmetic.
    Slices: each chip's share of the slow network. GPUs: NVLink within a node; beyond
    it, as many adapters as the group has members in one node. Twisted tori are counted
    as plain ones, and the faster way between the devices of a chip as a link.

    Args:
        topology: the chips.
        mesh: sizes of the axes; `problems` must be empty.
        pattern: "ring" for gathers and sums, "all_to_all" for exchanges, where bytes
            are those that leave a device for others.
    """
    assert not problems(topology, mesh), problems(topology, mesh)
    chip = topology.chip.device()
    if chip.kind == "gpu":
        return _gpu_bandwidth(chip, mesh, pattern)
    rate = ring if pattern == "ring" else spread
    found = {
        axis: chip.link_bandwidth * rate(parts)
        for axis, parts in _cuts(topology, mesh).items()
    }
    if topology.num_slices > 1:
        found["replica"] = chip.slow_bandwidth
    return {axis: found[axis] for axis in AXES if getattr(mesh, axis) > 1}


def fastest_first(topology: Topology, mesh: MeshSettings) -> tuple[str, ...]:
    """Orders the axes as `partitioning.links.fastest_first` does on those devices.

    Which sides are closed cannot be seen there, and so does not count here either.
    """
    devices = topology.num_devices // topology.num_slices
    if topology.chip.kind == "gpu" or devices <= WOUND_DEVICES:
        return FASTEST_FIRST
    links = {
        axis: ring([cut._replace(closed=True) for cut in parts])
        for axis, parts in _cuts(topology, mesh).items()
    }
    return by_links(links, dataclasses.asdict(mesh))


def _gpu_bandwidth(chip: Chip, mesh: MeshSettings, pattern: str) -> dict[str, float]:
    """Consecutive GPUs are of one node; the last axis is the innermost."""
    found, stride = {}, 1
    for axis in reversed(AXES):
        size = getattr(mesh, axis)
        if size == 1:
            continue
        members = min(size, max(1, chip.node_size // stride))  # in one node
        if members == size:
            found[axis] = chip.link_bandwidth
        elif pattern == "ring":
            found[axis] = min(chip.link_bandwidth, members * chip.slow_bandwidth)
        else:  # of size − 1 parts, size − members leave the node
            beyond = (size - 1) / (size - members)
            found[axis] = min(chip.link_bandwidth, beyond * chip.slow_bandwidth)
        stride *= size
    return {axis: found[axis] for axis in AXES if axis in found}


def _cuts(topology: Topology, mesh: MeshSettings) -> dict[str, tuple[Cut, ...]]:
    """Which parts of which dimensions each axis of one slice takes."""
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    if topology.num_slices > 1:
        sizes["replica"] = 1
    shape, wraps = topology.shape, topology.wraps
    if topology.chip.devices > 1:
        shape, wraps = (*shape, topology.chip.devices), (*wraps, False)
    return lay_out(sizes, shape, wraps)


def _has_its_own_order(topology: Topology) -> bool:
    """Whether jax winds one ring through so small a slice, which any mesh may cut."""
    if topology.chip.links == 4:
        return topology.num_devices // topology.num_slices in (4, 8)
    return topology.chip.name == "7x" and max(topology.shape[:2]) <= 2


def _products(sizes: Iterable[int]) -> set[int]:
    """Products of every choice of sizes."""
    found = {1}
    for size in sizes:
        found |= {size * other for other in found}
    return found


def _repair(mesh: MeshSettings, number: int) -> str:
    """The value of one axis with which the sizes would multiply to `number`."""
    for axis in ("data", "expert", "model", "context", "replica"):
        others = mesh.num_devices // getattr(mesh, axis)
        if number % others == 0:
            return f": set MESH_{axis.upper()} to {number // others}"
    return ": the axes must multiply to that"


def _described(mesh: MeshSettings) -> str:
    large = [f"{axis} {size}" for axis in AXES if (size := getattr(mesh, axis)) > 1]
    return " × ".join(large) or "one device"
