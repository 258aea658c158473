"""What happened to a run, for its page: events in words, and where its time went."""

import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.records import events, goodput
from launch.terminal.lines import duration

_MOST_ROWS = 60
# Events that are told one by one; of others their number is.
_COUNTED = {
    "skipped": "{:,} steps were skipped: not finite, or a spike",
    "again": "{:,} steps were taken again in rounds",
    "replayed": "{:,} steps were computed twice, and came out the same",
    "saved": "{:,} checkpoints were saved",
}


class Happened(NamedTuple):
    """What the page shows.

    Attributes:
        rows: time, step and words of each event that is told.
        counts: sentences about those that are counted.
        goodput: where the time went, in a sentence; "" if it is not known.
        spent: part, duration and percentage.
    """

    rows: list[tuple[str, str, str]]
    counts: list[str]
    goodput: str
    spent: list[tuple[str, str, str]]


def happened(model_dir: pathlib.Path) -> Happened:
    """Reads the event log of a run; everything is empty where there is none."""
    found, damaged = events.read(model_dir)
    number = Counter(event["event"] for event in found)
    counts = [
        words.format(number[kind]) for kind, words in _COUNTED.items() if number[kind]
    ]
    if damaged:
        counts.append(f"{damaged:,} lines of {events.EVENTS_FILE} were damaged")
    told = [event for event in found if event["event"] not in {*_COUNTED, "scored"}]
    rows = [(_time(e), _step(e), words) for e in told if (words := _words(e))]
    if len(rows) > _MOST_ROWS:
        left = len(rows) - _MOST_ROWS
        rows[1 : 1 + left] = [("", "", f"{left:,} others, in {events.EVENTS_FILE}")]
    seconds = goodput.of_events(found)
    whole = sum(seconds.values())
    spent = [
        (goodput.PARTS[part], duration(value), f"{100 * value / whole:.1f} %")
        for part, value in seconds.items()
        if value >= 0.0005 * whole > 0
    ]
    return Happened(rows, counts, goodput.words(seconds) if whole else "", spent)


def _time(event: Mapping[str, Any]) -> str:
    return str(event.get("time", "")).replace("T", " ")[:19]


def _step(event: Mapping[str, Any]) -> str:
    step = event.get("step")
    return f"{step:,}" if isinstance(step, int) else ""


def _words(event: Mapping[str, Any]) -> str:
    """An event in a few words; "" for one that says nothing new."""
    kind = event["event"]
    if kind == "start":
        return f"start {event.get('life', '?')} on {event.get('devices', '?')}"
    if kind == "resume":
        lost = event.get("lost_steps", 0)
        return f"resumed; {lost:,} steps since the checkpoint were lost" if lost else ""
    if kind == "taken":
        return f"began with parameters of {event.get('path', '?')}"
    if kind == "changes":
        return f"changed: {', '.join(map(str, _listed(event.get('knobs'))))}"
    if kind == "rollback":
        passed = event.get("passed_over_batches", 0)
        return f"went back, and passed over {passed:,} batches: {event.get('why', '')}"
    if kind in ("alarm", "cleared"):
        return f"routers: {event.get('words', '')}"
    if kind == "fault":
        return str(event.get("message", "a fault"))
    if kind == "stop":
        return f"stopped, with exit code {event.get('code', '?')}"
    return "done" if kind == "done" else events.KINDS[kind]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
