"""Which devices take part in a collective, and along which axes of the mesh."""

import math
import re
from collections.abc import Mapping

import numpy as np


def groups_text(attributes: str) -> str:
    """Returns the text of `replica_groups`, in whichever of its forms."""
    found = re.search(
        r"replica_groups=("
        r"\{\{.*?\}\}|\{\}"  # lists
        r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"  # a counted array
        # axes of a mesh, and perhaps the order of its devices
        r"|mesh\[[^\]]*\](?:, device_ids=\(.*?\)(?= \{))? ?\{[^}]*\})",
        attributes,
    )
    return found[1] if found else "{}"


def members(text: str, number: int) -> np.ndarray:
    """Returns the members of each group as rows."""
    if text.startswith("mesh"):
        return _groups_of_mesh(text)
    if text.startswith("["):
        shape, _, source = text.partition("<=")
        return _counted(source).reshape([int(n) for n in re.findall(r"\d+", shape)])
    rows = [re.findall(r"\d+", row) for row in re.findall(r"\{([\d,]+)\}", text)]
    if not rows:
        return np.arange(number)[None]
    return np.array(rows, dtype=int)


def _counted(text: str) -> np.ndarray:
    """Reads "[2,4]T(1,0)": counts, shapes and transposes."""
    shape, _, order = text.partition("T")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    counted = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        counted = counted.transpose([int(n) for n in re.findall(r"\d+", order)])
    return counted.reshape(-1)


def _groups_of_mesh(text: str) -> np.ndarray:
    """Reads "mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}"."""
    named = [(a, int(n)) for a, n in re.findall(r"'([^']+)'=(\d+)", text)]
    chosen = text[text.rindex("{") :]
    ids = re.search(r"device_ids=\((.*)\) \{", text)
    number = math.prod(n for _, n in named)
    if ids is None:
        devices = np.arange(number)
    elif ids[1].startswith("["):
        devices = _counted(ids[1])
    else:
        devices = np.array([int(n) for n in re.findall(r"\d+", ids[1])])
    sizes: list[int] = []
    taken: list[int] = []
    for axis, size in named:
        part = re.search(rf"'{re.escape(axis)}'(?::\((\d+)\)(\d+))?", chosen)
        if part is None:
            split, picked = [size], []
        elif part[1] is None:
            split, picked = [size], [0]
        else:  # 'a':(2)4 is the part of size 4 behind one of 2
            before, inside = int(part[1]), int(part[2])
            split, picked = [before, inside, size // before // inside], [1]
        taken += [len(sizes) + place for place in picked]
        sizes += split
    grid = devices.reshape(sizes)
    grid = np.moveaxis(grid, taken, range(-len(taken), 0)) if taken else grid[..., None]
    members = math.prod(sizes[place] for place in taken)
    return grid.reshape(-1, members)


def axes(groups: np.ndarray, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Names the axes along which the members of a group differ.

    Devices are numbered in the mesh's order; with several slices within one slice,
    which is the same, since `replica` comes first.
    """
    shape = tuple(sizes.values())
    if groups.size == 0 or groups.max() >= math.prod(shape):
        return ()
    places = np.unravel_index(groups, shape)
    return tuple(
        axis
        for axis, place in zip(sizes, places, strict=True)
        if (place != place[:, :1]).any()
    )
