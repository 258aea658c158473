"""Whole trees of arrays by the table: where each lives, and what does not divide."""

import math
from typing import Any

import jax
from jax.sharding import Mesh

from partitioning.rules import DEFAULT, Rules, sharding


def problems(
    mesh: Mesh, shapes: Any, logical_axes: Any, rules: Rules = DEFAULT
) -> list[str]:
    """Lists every dimension that does not divide over its mesh axes.

    Args:
        mesh: the mesh.
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        logical_axes: the same tree with a tuple of logical axes per array.
        rules: the table.
    """
    found = []
    for path, array, axes in leaves(shapes, logical_axes):
        for size, axis in zip(array.shape, axes, strict=True):
            parts = math.prod(mesh.shape[a] for a in rules[axis]) if axis else 1
            if size % parts:
                found.append(
                    f"{path}: its {axis!r} dimension of {size} does not divide over "
                    f"the mesh axes {'×'.join(rules[axis])} of size {parts}"
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


def table(
    mesh: Mesh, shapes: Any, logical_axes: Any, rules: Rules = DEFAULT
) -> list[tuple[str, str, str, str, int]]:
    """Says where each array lives.

    Returns:
        Per array its path, shape, logical axes, mesh axes, and bytes on one device.
    """
    rows = []
    for path, array, axes in leaves(shapes, logical_axes):
        local = sharding(mesh, axes, rules).shard_shape(array.shape)
        rows.append(
            (
                path,
                "×".join(map(str, array.shape)),
                ", ".join(a or "–" for a in axes),
                ", ".join("×".join(rules[a]) if a and rules[a] else "–" for a in axes),
                math.prod(local) * array.dtype.itemsize,
            )
        )
    return rows
