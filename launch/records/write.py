"""Metrics on disk: one JSON line per record, and the same numbers for TensorBoard.

`metrics.jsonl` is the record of a run: reports and tests read it. TensorBoard's event
files are a view of it, one run per split so that curves overlay.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from launch.errors import UserError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

_KEYS = ("step", "split")
_NON_FINITE = ("nan", "inf", "-inf")
_MAX_SERIES = 1024  # per record and matrix; TensorBoard is unusable far beyond it
_FLUSH_SECONDS = 10.0


class MetricsError(UserError, ValueError):
    """The records of a run cannot be read."""


class MetricWriter:
    """Appends records of metrics to the files of a run.

    A record is flat: `{"step": 10, "split": "train", "loss/nats_per_token": 2.3, ...}`
    with numbers, lists of them (per sparse layer) or lists of lists (per layer and
    expert) as values; arrays are taken too. Use it as a context manager.

    Args:
        model_dir: the run; created when missing.
        resume_step: the step the run starts from, 0 for the beginning. Records of a
            later step, left by an earlier life of the run that got further than its
            last checkpoint, are removed. None keeps them all.
    """

    def __init__(
        self, model_dir: str | os.PathLike[str], *, resume_step: int | None = None
    ) -> None:
        self._dir = pathlib.Path(model_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._purge_step = None if resume_step is None else resume_step + 1
        path = self._dir / METRICS_FILE
        _truncate(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events: dict[str, EventsWriter] = {}
        self._flushed = time.monotonic()
        board = self._dir / TENSORBOARD_DIR
        if self._purge_step is not None and board.is_dir():
            # Each split of an earlier life must learn that its later steps are void.
            for split in sorted(entry.name for entry in board.iterdir()):
                self._split_events(split)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record, visible to readers when this returns.

        Raises:
            ValueError: the record has no step or no split.
        """
        missing = [key for key in _KEYS if key not in record]
        if missing:
            raise ValueError(f"a record of metrics needs {missing}; it has {[*record]}")
        plain = {name: _plain(value) for name, value in record.items()}
        line = json.dumps(_encode(plain), allow_nan=False, separators=(", ", ": "))
        self._file.write(line + "\n")
        self._file.flush()
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for name, value in plain.items()
            if name not in _KEYS
            for tag, value in _series(name, value)
        ]
        event = Event(
            wall_time=time.time(), step=plain["step"], summary=Summary(value=values)
        )
        self._split_events(plain["split"]).write_event(event)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush_events()

    def rewind(self, step: int) -> None:
        """Removes the records of later steps: the run has gone back to this one."""
        self.close()
        self._events.clear()
        self.__init__(self._dir, resume_step=step)  # type: ignore[misc]

    def flush(self) -> None:
        """Puts everything written on disk: call it before a checkpoint commits."""
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
            events.close()

    def _flush_events(self) -> None:
        for events in self._events.values():
            events.flush()
        self._flushed = time.monotonic()

    def _split_events(self, split: str) -> EventsWriter:
        """The event file of a split, opened when first asked for."""
        if split not in self._events:
            folder = self._dir / TENSORBOARD_DIR / split
            folder.mkdir(parents=True, exist_ok=True)
            # Lives that start in the same second must not share a file name.
            suffix = f".{len(list(folder.iterdir())):03d}"
            events = EventsWriter(str(folder / "events"), suffix)
            if self._purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                events.write_event(
                    Event(
                        wall_time=time.time(), step=self._purge_step, session_log=start
                    )
                )
            self._events[split] = events
        return self._events[split]


class NoMetrics:
    """Stands for a `MetricWriter` where another process writes."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Has nothing to flush."""

    def rewind(self, step: int) -> None:
        """Has nothing to remove."""


def read_metrics(model_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a run, ordered by step.

    A line torn by a kill is left out. Where a step was recorded twice for the same
    split, as when it was scored again, the later record stands.

    Returns:
        The records, with "nan" and "inf" as numbers again; [] without a file.

    Raises:
        MetricsError: a line other than the last is not a record.
    """
    path = pathlib.Path(model_dir) / METRICS_FILE
    if not path.exists():
        return []
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for record in _records(path.read_bytes(), path):
        key = (record["step"], record["split"])
        records.pop(key, None)
        records[key] = {
            name: value if name in _KEYS else _decode(value)
            for name, value in record.items()
        }
    return sorted(records.values(), key=lambda record: record["step"])


def _truncate(path: pathlib.Path, step: int | None) -> None:
    """Atomically rewrites a file without later records and without a torn line."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [
        json.dumps(record, separators=(", ", ": "))
        for record in _records(before, path)
        if step is None or record["step"] <= step
    ]
    after = "".join(line + "\n" for line in kept).encode()
    if after == before:
        return
    draft = path.with_suffix(".tmp")
    with open(draft, "wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _records(content: bytes, path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of a file as written; a last line that is torn is left out."""
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not _is_record(record):
                raise ValueError("it is not a record with a step and a split")
        # Also what the decoders of JSON and UTF-8 raise, the last where it is deep.
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise MetricsError(
                f"{path.name}, line {number}: {error}: take that line out"
            ) from error
        yield record


def _is_record(found: Any) -> bool:
    """Whether it has a step, a split, and of other things no more than matrices."""
    if not isinstance(found, dict) or not found.keys() >= set(_KEYS):
        return False
    rows = [item for item in found.values() if isinstance(item, list)]
    cells = [item for row in rows for item in row if isinstance(item, list)]
    return (
        type(found["step"]) is int
        and isinstance(found["split"], str)
        and not any(isinstance(item, list | dict) for cell in cells for item in cell)
    )


def _plain(value: Any) -> Any:
    """Numbers and lists of Python instead of arrays and their scalars."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return np.asarray(value).tolist()


def _encode(value: Any) -> Any:
    """The same value with non-finite numbers as words: JSON has none."""
    if isinstance(value, dict):
        return {name: _encode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(value: Any) -> Any:
    """Undoes `_encode`."""
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return float(value) if value in _NON_FINITE else value


def _series(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The scalars that TensorBoard plots for one entry of a record."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, list) and value and isinstance(value[0], list):
        # Of layers with fewer experts, the loads of those that they have not.
        value = [[item for item in row if not math.isnan(item)] for row in value]
        wide = sum(map(len, value)) > _MAX_SERIES
        for layer, row in enumerate(value):
            if wide and row:
                yield f"{name}/layer_{layer:02d}/most", max(row)
                yield f"{name}/layer_{layer:02d}/least", min(row)
            elif not wide:
                for expert, item in enumerate(row):
                    yield f"{name}/layer_{layer:02d}/expert_{expert:02d}", item
    elif isinstance(value, list):
        for layer, item in enumerate(value):
            yield f"{name}/layer_{layer:02d}", item
