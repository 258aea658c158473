"""Which meshes are verified, and how small each becomes. Standard library only."""

import dataclasses
import math

import partitioning.settings
from launch.errors import nearest
from partitioning.settings import AXES, MeshSettings

MOST_DEVICES = 16  # simulated on one machine
_LARGEST = 4  # size of a shrunk axis: of 2, forwards and backwards are one neighbour


def parse(text: str) -> tuple[MeshSettings, list[str]]:
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


def shrink(mesh: MeshSettings, most: int = MOST_DEVICES) -> MeshSettings:
    """Returns a mesh with the same axes larger than 1, each of at most four devices.

    Args:
        mesh: that of the run; `problems` has nothing against it.
        most: devices.
    """
    sizes = {axis: min(getattr(mesh, axis), _LARGEST) for axis in AXES}
    for axis in ("replica", "data", "model", "expert", "context"):
        # `context` and `expert` last: what travels round them shows best on four.
        if math.prod(sizes.values()) > most:
            sizes[axis] = min(sizes[axis], 2)
    return MeshSettings(**sizes)


def problems(mesh: MeshSettings, most: int = MOST_DEVICES) -> list[str]:
    """Lists why a mesh cannot be verified here."""
    found = partitioning.settings.problems(mesh)
    large = [axis for axis in AXES if getattr(mesh, axis) > 1]
    if 2 ** len(large) > most:
        found.append(
            f"the mesh {describe(mesh)} has {len(large)} axes larger than 1, which are "
            f"{2 ** len(large)} devices even if each has 2, and {most} can be "
            "simulated: verify fewer at a time, with --mesh"
        )
    return found


def describe(mesh: MeshSettings) -> str:
    """Names the axes larger than 1: "data 2 × expert 2", or "one device"."""
    sizes = dataclasses.asdict(mesh)
    large = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    return " × ".join(large) or "one device"
