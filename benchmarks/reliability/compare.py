"""Whether a run that was disturbed ended as one that was not."""

import json
from pathlib import Path
from typing import Any

from launch.records.read import read_metrics

# How long something took is not what was learnt.
_NOT_COMPARED = ("perf/", "data/read_retries")


def differences(folder: Path, undisturbed: Path, step: int) -> list[str]:
    """Lists what tells two finished runs apart: arrays, data order, records.

    Arrays are compared by the digests that their checkpoints hold of every bit.
    """
    ours, theirs = (_manifest(each, step) for each in (folder, undisturbed))
    found = []
    for name in ("arrays", "data_index"):
        if ours[name] != theirs[name]:
            found.append(f"{name} of step {step}")
    if _records(folder) != _records(undisturbed):
        found.append("records of metrics")
    if not (folder / "report.html").is_file():
        found.append("no report")
    return found


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(path.read_text())


def _records(folder: Path) -> list[dict[str, Any]]:
    """Everything that was recorded, in its order; floats to the last bit."""
    return [
        {n: v for n, v in record.items() if not n.startswith(_NOT_COMPARED)}
        for record in read_metrics(folder)
    ]
