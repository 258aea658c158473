"""Where the time of a run goes, and how much of it is learning: its goodput."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.terminal.lines import duration

# In the order in which they are shown.
PARTS = {
    "step": "steps that are kept",
    "lost": "steps that were taken again after a kill or a rollback",
    "data_wait": "waiting for data",
    "compile": "compiling",
    "check": "comparing with the oracles",
    "restore": "restoring a checkpoint",
    "save": "saving",
    "score": "scoring held-out text",
    "other": "everything else",
}


class Clock:
    """Adds up the seconds of one life of a run by what they were spent on.

    Time within an inner `of` counts for that alone.

    Attributes:
        steps: number of steps in the time of "step".
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._open: list[float] = []  # seconds that inner ones took, for each open one
        self.steps = 0

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Counts the time inside for a part."""
        began = time.monotonic()
        self._open.append(0.0)
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._spent[part] += seconds - self._open.pop()
            if self._open:
                self._open[-1] += seconds

    def lose(self, steps: int) -> None:
        """Counts the newest steps as lost: they will be taken again."""
        seconds = self._spent["step"] * min(steps / max(self.steps, 1), 1.0)
        self._spent["step"] -= seconds
        self._spent["lost"] += seconds
        self.steps = max(self.steps - steps, 0)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each part so far; what is left of all is "other"."""
        spent = {**self._spent}
        elapsed = time.monotonic() - self._began
        spent["other"] += max(elapsed - sum(spent.values()), 0.0)
        return {part: round(value, 3) for part, value in spent.items()}


def of_events(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up the lives of a run.

    A life that was killed is known up to its last event. The steps after its last
    checkpoint were lost: those that metrics were written of, at the pace of that life.

    Args:
        events: events of a run in their order; some have "seconds" of each part since
            their life began, and a "resume" has "lost_steps".
    Returns:
        Seconds of each part, over all lives.
    """
    lives: dict[int, dict[str, float]] = {}
    pace: dict[int, float] = {}
    total = dict.fromkeys(PARTS, 0.0)
    for event in events:
        life = event.get("life", 0)
        if isinstance(found := event.get("seconds"), dict):
            lives[life] = {part: float(found.get(part, 0.0)) for part in PARTS}
            if event.get("steps"):
                pace[life] = lives[life]["step"] / event["steps"]
        if lost := event.get("lost_steps"):
            before = max((n for n in pace if n < life), default=None)
            if before is not None:
                total["lost"] += lost * pace[before]
    for spent in lives.values():
        for part, seconds in spent.items():
            total[part] += seconds
    return total


def fraction(seconds: Mapping[str, float]) -> float:
    """Returns the part of all time in which steps were taken that are kept."""
    whole = sum(seconds.values())
    return seconds["step"] / whole if whole else 0.0


def words(seconds: Mapping[str, float]) -> str:
    """Says where the time went: "72 % of 1 min 05 s: compiling 9.1 s, saving 4.0 s"."""
    whole = sum(seconds.values())
    parts = sorted(
        (spent, part) for part, spent in seconds.items() if spent >= 0.01 * whole
    )
    shown = [
        f"{PARTS[part]} {duration(spent)}"
        for spent, part in reversed(parts)
        if part != "step"
    ]
    head = f"{100 * fraction(seconds):.0f} % of {duration(whole)}"
    return f"{head}: {', '.join(shown)}" if shown else head
