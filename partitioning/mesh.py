"""Builds the device mesh of a run."""

import dataclasses
import warnings
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from partitioning.links import are_placed, num_slices, shape
from partitioning.settings import AXES, MeshSettings


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
            f"{'×'.join(map(str, shape(used)))}: some are cut, and their axes share "
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
    if devices[0].platform == "tpu" and not are_placed(devices):
        return np.array(devices).reshape([sizes[axis] for axis in AXES])
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


def describe(settings: MeshSettings) -> str:
    """Names the axes larger than 1: "data 2 × expert 2", or "one device"."""
    large = [f"{axis} {size}" for axis in AXES if (size := getattr(settings, axis)) > 1]
    return " × ".join(large) or "one device"
