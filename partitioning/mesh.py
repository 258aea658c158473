"""Builds the device mesh of a run."""

import dataclasses
import functools
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from partitioning.settings import (
    AXES,
    FASTEST_FIRST,
    WOUND_DEVICES,
    MeshSettings,
    by_links,
)


class SplitAxesWarning(UserWarning):
    """A mesh that had to cut a dimension of the torus."""


def make_mesh(
    settings: MeshSettings, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh with all six axes, of type Auto.

    The last axes lie on the fastest links. Slices of TPUs are joined by `replica`.
    Where the axes are not products of whole dimensions of the torus, dimensions are
    cut, which costs bandwidth, and a `SplitAxesWarning` says so.

    Args:
        settings: sizes of the axes; their product is the number of devices used.
        devices: the devices to lay out, real ones or those of a described topology; by
            default the first that jax lists.
    Raises:
        ValueError: fewer devices than the mesh needs, or slices that `replica` does
            not join.
    """
    available = list(jax.devices() if devices is None else devices)
    if len(available) < settings.num_devices:
        raise ValueError(
            f"the mesh {describe(settings)} needs {settings.num_devices} devices, "
            f"and {len(available)} are here"
        )
    used = available[: settings.num_devices]
    slices = num_slices(used)
    if slices > 1 and settings.replica != slices:
        raise ValueError(
            f"the mesh {describe(settings)} lies over {slices} slices: set "
            f"MESH_REPLICA = {slices}, so that only gradients cross between them"
        )
    try:
        grid = _grid(settings, used, slices, may_cut=False)
    except NotImplementedError:  # what jax raises where it would have to cut
        grid = _grid(settings, used, slices, may_cut=True)
        warnings.warn(
            f"the mesh {describe(settings)} does not fit whole dimensions of the torus "
            f"{'×'.join(map(str, _shape(used)))}: some are cut, and their axes share "
            "links",
            SplitAxesWarning,
            stacklevel=2,
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _grid(
    settings: MeshSettings, devices: list[jax.Device], slices: int, *, may_cut: bool
) -> np.ndarray:
    """The devices by axis; raises NotImplementedError where it would have to cut."""
    sizes = dataclasses.asdict(settings)
    if slices == 1:
        return mesh_utils.create_device_mesh(
            tuple(sizes[axis] for axis in AXES),
            devices,
            allow_split_physical_axes=may_cut,
        )
    return mesh_utils.create_hybrid_device_mesh(
        tuple(1 if axis == "replica" else sizes[axis] for axis in AXES),
        tuple(slices if axis == "replica" else 1 for axis in AXES),
        devices,
        allow_split_physical_axes=may_cut,
    )


@functools.lru_cache(maxsize=64)
def fastest_first(mesh: Mesh) -> tuple[str, ...]:
    """Orders the axes by the links that a device has along each, the most first.

    On a torus a whole dimension has two, one each way, and a part of it fewer; equals
    are ordered by size. Elsewhere, and on the smallest slices, the last axis is first.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform != "tpu" or (
        len(devices) <= WOUND_DEVICES * num_slices(devices)
    ):
        return FASTEST_FIRST
    places = _places(devices).reshape(*mesh.devices.shape, -1)
    whole = _extent(devices)
    links = {}
    for place, axis in enumerate(AXES):
        lines = np.moveaxis(places, place, 0).reshape(mesh.shape[axis], -1, len(whole))
        links[axis] = sum(map(_links, lines[:, 0].T, whole))
    return by_links(links, mesh.shape)


def _links(places: np.ndarray, whole: int) -> float:
    """Links of a line of devices along one dimension of the torus, each way counted.

    Those of a part that is `stride` apart are shared by as many lines.
    """
    taken = np.unique(places)
    if len(taken) == 1:
        return 0
    stride = int(np.diff(taken).min())
    goes_round = len(taken) * stride == whole and len(taken) > 2
    return (2 if goes_round else 1) / stride


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Counts the slices of TPUs; other devices are of one.

    GPUs have a slice per node, but there a mesh may cross nodes by any axis.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _shape(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """Places along each dimension of a torus, and of the devices of a chip if many."""
    return tuple(int(n) for n in _extent(devices) if n > 1)


def _extent(devices: Sequence[jax.Device]) -> np.ndarray:
    return np.ptp(_places(devices), axis=0) + 1


def _places(devices: Sequence[jax.Device]) -> np.ndarray:
    """Where each is: dimensions of the torus, then the devices of a chip."""
    return np.array([(*device.coords, device.core_on_chip) for device in devices])


def describe(settings: MeshSettings) -> str:
    """Names the axes larger than 1: "data 2 × expert 2", or "one device"."""
    large = [f"{axis} {size}" for axis in AXES if (size := getattr(settings, axis)) > 1]
    return " × ".join(large) or "one device"
