"""How every figure is drawn: colours, axes, curves, and the way to SVG.

Text stays text, and colours are CSS variables of the page, so that a figure follows a
light or a dark theme and prints. matplotlib draws with colours nobody else uses,
`_THEME`, which are then replaced by the variables.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from launch.report.series import MAX_LAYERS, Curve, LayerCurves, even_choice

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


def curve(axes: Axes, shown: Curve, colour: str, label: str = "") -> None:
    """A line, the spread of merged points behind it, crosses where not finite."""
    x = shown.steps
    if len(x):
        if shown.merged:
            axes.fill_between(x, shown.low, shown.high, color=colour, alpha=0.2, lw=0)
        marker = "o" if len(x) == 1 else None
        axes.plot(x, shown.mean, color=colour, marker=marker, ms=4, label=label)
    else:
        axes.set_yticks([])
        note: dict[str, Any] = {"ha": "center", "va": "center", "color": MUTED}
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, **note)
    if shown.lost:
        axes.plot(
            shown.lost,
            [0.0] * len(shown.lost),
            "x",
            color=_ALARM,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            ms=5,
            label="not finite",
        )


def per_layer(axes: Axes, shown: LayerCurves | None, scale: float = 1.0) -> None:
    """A line per sparse layer, the range of all behind it if only some are drawn."""
    if shown is None:
        return
    number = shown.mean_TL.shape[1]
    layers = even_choice(number, MAX_LAYERS)
    for layer in layers:
        depth = round(layer * (DEPTHS - 1) / max(number - 1, 1))
        axes.plot(
            shown.steps,
            scale * shown.mean_TL[:, layer],
            color=_DEPTH[depth],
            marker="o" if len(shown.steps) == 1 else None,
            ms=4,
            label=f"layer {layer}",
            lw=1.3,
        )
    if len(layers) < number:
        low, high = scale * shown.low, scale * shown.high
        axes.fill_between(
            shown.steps, low, high, color=MUTED, alpha=0.2, lw=0, label="all layers"
        )


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


def x_steps(axes: Axes, *reaches: tuple[int, int] | None) -> None:
    """The step axis, the same for every figure of a run."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(compact_ticks())
    axes.xaxis.set_major_locator(round_ticks(6))
    ends = [end for reach in reaches if reach for end in reach]
    if ends:
        room = 0.02 * (max(ends) - min(ends)) or 1
        axes.set_xlim(min(ends) - room, max(ends) + room)


def scaling(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Multiplication and division by a factor, as a second axis wants them."""
    return lambda x: x * factor, lambda x: x / factor


def round_ticks(most: int) -> MaxNLocator:
    """At most so many ticks, at round whole numbers."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True)


def compact_ticks() -> EngFormatter:
    """Such as 2k for 2,000."""
    return EngFormatter(sep="")
