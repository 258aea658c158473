"""What happened to a run, one JSON line an event: `events.jsonl`.

Lines are only ever added, each by one write, so that a process that is killed leaves
all that it said. A line that power or a disk has damaged is passed over by the reader,
and counted.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"

Event = dict[str, Any]

# What each kind of event says, for the page of a run and its readers.
KINDS = {
    "start": "a life of the run begins",
    "resume": "it goes on from a checkpoint",
    "taken": "it began with parameters of another run's checkpoint",
    "changes": "knobs that are not as they were",
    "saved": "the state was copied, to be written as a checkpoint",
    "scored": "held-out text was scored",
    "skipped": "a step that was not finite, or whose loss was a spike, was left out",
    "again": "a step was taken again in rounds, which have room for all rows",
    "rollback": "the run went back to a checkpoint, and passed over data",
    "grown": "batches have another number of rows from here on",
    "alarm": "something about the routers needs a look",
    "cleared": "what needed a look is well again",
    "replayed": "a step was computed twice, and came out the same",
    "fault": "something failed",
    "stop": "this life ends before the last step",
    "done": "the last step was taken, and scored",
}


class EventLog:
    """Adds events to the log of a run, in the process that writes for all.

    Args:
        model_dir: folder of the run; None keeps nothing, as other processes do.
    """

    def __init__(self, model_dir: Path | None) -> None:
        self._file = -1
        self.life = 0
        if model_dir is None:
            return
        path = model_dir / EVENTS_FILE
        self.life = 1 + sum(e["event"] == "start" for e in read(model_dir)[0])
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # whoever wrote last was cut off

    def note(self, event: str, step: int | None = None, **facts: Any) -> None:
        """Adds an event; it is with the system when this returns.

        Args:
            event: kind, one of `KINDS`.
            step: step at which it happened; None if it is of none.
            facts: what else there is to say of it; JSON.
        """
        assert event in KINDS, event
        if self._file < 0:
            return
        line = {"event": event, "life": self.life}
        line |= {} if step is None else {"step": step}
        line |= {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        text = json.dumps(_plain(line), ensure_ascii=True, allow_nan=False)
        os.write(self._file, f"{text}\n".encode())

    def close(self) -> None:
        """Puts all on disk."""
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1


def read(model_dir: Path) -> tuple[list[Event], int]:
    """Returns the events of a run in their order, and how many lines were no events."""
    found: list[Event] = []
    damaged = 0
    for line in _lines(model_dir / EVENTS_FILE):
        try:
            event = json.loads(line)
        except ValueError:
            damaged += 1
            continue
        if isinstance(event, dict) and event.get("event") in KINDS:
            found.append(event)
        else:
            damaged += 1
    return found, damaged


def _lines(path: Path) -> Iterator[bytes]:
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line in file if line.strip())


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: their names stand for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
