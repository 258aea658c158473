"""Arrays of a checkpoint, brought to where a run wants them."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from launch.checkpoints import sums
from launch.checkpoints.arrays import Arrays, Index
from launch.checkpoints.digest import digests
from launch.checkpoints.places import CheckpointError, DamagedError

# Bytes that are on their way from the disk to the devices of this process.
AHEAD_BYTES = 2**31


def placed(
    arrays: Arrays, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads the pieces that the devices of this process hold, and puts them there.

    No other process is waited for.

    Args:
        arrays: those of the checkpoint, of the shapes and types that are wanted.
        wanted: shape, type and place of each.
    Raises:
        DamagedError: what is read is proven to be damaged.
        CheckpointError: it cannot be read, for another reason.
    """
    found: dict[str, list[jax.Array]] = {name: [] for name in wanted}
    waiting = collections.deque[tuple[str, Any, list[jax.Device], int]]()
    ahead = 0

    def settle() -> None:
        nonlocal ahead
        name, future, devices, size = waiting.popleft()
        values = np.asarray(arrays.result(name, future))
        ahead -= size
        memory = wanted[name].sharding.memory_kind
        for device in devices:
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=memory)
            found[name].append(jax.device_put(values, place))

    opening = {name: arrays.opening(name) for name in wanted}
    for name, like in wanted.items():
        array = arrays.opened(name, opening.pop(name))
        for place, devices in _pieces(like):
            size = like.dtype.itemsize * int(np.prod([p.stop - p.start for p in place]))
            while waiting and ahead + size > AHEAD_BYTES:
                settle()
            waiting.append((name, array[place].read(), devices, size))
            ahead += size
    while waiting:
        settle()
    return {
        name: jax.make_array_from_single_device_arrays(
            like.shape, like.sharding, found[name], dtype=like.dtype
        )
        for name, like in wanted.items()
    }


def _pieces(like: jax.ShapeDtypeStruct) -> Iterator[tuple[Index, list[jax.Device]]]:
    """The pieces of an array that are here, and on which devices each is."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    places = like.sharding.addressable_devices_indices_map(like.shape)
    for device, index in places.items():
        bounds = tuple(
            part.indices(length)[:2]
            for part, length in zip(index, like.shape, strict=True)
        )
        devices.setdefault(bounds, []).append(device)
    for bounds, holders in devices.items():
        yield tuple(slice(*pair) for pair in bounds), holders


def changed(arrays: Arrays, found: Mapping[str, jax.Array]) -> list[str]:
    """Names arrays whose digest on the devices is not the one that was saved."""
    said = arrays.saved
    return [n for n, digest in digests(found).items() if digest != said[n]["digest"]]


def refuse_changed(arrays: Arrays, names: Sequence[str]) -> None:
    """Raises what other digests on the devices prove.

    Memory or a device may be at fault, and not the disk: the first array is read again,
    and digested by the host.

    Raises:
        DamagedError: it is damaged on the disk.
        CheckpointError: it is not.
    """
    if not names:
        return
    first, more = names[0], len(names) - 5
    listed = ", ".join(names[:5]) + (f" and {more:,} more arrays" if more > 0 else "")
    said = arrays.saved[first]
    if sums.digest_of(tuple(said["shape"]), arrays.blocks(first)) == said["digest"]:
        raise CheckpointError(
            f"{arrays.path} is as it was saved, but the devices hold something else "
            f"after it was read, in {listed}: look for a fault of the machine"
        )
    raise DamagedError(arrays.path, f"what was read is not what was saved, in {listed}")
