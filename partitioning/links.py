"""Where devices lie on a torus, and so which axes of a mesh have the fastest links."""

import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from partitioning.settings import AXES, FASTEST_FIRST, WOUND_DEVICES, by_links


@functools.lru_cache(maxsize=64)
def fastest_first(mesh: Mesh) -> tuple[str, ...]:
    """Orders the axes by the links that a device has along each, the most first.

    On a torus a whole dimension has two, one each way, and a part of it fewer; equals
    are ordered by size. Elsewhere, and on the smallest slices, the last axis is first.
    """
    devices = list(mesh.devices.flat)
    if not are_placed(devices) or (len(devices) <= WOUND_DEVICES * num_slices(devices)):
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


def are_placed(devices: Sequence[jax.Device]) -> bool:
    """Whether they are on a torus, and say where; described ones may not."""
    return devices[0].platform == "tpu" and devices[0].coords is not None


def num_slices(devices: Sequence[jax.Device]) -> int:
    """Counts the slices of TPUs; other devices are of one.

    GPUs have a slice per node, but there a mesh may cross nodes by any axis.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def shape(devices: Sequence[jax.Device]) -> tuple[int, ...]:
    """Places along each dimension of a torus, and of the devices of a chip if many."""
    return tuple(int(n) for n in _extent(devices) if n > 1)


def _extent(devices: Sequence[jax.Device]) -> np.ndarray:
    return np.ptp(_places(devices), axis=0) + 1


def _places(devices: Sequence[jax.Device]) -> np.ndarray:
    """Where each is: dimensions of the torus, then the devices of a chip."""
    return np.array([(*device.coords, device.core_on_chip) for device in devices])
