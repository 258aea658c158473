"""Lines of metrics.jsonl: a record each, whatever a kill or a hand did to the file."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

METRICS_FILE = "metrics.jsonl"
KEYS = ("step", "split")

Record = dict[str, Any]

_NON_FINITE = ("nan", "inf", "-inf")
_BLOCK_BYTES = 1 << 16
_MOST_NAMED = 5  # lines that a message names one by one


def encode(record: Mapping[str, Any]) -> str:
    """Returns the line of a record; non-finite numbers become words, JSON has none.

    Raises:
        ValueError: it has no step or no split.
    """
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"a record of metrics needs {missing}; it has {[*record]}")
    return json.dumps(_worded(dict(record)), allow_nan=False)


def parse(line: bytes) -> Record | None:
    """Returns the record of a line, or None where the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # what the decoders of JSON and UTF-8 raise
        return None
    if not isinstance(record, dict) or not isinstance(record.get("split"), str):
        return None
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 2**63:
        return None
    return {
        name: value if name in KEYS else _numbered(value)
        for name, value in record.items()
    }


def backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yields the lines of a file from its end, each with the place where it begins."""
    begin, held, block = file.seek(0, os.SEEK_END), b"", _BLOCK_BYTES
    while begin or held:
        cut = held.rfind(b"\n", 0, max(len(held) - 1, 0))
        if cut < 0 and begin:
            more = min(block, begin)
            begin = file.seek(begin - more)
            held, block = file.read(more) + held, 2 * block
            continue
        yield begin + cut + 1, held[cut + 1 :]
        held, block = held[: cut + 1], _BLOCK_BYTES


def truncate(path: pathlib.Path, step: int | None) -> str:
    """Cuts off records of later steps, and a damaged end; reads no more than these.

    Args:
        path: a file of records whose steps only grow; it may be missing.
        step: the last that stays; None keeps them all.
    Returns:
        What was damaged, in words; "" where nothing was.
    """
    if not path.exists():
        return ""
    damaged = 0
    with open(path, "r+b") as file:
        size = end = file.seek(0, os.SEEK_END)
        last = b"\n"
        for start, line in backwards(file):
            record = parse(line)
            if record is not None and (step is None or record["step"] <= step):
                last = line
                break
            damaged += record is None
            end = start
        if end < size:
            file.truncate(end)
        if not last.endswith(b"\n"):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())
    if not damaged:
        return ""
    return (
        f"{path}: {_lines(damaged)} at the end could not be read and "
        f"{_were(damaged)} cut off"
    )


def newest(model_dir: str | os.PathLike[str], split: str, step: int) -> Record | None:
    """Finds the record of a step, from the end of the file; None where there is none.

    It reads back to the first record of an earlier step, and no further.
    """
    path = pathlib.Path(model_dir) / METRICS_FILE
    if not path.exists():
        return None
    with open(path, "rb") as file:
        for _, line in backwards(file):
            record = parse(line)
            if record is None:
                continue
            if record["step"] < step:
                return None
            if (record["step"], record["split"]) == (step, split):
                return record
    return None


def last_step(model_dir: str | os.PathLike[str]) -> int | None:
    """Returns the step of the last record, read from the end; None without any."""
    path = pathlib.Path(model_dir) / METRICS_FILE
    if path.exists():
        with open(path, "rb") as file:
            for _, line in backwards(file):
                if (record := parse(line)) is not None:
                    return record["step"]
    return None


def told_damage(path: pathlib.Path, damaged: list[int], number: int) -> str:
    """Says which lines of a file are damaged; "" for none.

    Args:
        path: the file.
        damaged: numbers of lines, from 1; maybe only the first of them.
        number: how many there are in all.
    """
    if not number:
        return ""
    named = ", ".join(f"{line:,}" for line in damaged[:_MOST_NAMED])
    more = ", ..." if number > _MOST_NAMED else ""
    return (
        f"{path}: {_lines(number)} cannot be read and {_were(number)} left out: line "
        f"{named}{more}"
    )


def plain(value: Any) -> Any:
    """Returns numbers and lists of Python instead of arrays and their scalars."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return np.asarray(value).tolist()


def _lines(number: int) -> str:
    return f"{number:,} line" if number == 1 else f"{number:,} lines"


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _worded(value: Any) -> Any:
    """The same value with non-finite numbers as words."""
    if isinstance(value, dict):
        return {name: _worded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_worded(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbered(value: Any) -> Any:
    """Undoes `_worded`."""
    if isinstance(value, list):
        return [_numbered(item) for item in value]
    return float(value) if value in _NON_FINITE else value
