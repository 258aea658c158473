"""Pieces of HTML that a report is made of; whatever text they take is escaped."""

import html
from collections.abc import Sequence
from typing import Any


def section(heading: str, body: str) -> str:
    """Returns a section under a heading; the body is HTML."""
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def figure_of(svg: str, caption: str, *, wide: bool = False) -> str:
    """Returns a figure with its caption; a wide one may scroll on a small screen."""
    kind = ' class="wide"' if wide else ""
    said = html.escape(caption)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{said}"', 1)
    return f"<figure{kind}>{svg}<figcaption>{said}</figcaption></figure>"


def facts(pairs: Sequence[Sequence[str]]) -> str:
    """Returns names and values as a list; nothing if there are none."""
    if not pairs:
        return ""
    items = "".join(
        f"<div><dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in pairs
    )
    return f'<dl class="facts">{items}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a table whose first column is code."""
    cells = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>"
        + f"<td><code>{html.escape(str(row[0]))}</code></td>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
