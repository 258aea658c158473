"""From the records of a run to the few numbers that a figure shows."""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Record = Mapping[str, Any]

MAX_POINTS = 300  # of a curve
MAX_COLUMNS = 160  # of a heat map
MAX_LAYERS = 8  # drawn one by one
MAX_ROWS = 64  # of a heat map: beyond it experts share a row


def number(record: Record, name: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity over steps, in points that may each stand for a span of steps.

    Attributes:
        steps: mean step of each point.
        mean: mean value.
        low: least value.
        high: greatest value.
        lost: steps where the value was not finite, at most one of each span.
        merged: whether any point stands for several records.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lost: list[int]
    merged: bool


@dataclasses.dataclass(frozen=True)
class LayerCurves:
    """A quantity of every layer over steps.

    Attributes:
        steps: mean step of each point.
        mean_TL: mean value of each point and layer.
        low: least value of any layer.
        high: greatest value of any layer.
    """

    steps: np.ndarray
    mean_TL: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Trends:
    """Quantities over steps, as at most so many equal spans of steps as have points.

    Records come one by one and are not kept: memory does not grow with their number.

    Args:
        steps: those of all records that will come, rising.
        bins: spans at most; fewer records have a point each.
    """

    def __init__(self, steps: np.ndarray, bins: int = MAX_POINTS) -> None:
        self.reach = (int(steps[0]), int(steps[-1])) if len(steps) else None
        self._bins = bins
        self._each = steps.tolist() if len(steps) <= bins else None
        self._points: dict[str, dict[int, list[float]]] = {}
        self._lost: dict[str, dict[int, int]] = {}
        self._layers: dict[str, dict[int, list[Any]]] = {}

    def add(self, name: str, step: int, value: Any) -> None:
        """Adds a value of a quantity; one that is no finite number is lost."""
        at = self._bin_of(step)
        if not isinstance(value, int | float) or not math.isfinite(value):
            self._lost.setdefault(name, {}).setdefault(at, step)
            return
        points = self._points.setdefault(name, {})
        if (point := points.get(at)) is None:
            points[at] = [1, step, value, value, value]
            return
        point[0] += 1
        point[1] += step
        point[2] += value
        point[3] = min(point[3], value)
        point[4] = max(point[4], value)

    def add_layers(self, name: str, step: int, values: Sequence[float]) -> None:
        """Adds a value for each layer, if all are finite.

        Of a run whose model was changed, the latest number of layers stands.
        """
        value_L = np.array(values, float)
        if value_L.ndim != 1 or not value_L.size or not np.isfinite(value_L).all():
            return
        points = self._layers.setdefault(name, {})
        if points and len(next(iter(points.values()))[2]) != len(value_L):
            points.clear()
        at, low, high = self._bin_of(step), value_L.min(), value_L.max()
        if (point := points.get(at)) is None:
            points[at] = [1, step, value_L, low, high]
            return
        point[0] += 1
        point[1] += step
        point[2] += value_L
        point[3] = min(point[3], low)
        point[4] = max(point[4], high)

    def curve(self, name: str) -> Curve:
        """Returns a quantity over steps; without points where it was never finite."""
        points = self._points.get(name, {})
        table = np.array([points[at] for at in sorted(points)], float).reshape(-1, 5)
        number, steps, values, low, high = table.T
        lost = self._lost.get(name, {})
        return Curve(
            steps / number,
            values / number,
            low,
            high,
            [lost[at] for at in sorted(lost)],
            merged=bool((number > 1).any()),
        )

    def layer_curves(self, name: str) -> LayerCurves | None:
        """Returns a quantity of each layer over steps; None without any."""
        points = self._layers.get(name, {})
        if not points:
            return None
        number, steps, values, low, high = (
            np.array(column, float)
            for column in zip(*[points[at] for at in sorted(points)], strict=True)
        )
        return LayerCurves(steps / number, values / number[:, None], low, high)

    def _bin_of(self, step: int) -> int:
        if self._each is not None:
            return bisect.bisect_left(self._each, step)
        first, last = self.reach or (0, 1)
        return min(
            int((step - first) / max(last - first, 1) * self._bins), self._bins - 1
        )


def data_wait_share(record: Record) -> float | None:
    """The fraction of a step's time that was spent waiting for data."""
    wait, step = (number(record, f"perf/{n}_seconds") for n in ("data_wait", "step"))
    return None if wait is None or not step else wait / step


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
