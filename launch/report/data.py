"""The part of a report that is about data: what was read, and how each Task scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report.gather import Heldout, Training

Record = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # head and rows


@dataclasses.dataclass(frozen=True)
class Data:
    """What a page says of data.

    Attributes:
        tables: head and rows of each.
        retries: failed reads of the token store.
        note: what is left out.
    """

    tables: list[Table]
    retries: float
    note: str


def data(train: Training, heldout: Heldout) -> Data:
    """Returns what the records say: what was read, and how each Task scores."""
    note = ""
    if len(heldout.measured) < heldout.num_measured:
        note = (
            f"{len(heldout.measured)} of {heldout.num_measured} evaluations are shown."
        )
    found = _read(train.last), _losses(heldout.last), _metrics(heldout.measured)
    return Data([table for table in found if table], train.retries, note)


def _read(last: Record) -> Table | None:
    """How much of each Task was read by the last record."""
    rows = _by_name(last, "data/rows/")
    if not rows:
        return None
    whole = sum(rows.values()) or 1
    epochs = _by_name(last, "data/epochs/")
    return ("learnt from", "rows", "of all rows", "epochs"), [
        (task, f"{n:,.0f}", f"{100 * n / whole:.1f} %", f"{epochs.get(task, 0):,.3g}")
        for task, n in rows.items()
    ]


def _losses(final: Record) -> Table | None:
    """The last held-out loss of each Task and language, if there are several."""
    nats = _by_name(final, "loss/nats_per_token/")
    bits = _by_name(final, "loss/bits_per_byte/")
    if len(nats) < 2:
        return None
    rows = [
        (name, f"{n:.4f}", "–" if name not in bits else f"{bits[name]:.4f}")
        for name, n in nats.items()
    ]
    if not bits:
        return ("held out", "nats per token"), [row[:2] for row in rows]
    return ("held out", "nats per token", "bits per byte"), rows


def _metrics(shown: Sequence[Record]) -> Table | None:
    """The Tasks' own metrics over steps."""
    if not shown:
        return None
    names = dict.fromkeys(n for record in shown for n in _by_name(record, "metric/"))
    head = ("metric", *(f"step {record['step']:,}" for record in shown))
    return head, [
        (name, *(_short(record.get(f"metric/{name}")) for record in shown))
        for name in names
    ]


def _by_name(record: Record, prefix: str) -> dict[str, float]:
    """The numbers of a record under a prefix."""
    return {
        name.removeprefix(prefix): float(value)
        for name, value in record.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
