"""The one table from logical axes to mesh axes, and the placements it gives.

An array's logical axes say what each of its dimensions means ("embed", "mlp"); the
table says how each meaning is cut over the mesh. Nothing else in the repository
decides where an array lives.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partitioning.settings import BATCH_AXES

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "length": ("context",),
    "group": BATCH_AXES,
    # parameters
    "expert": ("expert",),
    "vocab": ("model",),
    "heads": ("model",),
    "mlp": ("model",),
    "embed": (),
    "head_dim": (),
    "pair": (),  # a gate and what it gates
    "layers": (),
}


def spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Translates the logical axes of one array; None is a dimension left whole."""
    entries = []
    for axis in logical_axes:
        mesh_axes = RULES[axis] if axis is not None else ()
        entries.append(mesh_axes if len(mesh_axes) > 1 else (*mesh_axes, None)[0])
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """Places one array by its logical axes."""
    return NamedSharding(mesh, spec(logical_axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Places an array whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def problems(mesh: Mesh, shapes: Any, logical_axes: Any) -> list[str]:
    """Lists every dimension that does not divide over its mesh axes.

    Args:
        mesh: the mesh.
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        logical_axes: the same tree with a tuple of logical axes per array.
    """
    found = []
    for path, array, axes in leaves(shapes, logical_axes):
        for size, axis in zip(array.shape, axes, strict=True):
            parts = math.prod(mesh.shape[a] for a in RULES[axis]) if axis else 1
            if size % parts:
                found.append(
                    f"{path}: its {axis!r} dimension of {size} does not divide over "
                    f"the mesh axes {'×'.join(RULES[axis])} of size {parts}"
                )
    return found


def leaves(shapes: Any, logical_axes: Any) -> list[tuple[str, Any, tuple]]:
    """Pairs every array of a tree with its path and its logical axes."""
    found: list[tuple[str, Any, tuple]] = []

    def note(path: Any, array: Any, axes: tuple) -> None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found.append((name, array, tuple(axes)))

    # Refuses trees that differ.
    jax.tree_util.tree_map_with_path(note, shapes, logical_axes)
    return found


def placement_table(
    mesh: Mesh, shapes: Any, logical_axes: Any
) -> list[tuple[str, str, str, str, int]]:
    """Says where each array lives.

    Returns:
        Per array its path, shape, logical axes, mesh axes, and bytes on one device.
    """
    rows = []
    for path, array, axes in leaves(shapes, logical_axes):
        local = sharding(mesh, axes).shard_shape(array.shape)
        rows.append(
            (
                path,
                "×".join(map(str, array.shape)),
                ", ".join(a or "–" for a in axes),
                ", ".join("×".join(RULES[a]) if a and RULES[a] else "–" for a in axes),
                math.prod(local) * array.dtype.itemsize,
            )
        )
    return rows
