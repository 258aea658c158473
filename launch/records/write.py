"""Metrics on disk: one JSON line per record, and the same numbers for TensorBoard.

`metrics.jsonl` is the record of a run: reports and tests read it. TensorBoard's event
files are a view of it, one run per split so that curves overlay. How many tokens each
expert took is a matrix too large for a line: the line has a summary, and now and then a
file has all of it (`loads.py`).
"""

import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from launch.records import loads
from launch.records.lines import KEYS, METRICS_FILE, encode, plain, truncate

TENSORBOARD_DIR = "tensorboard"

_FLUSH_SECONDS = 10.0

Record = Mapping[str, Any]


class MetricWriter:
    """Appends records of metrics to the files of a run.

    A record is flat: `{"step": 10, "split": "train", "loss/nats_per_token": 2.3, ...}`
    with numbers or lists of them (per sparse layer) as values; arrays are taken too.
    "router/load" alone may be a matrix. Use it as a context manager.

    Args:
        model_dir: the run; created when missing.
        resume_step: the step the run starts from, 0 for the beginning. Records of a
            later step, left by an earlier life of the run that got further than its
            last checkpoint, are removed. None keeps them all.
        load_period_steps: steps between whole matrices of a split; 0 keeps none.
        derive: what is known of a record beside what it says; added to those of
            training.

    Attributes:
        before_flush: called first by `flush`, by whom holds something back.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        load_period_steps: int = 1,
        derive: Callable[[Record], Record] = lambda record: {},
    ) -> None:
        self._dir = pathlib.Path(model_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._load_period = load_period_steps
        self._derive = derive
        self.before_flush: Callable[[], None] = lambda: None
        self._open(resume_step)

    def _open(self, resume_step: int | None) -> None:
        """Opens the files, without what is void."""
        self._purge_step = None if resume_step is None else resume_step + 1
        path = self._dir / METRICS_FILE
        _warn(truncate(path, resume_step))
        if resume_step is not None:
            loads.truncate(self._dir, resume_step)
        self._load_steps: dict[str, int] = {}  # the last that is kept, by split
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events: dict[str, EventsWriter | None] = {}
        self._flushed = time.monotonic()
        if self._purge_step is not None:
            # Each split of an earlier life must learn that its later steps are void.
            for split in self._earlier_splits():
                self._split_events(split)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Record) -> None:
        """Appends one record, visible to readers when this returns.

        Raises:
            ValueError: the record has no step or no split.
        """
        values = {name: v for name, v in record.items() if name != loads.LOAD}
        load = record.get(loads.LOAD)
        matrix = None if load is None else np.asarray(load, np.float64)
        if matrix is not None:
            values |= loads.summary(matrix)
        if record.get("split") == "train":
            values |= self._derive(values)
        values = {name: plain(value) for name, value in values.items()}
        line = encode(values)
        if matrix is not None and self._load_is_due(values["split"], values["step"]):
            loads.save(self._dir, values["split"], values["step"], matrix)
            self._load_steps[values["split"]] = values["step"]
        self._file.write(line + "\n")
        self._file.flush()
        self._write_event(values)

    def rewind(self, step: int) -> None:
        """Removes the records of later steps: the run has gone back to this one."""
        self.close()
        self._open(step)

    def flush(self) -> None:
        """Puts everything written on disk: call it before a checkpoint commits."""
        self.before_flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flush_events()

    def close(self) -> None:
        """Flushes and closes; a second call does nothing."""
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        for events in self._events.values():
            if events is not None:
                events.close()

    def _load_is_due(self, split: str, step: int) -> bool:
        """Whether a multiple of the period was reached since the last matrix."""
        if not self._load_period:
            return False
        if split not in self._load_steps:
            known = loads.saved(self._dir, split)
            if not known:
                return True
            self._load_steps[split] = known[-1][0]
        period = self._load_period
        return step // period > self._load_steps[split] // period

    def _write_event(self, record: Record) -> None:
        events = self._split_events(record["split"])
        if events is None:
            return
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for name, value in record.items()
            if name not in KEYS
            for tag, value in _series(name, value)
        ]
        events.write_event(
            Event(
                wall_time=time.time(),
                step=record["step"],
                summary=Summary(value=values),
            )
        )
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush_events()

    def _flush_events(self) -> None:
        for events in self._events.values():
            if events is not None:
                events.flush()
        self._flushed = time.monotonic()

    def _earlier_splits(self) -> list[str]:
        """The splits that an earlier life showed; says what else lies among them."""
        board = self._dir / TENSORBOARD_DIR
        found = sorted(board.iterdir()) if board.is_dir() else []
        splits = [p.name for p in found if p.is_dir() and any(p.glob("events*"))]
        foreign = [path.name for path in found if path.name not in splits]
        if foreign:
            _warn(f"{board} holds what is not of this run: {', '.join(foreign)}")
        return splits

    def _split_events(self, split: str) -> EventsWriter | None:
        """The event file of a split, opened when first asked for; None without one."""
        if split not in self._events:
            self._events[split] = self._open_events(split)
        return self._events[split]

    def _open_events(self, split: str) -> EventsWriter | None:
        folder = self._dir / TENSORBOARD_DIR / split
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a foreign file has its name
            _warn(f"TensorBoard gets nothing of the split {split!r}: {error}")
            return None
        # Lives that start in the same second must not share a file name.
        suffix = f".{len(list(folder.iterdir())):03d}"
        events = EventsWriter(str(folder / "events"), suffix)
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.write_event(
                Event(wall_time=time.time(), step=self._purge_step, session_log=start)
            )
        return events


class NoMetrics:
    """Stands for a `MetricWriter` where another process writes."""

    def __init__(self) -> None:
        self.before_flush: Callable[[], None] = lambda: None

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, record: Record) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Lets go what is held back, as where it is written."""
        self.before_flush()

    def rewind(self, step: int) -> None:
        """Lets go what is held back, and has nothing to remove."""
        self.before_flush()


def _warn(what: str) -> None:
    """Says what was found wrong with files, if anything was."""
    if what:
        print(f"warning: {what}", file=sys.stderr, flush=True)


def _series(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The scalars that TensorBoard plots for one entry of a record."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, list):
        for layer, item in enumerate(value):
            if isinstance(item, int | float):
                yield f"{name}/layer_{layer:02d}", float(item)
