"""The records of a run, one after the other, in memory that does not grow with them."""

import os
import pathlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from launch.records.lines import (
    METRICS_FILE,
    Record,
    parse,
    told_damage,
)

_MOST_KEPT = 10  # numbers of damaged lines


class Records:
    """What a run has recorded: read once to find the records, again to give them.

    Of each record some bytes are kept, where it begins. A damaged line is left out, and
    so is one that is torn at the end. Where a step was recorded twice for the same
    split, as when it was scored again, the later record stands.

    Args:
        model_dir: the run; without a file it has no records.

    Attributes:
        notes: what was left out, a line each; () where nothing was.
    """

    def __init__(self, model_dir: str | os.PathLike[str]) -> None:
        self._path = pathlib.Path(model_dir) / METRICS_FILE
        steps, splits, places = array("q"), array("q"), array("q")
        known: dict[str, int] = {}
        damaged: list[int] = []
        number = place = 0
        for count, line in enumerate(self._lines(), 1):
            record = parse(line)
            if record is None:
                number += 1
                damaged = [*damaged, count][:_MOST_KEPT]
            else:
                steps.append(record["step"])
                splits.append(known.setdefault(record["split"], len(known)))
                places.append(place)
            place += len(line)
        step, split = np.array(steps, np.int64), np.array(splits, np.int64)
        order = np.lexsort((step, split))  # stable: of equals the later comes last
        same = (np.diff(step[order]) == 0) & (np.diff(split[order]) == 0)
        stands = np.append(~same, True)[: len(order)]
        kept, void = order[stands], order[~stands]
        self._steps = step[kept]
        self._places = np.array(places, np.int64)[kept]
        self._split = {name: split[kept] == n for name, n in known.items()}
        twice = ""
        if len(void):
            stand = "record stands" if len(void) == 1 else "records stand"
            twice = (
                f"{self._path}: {len(void):,} {stand} twice, the first of step "
                f"{step[void].min():,}; the later of each counts"
            )
        notes = told_damage(self._path, damaged, number), twice
        self.notes = tuple(note for note in notes if note)

    def steps(self, split: str) -> np.ndarray:
        """Returns the steps of a split's records, rising."""
        return self._steps[self._of(split)]

    def each(self, split: str) -> Iterator[Record]:
        """Yields the records of a split, ordered by step."""
        return self.at(self._places[self._of(split)])

    def all(self) -> Iterator[Record]:
        """Yields all records ordered by step; of one step in the order of the file."""
        return self.at(self._places[np.lexsort((self._places, self._steps))])

    def some(self, split: str, numbers: Iterable[int]) -> Iterator[Record]:
        """Yields some of a split's records, by their numbers from 0."""
        return self.at(self._places[self._of(split)][list(numbers)])

    def at(self, places: np.ndarray) -> Iterator[Record]:
        """Yields the records that begin at these bytes of the file."""
        if not len(places):
            return
        with open(self._path, "rb") as file:
            for place in places.tolist():
                file.seek(place)
                record = parse(file.readline())
                if record is not None:  # else the file was changed meanwhile
                    yield record

    def _of(self, split: str) -> np.ndarray:
        return self._split.get(split, np.zeros(len(self._steps), bool))

    def _lines(self) -> Iterator[bytes]:
        if self._path.exists():
            with open(self._path, "rb") as file:
                yield from file


def read_metrics(model_dir: str | os.PathLike[str]) -> list[Record]:
    """Reads the records of a run, all at once, ordered by step.

    Returns:
        What `Records` gives, with "nan" and "inf" as numbers again; [] without a file.
    """
    return list(Records(model_dir).all())
