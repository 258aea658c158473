"""How every figure is drawn: colours, axes, curves, and the way to SVG.

Text stays text, and colours are CSS variables of the page, so that a figure follows a
light or a dark theme and prints. matplotlib draws with colours nobody else uses,
`_THEME`, which are then replaced by the variables.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from launch.report.series import Record, binned, even_choice, finite, matrix, number

MAX_POINTS = 300  # of a curve
MAX_LAYERS = 8  # drawn one by one
DEPTHS = 8  # colours from the first sparse layer to the last

INK, MUTED, _GRID = "#010203", "#010204", "#010205"
TRAIN, HELDOUT, _THIRD, _ALARM = "#010206", "#010207", "#010208", "#010209"
_DEPTH = [f"#01030{digit}" for digit in range(DEPTHS)]
_THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    _GRID: "var(--line)",
    TRAIN: "var(--blue)",
    HELDOUT: "var(--orange)",
    _THIRD: "var(--green)",
    _ALARM: "var(--red)",
} | {colour: f"var(--depth-{depth})" for depth, colour in enumerate(_DEPTH)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


def to_svg(
    name: str,
    draw: Callable[[Figure], None],
    *,
    width: float = 4.7,
    height: float = 2.7,
) -> str:
    """Draws and returns an SVG element that refers to nothing outside itself.

    The same input gives the same text: identifiers are derived from `name`, which also
    keeps those of two figures of a page apart.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    return svg


def curve(
    axes: Axes, records: Sequence[Record], name: str, colour: str, label: str = ""
) -> None:
    """A line, the spread of merged points behind it, crosses where not finite."""
    steps, values = finite(records, name)
    if len(steps):
        x, mean, low, high = binned(steps, values, MAX_POINTS)
        if len(x) < len(steps):
            axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        marker = "o" if len(x) == 1 else None
        axes.plot(x, mean, color=colour, marker=marker, ms=4, label=label)
    else:
        axes.set_yticks([])
        note: dict[str, Any] = {"ha": "center", "va": "center", "color": MUTED}
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, **note)
    lost = [r["step"] for r in records if name in r and number(r, name) is None]
    if lost:
        shown = lost[:: math.ceil(len(lost) / MAX_POINTS)]
        axes.plot(
            shown,
            [0.0] * len(shown),
            "x",
            color=_ALARM,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            ms=5,
            label="not finite",
        )


def per_layer(
    axes: Axes, records: Sequence[Record], name: str, scale: float = 1.0
) -> None:
    """A line per sparse layer, the range of all behind it if only some are drawn."""
    steps, values_TL = matrix(records, name)
    layers = even_choice(values_TL.shape[1], MAX_LAYERS)
    good = np.isfinite(values_TL.reshape(len(steps), -1)).all(axis=1)
    steps, values_TL = steps[good], scale * values_TL[good]
    for layer in layers if len(steps) else ():
        x, mean, *_ = binned(steps, values_TL[:, layer], MAX_POINTS)
        depth = round(layer * (DEPTHS - 1) / max(values_TL.shape[1] - 1, 1))
        marker = "o" if len(x) == 1 else None
        label = f"layer {layer}"
        axes.plot(
            x, mean, color=_DEPTH[depth], marker=marker, ms=4, label=label, lw=1.3
        )
    if len(steps) and len(layers) < values_TL.shape[1]:
        x, _, low, _ = binned(steps, values_TL.min(axis=1), MAX_POINTS)
        _, _, _, high = binned(steps, values_TL.max(axis=1), MAX_POINTS)
        axes.fill_between(
            x, low, high, color=MUTED, alpha=0.2, lw=0, label="all layers"
        )
    x_steps(axes, records)


def legend_below(axes: Axes) -> None:
    """A legend that no curve can run through."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 5),
            columnspacing=1.2,
            handlelength=1.2,
        )


def x_steps(axes: Axes, records: Sequence[Record]) -> None:
    """The step axis, the same for every figure of a run."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(compact_ticks())
    axes.xaxis.set_major_locator(round_ticks(6))
    steps = [record["step"] for record in records]
    if steps:
        room = 0.02 * (max(steps) - min(steps)) or 1
        axes.set_xlim(min(steps) - room, max(steps) + room)


def scaling(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Multiplication and division by a factor, as a second axis wants them."""
    return lambda x: x * factor, lambda x: x / factor


def round_ticks(most: int) -> MaxNLocator:
    """At most so many ticks, at round whole numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True)


def compact_ticks() -> EngFormatter:
    """Such as 2k for 2,000."""
    return EngFormatter(sep="")
