"""What does not fit between a checkpoint and a run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

Row = tuple[str, str, str]  # what, as it was saved, as it is wanted


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
