"""Which meshes are verified, and how small each becomes. Standard library only."""

import math

import partitioning.settings
from launch.config.edit import describe_mesh
from partitioning.settings import AXES, MeshSettings

MOST_DEVICES = 16  # simulated on one machine
_LARGEST = 4  # size of a shrunk axis: of 2, forwards and backwards are one neighbour


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
            f"the mesh {describe_mesh(mesh)} has {len(large)} axes larger than 1, "
            f"which are {2 ** len(large)} devices even if each has 2, and {most} can "
            "be simulated: verify fewer at a time, with --mesh"
        )
    return found
