"""How many rows each batch has, where that grows, and so where each begins.

All are functions of the batch's number, so that whoever reads on knows them.
Standard library only.
"""

import bisect
import dataclasses
import itertools


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows of every batch of the endless sequence.

    Attributes:
        steps: (number of a batch, rows of it and of those after it), from batch 0 on
            and ascending.
    """

    steps: tuple[tuple[int, int], ...]

    @property
    def each(self) -> tuple[int, ...]:
        """All sizes there are, in their order."""
        return tuple(dict.fromkeys(rows for _, rows in self.steps))

    def of(self, index: int) -> int:
        """Returns the rows of a batch."""
        return self.steps[self._place(index)][1]

    def before(self, index: int) -> int:
        """Returns the rows of all batches before one: number of its first row."""
        place = self._place(index)
        begun = sum(
            (second - first) * rows
            for (first, rows), (second, _) in itertools.pairwise(
                self.steps[: place + 1]
            )
        )
        first, rows = self.steps[place]
        return begun + (index - first) * rows

    def batches(self, rows: int) -> int:
        """Returns the least number of batches that have so many rows together."""
        begun = 0
        for (first, size), (second, _) in itertools.pairwise(self.steps):
            if begun + (second - first) * size >= rows:
                return first - (begun - rows) // size
            begun += (second - first) * size
        first, size = self.steps[-1]
        return first - (begun - rows) // size

    def _place(self, index: int) -> int:
        return bisect.bisect_right(self.steps, index, key=lambda step: step[0]) - 1


def sizes(batch_size: int, ramp: tuple[tuple[int, int], ...] = ()) -> Sizes:
    """Returns the sizes of a ramp, or without one of batches that are all alike."""
    return Sizes(ramp or ((0, batch_size),))


def problems(batch_size: int, ramp: tuple[tuple[int, int], ...]) -> list[str]:
    """Lists what is wrong with a ramp."""
    if not ramp:
        return []
    steps, rows = [step for step, _ in ramp], [size for _, size in ramp]
    found = []
    if steps[0] != 0 or sorted(set(steps)) != steps:
        found.append(f"BATCH_RAMP = {ramp}: its steps must begin with 0, and rise")
    if rows[0] < 1 or sorted(set(rows)) != rows:
        found.append(f"BATCH_RAMP = {ramp}: its sizes must be 1 or more, and rise")
    if rows[-1] != batch_size:
        found.append(
            f"BATCH_RAMP = {ramp} ends with {rows[-1]} rows: that must be BATCH_SIZE = "
            f"{batch_size}"
        )
    return found
