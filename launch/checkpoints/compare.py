"""What does not fit between a checkpoint and a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from launch.checkpoints.places import CheckpointError
from launch.config.diff import Change, changes, values

PARTS = ("TRAINABLE", "FROZEN")  # which parameters the optimizer has a state of
Row = tuple[str, str, str]  # what, as it was saved, as it is wanted


def checked(
    path: Path,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    now: Mapping[str, Any] | None,
    *,
    partial: bool = False,
    allow_changes: bool = False,
) -> list[Change]:
    """Compares a checkpoint with a run.

    Args:
        path: the checkpoint.
        manifest: what it says about itself.
        wanted: shape and type of every array that the run asks for.
        now: the run's provenance; None compares arrays alone.
        partial: whether parameters alone are wanted.
        allow_changes: whether arrays alone are refused.
    Returns:
        What has changed, and may.
    Raises:
        CheckpointError: every difference that is refused, in a table.
    """
    of_arrays = arrays(manifest["arrays"], wanted, partial=partial)
    of_parts = [] if now is None or partial else parts(manifest, now)
    if of_parts:
        of_arrays = [row for row in of_arrays if not _is_of_parts(row)]
    of_data = [] if now is None else data(manifest, now, partial=partial)
    found = [] if now is None else changes(manifest["config"], now["config"])
    knobs = [(c.macro, c.before, c.now) for c in found if c.fixed and not partial]
    knobs += of_parts
    refused = of_arrays if allow_changes else [*of_arrays, *of_data, *knobs]
    if not refused:
        return found
    way_out = (
        "use that configuration, or another MODEL_DIR to start afresh"
        if of_arrays
        else "use that configuration, or another MODEL_DIR to start afresh; or add "
        "--allow_changes to go on with another one"
    )
    raise CheckpointError(
        f"{path} does not fit this run, in {len(refused)} "
        f"place{'s' if len(refused) > 1 else ''}:\n{table(refused)}\n"
        f"It was made with {path.parents[1] / 'config.gin'}; {way_out}"
    )


def arrays(
    saved: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    partial: bool,
) -> list[Row]:
    """Lists arrays of another type or shape, and those that only one side has.

    Args:
        saved: shape and type of each array, as a manifest has them.
        wanted: what a run asks for.
        partial: whether parameters alone are wanted.
    """
    there = {
        name: f"{array['dtype']}{array['shape']}"
        for name, array in saved.items()
        if not partial or name.startswith("params/")
    }
    asked = {name: f"{a.dtype}{list(a.shape)}" for name, a in wanted.items()}
    return [
        (name, there.get(name, "–"), asked.get(name, "–"))
        for name in {**asked, **there}
        if there.get(name) != asked.get(name)
    ]


def parts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Row]:
    """Lists patterns of what is trained that differ.

    Args:
        saved: a manifest; one from before there were patterns trained all.
        now: a run's provenance.
    """
    before, after = (
        dict.fromkeys(PARTS, ()) | values(each["config"], PARTS)
        for each in (saved, now)
    )
    return [
        (macro, repr(before[macro]), repr(after[macro]))
        for macro in PARTS
        if before[macro] != after[macro]
    ]


def _is_of_parts(row: Row) -> bool:
    """Whether an array of the optimizer is on one side alone."""
    return row[0].startswith("opt_state/") and "–" in row[1:]


def data(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, partial: bool
) -> list[Row]:
    """Lists fingerprints that differ: of the vocabulary, and of what was learnt.

    Args:
        saved: a manifest.
        now: a run's provenance.
        partial: whether the text may be another, since nothing is learnt from it.
    """
    names = ["vocabulary_fingerprint"] + ([] if partial else ["data_fingerprint"])
    return [
        (name, saved[name], now[name]) for name in names if saved[name] != now[name]
    ]


def table(rows: Sequence[Row]) -> str:
    """Lays rows out in columns."""
    width = [max(len(row[i]) for row in [*rows, ("", "saved", "")]) for i in (0, 1)]
    return "\n".join(
        f"  {name:{width[0]}}  {before:{width[1]}}  {now}"
        for name, before, now in [("", "saved", "wanted"), *rows]
    )
