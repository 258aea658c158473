"""In what two checkpoints differ: configuration, data, and arrays by how much."""

import dataclasses
from pathlib import Path

import numpy as np

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import read_manifest
from launch.config.diff import changes


@dataclasses.dataclass(frozen=True)
class Row:
    """An array that is not the same in both.

    Attributes:
        name: its name.
        what: how it differs, where numbers cannot be compared; else "".
        absolute: largest difference of two elements.
        relative: the same over the largest magnitude in the first checkpoint.
    """

    name: str
    what: str = ""
    absolute: float = 0.0
    relative: float = 0.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """What two checkpoints do not share.

    Attributes:
        knobs: changes of the configuration, a line each.
        facts: other facts of the manifests that differ, a line each.
        rows: arrays that differ.
        num_equal: arrays that do not.
    """

    knobs: tuple[str, ...]
    facts: tuple[str, ...]
    rows: tuple[Row, ...]
    num_equal: int

    @property
    def is_none(self) -> bool:
        """Whether arrays, configuration and data are the same."""
        return not (self.knobs or self.facts or self.rows)


def between(one: Path, other: Path) -> Difference:
    """Compares two checkpoints; arrays whose digests agree are not read.

    Args:
        one: the folder of a step.
        other: likewise, of the same run or another.
    Raises:
        DamagedError: either is damaged, as far as it is read.
    """
    before, now = read_manifest(one), read_manifest(other)
    facts = [
        f"{name} {before.get(name)} → {now.get(name)}"
        for name in ("step", "data_fingerprint", "vocabulary_fingerprint")
        if before.get(name) != now.get(name)
    ]
    knobs = [str(change) for change in changes(before["config"], now["config"])]
    first, second = Arrays(one, before), Arrays(other, now)
    rows, equal = [], 0
    for name in {**first.saved, **second.saved}:
        row = _row(name, first, second)
        if row is None:
            equal += 1
        else:
            rows.append(row)
    return Difference(tuple(knobs), tuple(facts), tuple(rows), equal)


def _row(name: str, one: Arrays, other: Arrays) -> Row | None:
    """How an array differs; None if it does not."""
    before, now = one.saved.get(name), other.saved.get(name)
    if before is None or now is None:
        return Row(name, "only in the first" if now is None else "only in the second")
    if before == now:
        return None
    kinds = [f"{array['dtype']}{array['shape']}" for array in (before, now)]
    if before["shape"] != now["shape"]:
        return Row(name, " → ".join(kinds))
    largest = magnitude = 0.0
    array = other.opened(name)
    for place, values in one.blocks(name):
        there = np.asarray(other.result(name, array[place].read()), np.float64)
        here = np.asarray(values, np.float64)
        if here.size:
            largest = np.maximum(largest, np.max(np.abs(here - there)))  # NaN stays
            magnitude = max(magnitude, float(np.nanmax(np.abs(here))))
    relative = float(largest) / magnitude if magnitude else float(largest > 0)
    what = "" if before["dtype"] == now["dtype"] else " → ".join(kinds)
    return Row(name, what, float(largest), relative)
