"""Losses that are far above what they have been: spikes."""

import dataclasses
import math
from typing import Any

_WINDOW = 100  # steps after which the running mean has forgotten all but 1 / e


@dataclasses.dataclass
class Spikes:
    """The running mean and deviation of the loss, and what lies above them.

    The limit of a step is made of the losses up to two steps before it: the one before
    is still on its way when it is launched. So a run that was stopped in between has
    the same limits as one that was not.

    Attributes:
        stddevs: deviations above the mean from which on a loss is a spike.
        count: losses that were taken in.
        mean: their running mean.
        variance: their running variance.
        newest: steps and losses that were not taken in yet.
    """

    stddevs: float
    count: int = 0
    mean: float = 0.0
    variance: float = 0.0
    newest: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def limit(self, step: int) -> float:
        """Returns the loss above which a step is a spike; infinity at the beginning."""
        ready = [loss for before, loss in self.newest if before <= step - 2]
        self.newest = [pair for pair in self.newest if pair[0] > step - 2]
        for loss in ready:
            self._take(loss)
        return self._limit()

    def add(self, step: int, loss: float) -> None:
        """Adds the loss of a step that is done."""
        if math.isfinite(loss):
            self.newest.append((step, loss))

    def kept(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        found = dataclasses.asdict(self)
        del found["stddevs"]
        return found | {"newest": [list(pair) for pair in self.newest]}

    @classmethod
    def restored(cls, stddevs: float, kept: Any) -> "Spikes":
        """Returns what goes on from `kept`; from nothing if that is None."""
        if kept is None:
            return cls(stddevs)
        newest = [(int(step), float(loss)) for step, loss in kept["newest"]]
        return cls(stddevs, kept["count"], kept["mean"], kept["variance"], newest)

    def _limit(self) -> float:
        if self.count < _WINDOW:
            return math.inf
        return self.mean + self.stddevs * math.sqrt(self.variance)

    def _take(self, loss: float) -> None:
        if loss > self._limit():
            return  # one spike makes no room for the next
        self.count += 1
        part = max(1 / self.count, 1 / _WINDOW)
        off = loss - self.mean
        self.mean += part * off
        self.variance = (1 - part) * (self.variance + part * off * off)
