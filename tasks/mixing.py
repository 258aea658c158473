"""Which Task each row comes from, by a closed-form quota.

Time is counted in rows. Task t has a share of them that may change with time, and its
quota Q_t is the integral of that share; the shares add up to 1, and so the quotas to
the time. Row k of task t is due when its quota reaches k + 1/2, and rows come in the
order in which they are due, ties in the order of the tasks. With constant shares that
is the rounding of Webster and Sainte-Laguë, which never takes a row back
(Balinski and Young, "Fair Representation", 1982): at any time each task has had its
quota to within half a row for each task of the mixture.

When a row is due is one floating-point number, a function of task and k alone, so the
order is the same whichever part of it is asked for. Its rounding only decides which of
rows that are due within 10^-15 of the time is first.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """The endless sequence of rows of several tasks.

    Attributes:
        knots: rows at which the shares are given, rising from 0; the last ones hold
            for ever.
        shares: float64[knots, tasks]; those of a knot add up to 1. In between they
            are linear.
    """

    knots: tuple[int, ...]
    shares: np.ndarray = dataclasses.field(repr=False)

    def assign(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the task and k of each of rows [start, stop), both int64.

        k counts the rows of the task from 0. The cost does not depend on `start`.
        """
        begun, task, k = self._around(start, stop)
        first = start - int(begun.sum())
        wanted = slice(first, first + stop - start)
        return task[wanted], k[wanted]

    def counts(self, num_rows: int) -> np.ndarray:
        """Returns int64[tasks]: how many of the first rows are of each task."""
        begun, task, _ = self._around(num_rows, num_rows)
        rest = task[: num_rows - int(begun.sum())]
        return begun + np.bincount(rest, minlength=len(begun))

    def quotas(self, rows: float) -> np.ndarray:
        """Returns float64[tasks]: the integral of each share over the first rows."""
        knots, totals = self._knots, self._totals
        segment = int(np.searchsorted(knots, rows, side="right")) - 1
        elapsed = rows - knots[segment]
        begin, slope = self.shares[segment], self._slopes[segment]
        return totals[segment] + elapsed * (begin + slope * elapsed / 2)

    def due(self, task: np.ndarray, k: np.ndarray) -> np.ndarray:
        """Returns when rows k of tasks are due; infinity if never.

        Solves Q = begin·u + slope·u²/2 for u in the segment where Q is reached, in
        the form that does not cancel.
        """
        wanted = k + 0.5
        totals = self._totals[:, task]
        # The last knot before which the quota is not reached; flat ones are skipped.
        segment = np.maximum((totals < wanted).sum(axis=0) - 1, 0)
        missing = wanted - totals[segment, np.arange(len(task))]
        begin, slope = self.shares[segment, task], self._slopes[segment, task]
        root = np.sqrt(np.maximum(begin * begin + 2 * slope * missing, 0.0))
        with np.errstate(divide="ignore", over="ignore"):
            elapsed = 2 * missing / (begin + root)
        return self._knots[segment] + np.minimum(elapsed, self._durations[segment])

    def _around(
        self, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some rows that hold [start, stop), and how many of each task are before.

        At time x the rows that are due number x, to within half a row for each task.
        """
        slack = self.shares.shape[1] / 2 + 2
        begun, ended = self._due_before(start - slack), self._due_before(stop + slack)
        while begun.sum() > start or ended.sum() < stop:  # beyond 2^52 rows
            slack *= 2
            begun = self._due_before(start - slack)
            ended = self._due_before(stop + slack)
        num = ended - begun
        task = np.repeat(np.arange(len(num)), num)
        place = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        k = begun[task] + place
        order = np.lexsort((k, task, self.due(task, k)))
        return begun, task[order], k[order]

    def _due_before(self, rows: float) -> np.ndarray:
        """int64[tasks], how many rows of each task are due before a time, exactly."""
        task = np.arange(self.shares.shape[1])
        if rows <= 0:
            return np.zeros_like(task)
        k = np.floor(self.quotas(rows) + 0.5).astype(np.int64)
        while (late := (k > 0) & (self.due(task, np.maximum(k - 1, 0)) >= rows)).any():
            k = k - late
        while (early := self.due(task, k) < rows).any():
            k = k + early
        return k

    @functools.cached_property
    def _knots(self) -> np.ndarray:
        return np.asarray(self.knots, np.float64)

    @functools.cached_property
    def _durations(self) -> np.ndarray:
        """float64[knots], how long until the next."""
        return np.append(np.diff(self._knots), np.inf)

    @functools.cached_property
    def _slopes(self) -> np.ndarray:
        """float64[knots, tasks], how fast shares change after each knot."""
        rises = np.diff(self.shares, axis=0) / self._durations[:-1, None]
        return np.append(rises, np.zeros_like(self.shares[:1]), axis=0)

    @functools.cached_property
    def _totals(self) -> np.ndarray:
        """float64[knots, tasks], the quotas at each knot."""
        means = (self.shares[:-1] + self.shares[1:]) / 2
        steps = np.cumsum(means * self._durations[:-1, None], axis=0)
        return np.append(np.zeros_like(self.shares[:1]), steps, axis=0)


def constant(rates: Sequence[float] | np.ndarray) -> Mixture:
    """Returns the mixture of tasks at rates, which need not add up to 1."""
    return scheduled({0: rates})


def scheduled(rates: Mapping[int, Sequence[float] | np.ndarray]) -> Mixture:
    """Returns a mixture that changes.

    Args:
        rates: weights of the tasks, by the row from which they hold. They are made to
            add up to 1 there; the shares in between are linear, those before the first
            are its own.
    """
    knots = sorted(rates)
    shares = [np.asarray(rates[knot], np.float64) for knot in knots]
    shares = [rate / rate.sum() for rate in shares]
    if knots[0] > 0:
        knots, shares = [0, *knots], [shares[0], *shares]
    return Mixture(tuple(knots), np.stack(shares))


def proportional(
    sizes: Sequence[int], *, temperature: float = 1.0, cap: int = 0
) -> np.ndarray:
    """Returns rates that follow how large tasks are.

    T5's temperature-scaled mixing (arXiv:1910.10683, section 3.5.2).

    Args:
        sizes: amount of data in each task, in any unit.
        temperature: rates are raised to 1 / temperature; 1 is proportional.
        cap: no task counts as larger; 0: no cap.
    """
    counted = np.minimum(sizes, cap) if cap else np.asarray(sizes)
    # Powers differ in the last digit between processors; hosts must agree.
    return np.round((counted / counted.max()) ** (1 / temperature), 12)
