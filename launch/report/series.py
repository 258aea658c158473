"""From the records of a run to the few numbers that a figure shows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

MAX_COLUMNS = 160  # of a heat map
MAX_ROWS = 64  # of a heat map: beyond it experts share a row


def number(record: Record, name: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def finite(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the value is a finite number."""
    pairs = [(r["step"], v) for r in records if (v := number(r, name)) is not None]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def matrix(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and stacked values of a quantity with one entry per layer (and expert)."""
    found = [
        (r["step"], np.array(r[name], dtype=float)) for r in records if r.get(name)
    ]
    if found:
        shape = found[-1][1].shape  # of a run whose model was changed, the latest
        found = [pair for pair in found if pair[1].shape == shape]
        return np.array([s for s, _ in found], float), np.stack([v for _, v in found])
    return np.zeros(0), np.zeros((0, 0, 0))


def data_wait_share(record: Record) -> float | None:
    """The fraction of a step's time that was spent waiting for data."""
    wait, step = (number(record, f"perf/{n}_seconds") for n in ("data_wait", "step"))
    return None if wait is None or not step else wait / step


def binned(
    steps: np.ndarray, values: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduces a curve to at most `bins` points over equal spans of steps.

    Returns:
        Mean step, mean value, least and greatest value of each span that has any.
    """
    if len(steps) <= bins:
        return steps, values, values, values
    span = _bin_of(steps, bins)
    starts = np.flatnonzero(np.diff(span, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    mean_steps, mean_values = (
        np.add.reduceat(array, starts) / counts for array in (steps, values)
    )
    low, high = (f.reduceat(values, starts) for f in (np.minimum, np.maximum))
    return mean_steps, mean_values, low, high


def load_heat(steps: np.ndarray, load_TE: np.ndarray) -> tuple[np.ndarray, int]:
    """Load over the mean, for one layer, as rows of experts and columns of steps.

    Returns:
        heat_ET of at most MAX_ROWS x MAX_COLUMNS, and the number of experts per row.
        A span of steps without a record repeats the one before it.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        relative_TE = load_TE / load_TE.mean(axis=1, keepdims=True)
    good = np.isfinite(relative_TE).all(axis=1)
    steps, relative_TE = steps[good], relative_TE[good]
    stride = math.ceil(load_TE.shape[1] / MAX_ROWS)
    if not len(steps):
        return np.full((math.ceil(load_TE.shape[1] / stride), 1), np.nan), stride
    columns = min(len(steps), MAX_COLUMNS)
    span = _bin_of(steps, columns)
    heat_TE = np.empty((columns, load_TE.shape[1]))
    for column in range(columns):
        inside = span == column
        heat_TE[column] = (
            relative_TE[inside].mean(axis=0) if inside.any() else heat_TE[column - 1]
        )
    padding = -load_TE.shape[1] % stride
    heat_TE = np.pad(heat_TE, ((0, 0), (0, padding)), mode="edge")
    blocks = heat_TE.reshape(columns, -1, stride)
    furthest = np.abs(blocks - 1).argmax(axis=2)[..., None]
    return np.take_along_axis(blocks, furthest, axis=2)[..., 0].T, stride


def even_choice(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _bin_of(steps: np.ndarray, bins: int) -> np.ndarray:
    """The span each step falls in, of `bins` equal spans; steps are sorted."""
    reach = max(float(steps[-1] - steps[0]), 1e-9)
    return np.minimum((steps - steps[0]) / reach * bins, bins - 1).astype(int)
