"""The part of a report that is about data: what was read, and how each Task scores."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report import page_parts
from launch.report.series import even_choice, number

Record = Mapping[str, Any]
_MOST_COLUMNS = 6  # evaluations whose metrics are shown


def data(train: Sequence[Record], heldout: Sequence[Record]) -> str:
    """Returns the section on data; nothing if the records say nothing of them."""
    parts = [
        _read(train[-1] if train else {}),
        _retries(train),
        _losses(heldout[-1] if heldout else {}),
        _metrics(heldout),
    ]
    body = "".join(parts)
    return page_parts.section("Data", body) if body else ""


def _read(last: Record) -> str:
    """How much of each Task was read by the last record."""
    rows = _by_name(last, "data/rows/")
    if not rows:
        return ""
    whole = sum(rows.values()) or 1
    epochs = _by_name(last, "data/epochs/")
    table = [
        (task, f"{n:,.0f}", f"{100 * n / whole:.1f} %", f"{epochs.get(task, 0):,.3g}")
        for task, n in rows.items()
    ]
    return page_parts.table(("learnt from", "rows", "of all rows", "epochs"), table)


def _retries(train: Sequence[Record]) -> str:
    """Failed reads; each start of the run counts from 0."""
    total = before = 0.0
    for record in train:
        now = number(record, "data/read_retries") or 0.0
        total += now - before if now >= before else now
        before = now
    if not total:
        return ""
    return f"<p>{total:,.0f} reads of the token store failed and were tried again.</p>"


def _losses(final: Record) -> str:
    """The last held-out loss of each Task and language, if there are several."""
    nats = _by_name(final, "loss/nats_per_token/")
    bits = _by_name(final, "loss/bits_per_byte/")
    if len(nats) < 2:
        return ""
    table = [
        (name, f"{n:.4f}", "–" if name not in bits else f"{bits[name]:.4f}")
        for name, n in nats.items()
    ]
    if not bits:
        return page_parts.table(("held out", "nats per token"), [t[:2] for t in table])
    return page_parts.table(("held out", "nats per token", "bits per byte"), table)


def _metrics(heldout: Sequence[Record]) -> str:
    """The Tasks' own metrics over steps; of many evaluations an even choice."""
    measured = [record for record in heldout if _by_name(record, "metric/")]
    if not measured:
        return ""
    shown = [measured[i] for i in even_choice(len(measured), _MOST_COLUMNS)]
    names = dict.fromkeys(n for record in shown for n in _by_name(record, "metric/"))
    head = ("metric", *(f"step {record['step']:,}" for record in shown))
    table = [
        (name, *(_short(record.get(f"metric/{name}")) for record in shown))
        for name in names
    ]
    note = ""
    if len(shown) < len(measured):
        note = f"{len(shown)} of {len(measured)} evaluations are shown."
    return page_parts.table(head, table) + (
        f"<p>{html.escape(note)}</p>" if note else ""
    )


def _by_name(record: Record, prefix: str) -> dict[str, float]:
    """The numbers of a record under a prefix."""
    return {
        name.removeprefix(prefix): float(value)
        for name, value in record.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
