"""What a page needs of the records of a run, gathered in memory that stays small."""

import collections
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.records import loads as files
from launch.records.read import Records
from launch.report.series import (
    MAX_COLUMNS,
    MAX_LAYERS,
    Trends,
    data_wait_share,
    even_choice,
    number,
)

Record = Mapping[str, Any]

DATA_WAIT_PERCENT = "data wait (%)"
RECENT = 10  # records of training that stand for the end of a run
MOST_MEASURED = 6  # evaluations by the Tasks' metrics that are shown

_CURVES = ("loss/nats_per_token", "optimizer/learning_rate", "perf/step_seconds")
_LAYERS = ("router/dropped_fraction_per_layer", "router/entropy_nats_per_layer")


class Training:
    """What is kept of the records of training, which come one by one.

    Args:
        steps: those of all records that will come.

    Attributes:
        trends: curves over steps.
        first: the first record; {} without any.
        recent: the last records.
        most_drops: fraction of choices dropped in the worst record; None without
            routers.
        greatest: largest value of what is counted up.
        retries: failed reads; each start of the run counts from 0.
        with_loads: numbers of the records that hold a whole matrix of loads.
        has_entropy: whether any router had probabilities.
    """

    def __init__(self, steps: np.ndarray) -> None:
        self.trends = Trends(steps)
        self.first: Record = {}
        self.recent: collections.deque[Record] = collections.deque(maxlen=RECENT)
        self.most_drops: float | None = None
        self.greatest: collections.Counter[str] = collections.Counter()
        self.retries = self._retries_before = 0.0
        self.with_loads: list[int] = []
        self.has_entropy = False
        self._steady, self._first_steps = Trends(steps), Trends(steps)
        self._number = 0
        self._drops = self._drops_weight = 0.0

    @property
    def last(self) -> Record:
        """The last record; {} without any."""
        return self.recent[-1] if self.recent else {}

    @property
    def pace(self) -> Trends:
        """Curves of the speed without the first step of each start.

        It would flatten the rest; where there is nothing else it is there.
        """
        steady = len(self._steady.curve("perf/step_seconds").steps)
        return self._steady if steady else self._first_steps

    @property
    def has_steady_pace(self) -> bool:
        """Whether there are steps beside the first of each start."""
        return self.pace is self._steady

    @property
    def drops(self) -> float:
        """The fraction of choices dropped in the mean over all steps."""
        return self._drops / (self._drops_weight or 1)

    def add(self, record: Record) -> None:
        """Takes the next record."""
        if record.get(files.LOAD):
            self.with_loads.append(self._number)
        record = {n: v for n, v in record.items() if n != files.LOAD}
        self.first = self.first or record
        self.recent.append(record)
        self._add_curves(record)
        self._add_pace(record)
        dropped = number(record, "router/dropped_fraction")
        if dropped is not None:
            steps = number(record, "state/steps") or 1.0
            self._drops += steps * dropped
            self._drops_weight += steps
            self.most_drops = max(dropped, self.most_drops or 0.0)
        for name in ("state/skipped_steps", "perf/steps_taken_again"):
            self.greatest[name] = max(
                self.greatest[name], int(number(record, name) or 0)
            )
        retries = number(record, "data/read_retries") or 0.0
        before = self._retries_before
        self.retries += retries - before if retries >= before else retries
        self._retries_before = retries
        self._number += 1

    def _add_curves(self, record: Record) -> None:
        step = record["step"]
        for name in _CURVES:
            if name in record:
                self.trends.add(name, step, record[name])
        # On a logarithmic scale there is no other.
        norm = number(record, "optimizer/gradient_norm")
        if norm is not None and norm > 0:
            self.trends.add("optimizer/gradient_norm", step, norm)
        for name in _LAYERS:
            if record.get(name):
                self.trends.add_layers(name, step, record[name])
        # A router without probabilities, such as "hashed", has no entropy.
        self.has_entropy |= any(record.get("router/entropy_nats_per_layer") or ())

    def _add_pace(self, record: Record) -> None:
        since_start = record.get("perf/steps_since_start", self._number + 1)
        trends = self._first_steps if since_start == 1 else self._steady
        for name in ("perf/tokens_per_second", "perf/step_seconds"):
            if name in record:
                trends.add(name, record["step"], record[name])
        share = data_wait_share(record)
        if share is not None:
            trends.add(DATA_WAIT_PERCENT, record["step"], 100 * share)


@dataclasses.dataclass(frozen=True)
class Heldout:
    """What is kept of the held-out evaluations.

    Attributes:
        trends: curves over steps.
        last: the last record; {} without any.
        measured: some of those by the Tasks' own metrics.
        num_measured: how many of these there are.
    """

    trends: Trends
    last: Record = dataclasses.field(default_factory=dict)
    measured: Sequence[Record] = ()
    num_measured: int = 0


@dataclasses.dataclass(frozen=True)
class Loads:
    """The experts' load over steps.

    Attributes:
        steps: steps of the columns, at most MAX_COLUMNS.
        load_TLE: loads of these steps in the layers that are shown.
        layers: which these are.
        mean_LE: mean over the last matrices, in all layers.
    """

    steps: np.ndarray
    load_TLE: np.ndarray
    layers: list[int]
    mean_LE: np.ndarray


@dataclasses.dataclass(frozen=True)
class Story:
    """All that a page needs of a run's records.

    Attributes:
        train: what is kept of training.
        heldout: what the held-out evaluations say.
        loads: what is kept of the experts' load; None where no matrix is there.
        notes: what could not be read, a line each.
    """

    train: Training
    heldout: Heldout
    loads: Loads | None
    notes: Sequence[str]


def gather(model_dir: str | os.PathLike[str]) -> Story:
    """Reads the records of a run, of which there may be very many."""
    records = Records(model_dir)
    train = Training(records.steps("train"))
    for record in records.each("train"):
        train.add(record)
    found, damaged = _loads(pathlib.Path(model_dir), records, train.with_loads)
    notes = [*records.notes]
    if damaged:
        notes.append(
            f"files of loads that cannot be read are left out: {len(damaged):,}, "
            f"{damaged[0]}{', ...' if damaged[1:] else ''}"
        )
    return Story(train, _heldout(records), found, notes)


def _heldout(records: Records) -> Heldout:
    trends, last, measured = Trends(records.steps("heldout")), {}, []
    for place, record in enumerate(records.each("heldout")):
        last = {name: v for name, v in record.items() if name != files.LOAD}
        name = "loss/nats_per_token"
        if name in record:
            trends.add(name, record["step"], record[name])
        if any(name.startswith("metric/") for name in record):
            measured.append(place)
    chosen = [measured[i] for i in even_choice(len(measured), MOST_MEASURED)]
    shown = list(records.some("heldout", chosen))
    return Heldout(trends, last, shown, len(measured))


def _loads(
    model_dir: pathlib.Path, records: Records, in_lines: list[int]
) -> tuple[Loads | None, list[str]]:
    """The matrices that are shown, those of older versions in lines; and damaged ones.

    Reads an even choice of them all, and those at the end.
    """
    saved = files.saved(model_dir, "train")
    sources: list[int | pathlib.Path] = [*in_lines, *(path for _, path in saved)]
    line_steps = records.steps("train")[in_lines].tolist()
    steps = [*line_steps, *(step for step, _ in saved)]
    shown = set(even_choice(len(sources), MAX_COLUMNS))
    end = range(max(0, len(sources) - RECENT), len(sources))
    wanted = sorted(shown | {*end}, reverse=True)
    damaged: list[str] = []
    kept: list[tuple[int, np.ndarray]] = []
    total_LE: Any = None
    number, layers = 0, [0]
    for place, load_LE in _read(sources, wanted, records, damaged):
        if total_LE is None:
            total_LE = np.zeros(load_LE.shape)
            layers = even_choice(load_LE.shape[0], MAX_LAYERS)
        if load_LE.shape != total_LE.shape:  # of a run whose model was changed
            continue
        if place in end:
            total_LE += load_LE
            number += 1
        if place in shown:
            kept.append((steps[place], load_LE[layers].astype(np.float32)))
    if not kept:
        return None, damaged
    kept.reverse()
    return Loads(
        np.array([step for step, _ in kept], float),
        np.stack([load_LE for _, load_LE in kept]),
        layers,
        total_LE / max(number, 1),
    ), damaged


def _read(
    sources: Sequence[int | pathlib.Path],
    wanted: Sequence[int],
    records: Records,
    damaged: list[str],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields places and matrices, the last first; notes those that are damaged."""
    for place in wanted:
        source = sources[place]
        if isinstance(source, pathlib.Path):
            load_LE = files.read(source)
        else:
            load_LE = files.matrix(next(records.some("train", [source]), {}))
        if load_LE is None:
            damaged.append(f"{source if isinstance(source, pathlib.Path) else place}")
        else:
            yield place, load_LE


def numbers(records: Iterable[Record], name: str) -> list[float]:
    """Returns the finite values of a metric."""
    values = [record.get(name) for record in records]
    return [
        float(value)
        for value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]
