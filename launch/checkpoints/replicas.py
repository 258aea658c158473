"""Devices that hold the same piece of an array must hold the same bits of it."""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from launch.checkpoints.digest import digest_of


def differing(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Compares the copies of each piece; returns a sentence for each that differs.

    Each device sums up what it holds, without a word to the others, and the sums are
    compared. Arrays of which every device holds a piece of its own have no copies.

    Args:
        arrays: arrays on one mesh, in the memory of its devices.
    """
    found = []
    for name, array in arrays.items():
        place = array.sharding
        if not isinstance(place, NamedSharding) or place.memory_kind == "pinned_host":
            continue
        pieces = place.devices_indices_map(array.shape)
        if len({str(piece) for piece in pieces.values()}) == len(pieces):
            continue
        sums = _sums(array, place)
        devices = place.mesh.devices.flat
        by_piece: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for device, value in zip(devices, sums.tolist(), strict=True):
            by_piece[str(pieces[device])].append((device, value))
        found += [
            f"{name}: {words}" for held in by_piece.values() if (words := _odd(held))
        ]
    return found


def _odd(held: list[tuple[Any, int]]) -> str:
    """Which devices do not hold what most hold; "" if all hold the same."""
    (usual, number), *others = Counter(value for _, value in held).most_common()
    if not others:
        return ""
    odd = [device for device, value in held if value != usual]
    named = ", ".join(f"device {d.id} of process {d.process_index}" for d in odd[:5])
    return f"{named} holds other bits than {number} of {len(held)} devices do"


def _sums(array: jax.Array, place: NamedSharding) -> np.ndarray:
    """uint32[devices]: a digest of what each device holds, in the order of the mesh."""
    sums = jax.block_until_ready(_program(place.mesh, place.spec)(array))
    return np.asarray(multihost_utils.process_allgather(sums, tiled=True))


@functools.cache
def _program(mesh: jax.sharding.Mesh, spec: PartitionSpec) -> Callable[..., jax.Array]:
    """Sums up what each device holds; one compiled program per shape."""
    return jax.jit(
        jax.shard_map(
            lambda piece: digest_of(piece)[None],
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )
