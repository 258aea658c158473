"""Builds the device mesh of a run."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from partitioning.settings import AXES, MeshSettings


def make_mesh(
    settings: MeshSettings, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh with all six axes, of type Auto.

    Args:
        settings: sizes of the axes; their product is the number of devices used.
        devices: the devices to lay out; by default the first that jax lists.
    Raises:
        ValueError: fewer devices than the mesh needs.
    """
    available = list(jax.devices() if devices is None else devices)
    if len(available) < settings.num_devices:
        raise ValueError(
            f"the mesh {describe(settings)} needs {settings.num_devices} devices, "
            f"and {len(available)} are here"
        )
    used = available[: settings.num_devices]
    sizes = tuple(getattr(settings, axis) for axis in AXES)
    grid = mesh_utils.create_device_mesh(sizes, used)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe(settings: MeshSettings) -> str:
    """Names the axes larger than 1: "data 2 × expert 2", or "one device"."""
    large = [f"{axis} {size}" for axis in AXES if (size := getattr(settings, axis)) > 1]
    return " × ".join(large) or "one device"
