"""What checkpoints there are and what they say about themselves, as text."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.checkpoints.places import MANIFEST, DamagedError, read_manifest
from launch.checkpoints.retention import losses_of
from launch.checkpoints.there import There
from launch.records.read import read_metrics


def of_run(model_dir: str | os.PathLike[str]) -> list[str]:
    """Lists the checkpoints of a run: step, size, time, loss, code.

    Args:
        model_dir: the run.
    """
    there = There(model_dir)
    losses = losses_of(read_metrics(model_dir))
    rows = [("step", "bytes", "saved at", "held-out loss", "code", "")]
    for step in there.steps:
        size, loss = "–", f"{losses[step]:.4f}" if step in losses else "–"
        try:
            with there.held(step, MANIFEST) as (path, num_bytes):
                size = f"{num_bytes:,}"
                manifest = read_manifest(path)
        except DamagedError as damage:
            rows.append((f"{step:,}", size, "–", loss, "–", f"damaged: {damage.what}"))
            continue
        skipped = manifest.get("skipped_in_a_row", 0)
        note = f"after {skipped:,} skipped steps" if skipped else ""
        when = manifest.get("saved_at", "–")
        rows.append((f"{step:,}", size, when, loss, code_of(manifest), note))
    others = sorted(
        entry.name
        for entry in (os.scandir(there.folder) if there.folder.is_dir() else ())
        if not entry.name.isdecimal()
    )
    also = [f"not counted: {', '.join(others)}"] if others else []
    return [*columns(rows, right=(0, 1)), *also]


def of_step(there: There, step: int) -> list[str]:
    """Lists where a checkpoint comes from, and its arrays.

    Args:
        there: the checkpoints of a run.
        step: which one.
    """
    with there.held(step, MANIFEST) as (path, num_bytes):
        manifest = read_manifest(path)
    arrays = manifest["arrays"]
    facts = [
        ("checkpoint", there.name(step)),
        ("step", f"{manifest['step']:,}"),
        ("next batch", f"{manifest.get('data_index', 0):,}"),
        ("saved at", manifest.get("saved_at", "–")),
        ("code", code_of(manifest)),
        ("libraries", _pairs(manifest.get("versions", {}))),
        ("command", " ".join(manifest.get("command", [])) or "–"),
        ("machines", _machines(manifest)),
        ("mesh", _pairs({a: n for a, n in manifest["mesh"].items() if n > 1}) or "1"),
        ("task", manifest.get("task", "–")),
        ("data", manifest["data_fingerprint"]),
        ("vocabulary", manifest["vocabulary_fingerprint"]),
        *(
            ("parent", f"{parent['path']} (step {parent['step']:,})")
            for parent in manifest.get("parents", [])
        ),
        *(
            ("began with", f"{begun['path']}, {', '.join(begun['patterns'])}")
            for begun in [manifest.get("start_from")]
            if begun
        ),
        ("arrays", f"{len(arrays):,}, {_count(arrays):,} bytes uncompressed"),
        ("files", f"{num_bytes:,} bytes"),
    ]
    rows = [("array", "type", "shape", "bytes", "digest")]
    for name, array in arrays.items():
        shape = " × ".join(map(str, array["shape"])) or "scalar"
        size = f"{bytes_of(array):,}"
        rows.append((name, array["dtype"], shape, size, array["digest"]))
    return [*columns(facts), "", *columns(rows, right=(3,))]


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lays rows out in columns.

    Args:
        rows: cells, as many in each row.
        right: numbers of the columns that end alike.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def code_of(manifest: Mapping[str, Any]) -> str:
    """Returns words such as "0.4.0 at 1a2b3c4d, changed since"."""
    git = manifest.get("git")
    version = manifest.get("code_version", "–")
    if not git:
        return version
    return f"{version} at {git['commit'][:8]}{', changed since' * git['dirty']}"


def bytes_of(array: Mapping[str, Any]) -> int:
    """Returns the size of an array, from its manifest's entry."""
    sizes = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
    name = array["dtype"]
    size = sizes[name] if name in sizes else np.dtype(name).itemsize
    return size * int(np.prod(array["shape"], dtype=np.int64))


def _count(arrays: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(map(bytes_of, arrays.values()))


def _machines(manifest: Mapping[str, Any]) -> str:
    if "hosts" not in manifest:
        return "–"
    return (
        f"{manifest['hosts']:,} processes, {manifest['devices']:,} devices: "
        f"{manifest['device_kind']}"
    )


def _pairs(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())
