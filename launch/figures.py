"""Figures of a run as SVG to stand inside a page.

Text stays text, and colours are CSS variables of the page, so that a figure follows a
light or a dark theme and prints. matplotlib draws with colours nobody else uses,
`_THEME`, which are then replaced by the variables.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

Record = Mapping[str, Any]

MAX_POINTS = 300  # of a curve
MAX_COLUMNS = 160  # of a heat map
MAX_ROWS = 64  # of a heat map: beyond it experts share a row
MAX_LAYERS = 8  # drawn one by one
DEPTHS = 8  # colours from the first sparse layer to the last

_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
_TRAIN, _HELDOUT, _THIRD, _ALARM = "#010206", "#010207", "#010208", "#010209"
_DEPTH = [f"#01030{digit}" for digit in range(DEPTHS)]
_THEME = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _TRAIN: "var(--blue)",
    _HELDOUT: "var(--orange)",
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
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


def bars(ours: Mapping[str, float], others: Mapping[str, float], *, unit: str) -> str:
    """Compares a few numbers; ours stand out."""
    values = [*ours.items(), *others.items()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, lengths = zip(*values, strict=True)
        colours = [_TRAIN] * len(ours) + [_MUTED] * len(others)
        drawn = axes.barh(names, lengths, color=colours, height=0.62)
        axes.bar_label(drawn, fmt="%.3f", padding=4, color=_INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(lengths))
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return _svg("bars", draw, width=9.6, height=0.55 + 0.27 * len(values))


def loss(
    train: Sequence[Record],
    heldout: Sequence[Record],
    *,
    tokens_per_step: int | None = None,
    reference: tuple[str, float] | None = None,
) -> str:
    """Draws training and held-out loss over steps, and over tokens if they are known.

    Args:
        train: records of training.
        heldout: records of held-out evaluations.
        tokens_per_step: gives the second axis.
        reference: a name and a loss, drawn as a level.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        name = "loss/nats_per_token"
        _curve(axes, train, name, _TRAIN, label="train")
        steps, values = _finite(heldout, name)
        marker = "o" if len(steps) <= 30 else None
        if len(steps):
            axes.plot(
                steps, values, color=_HELDOUT, marker=marker, ms=4, label="held-out"
            )
        if reference is not None and math.isfinite(reference[1]):
            axes.axhline(reference[1], color=_MUTED, lw=1, ls="--", label=reference[0])
        _x_steps(axes, [*train, *heldout])
        axes.set_ylabel("loss (nats per token)")
        axes.margins(y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        if tokens_per_step:
            top = axes.secondary_xaxis("top", _scaling(tokens_per_step))
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(_compact())
            top.xaxis.set_major_locator(_round_ticks(6))
            top.spines["top"].set_visible(False)

    return _svg("loss", draw, width=9.6, height=3.5)


def load(train: Sequence[Record]) -> str:
    """Draws, per sparse layer, each expert's load over time as a heat map.

    Blue is idle, red is overloaded, white is the mean. Beyond MAX_LAYERS layers an
    even choice is shown; beyond MAX_ROWS experts neighbours share a row, which shows
    the one furthest from the mean.
    """
    steps, load_TLE = _matrix(train, "router/load")
    layers = _even_choice(load_TLE.shape[1], MAX_LAYERS)
    columns = 1 if len(layers) == 1 else 2
    rows = math.ceil(len(layers) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        image: Any = None
        for position, layer in enumerate(layers):
            axes = grid[position // columns, position % columns]
            heat_ET, stride = load_heat(steps, load_TLE[:, layer])
            image = axes.imshow(
                heat_ET,
                aspect="auto",
                cmap="RdBu_r",
                vmin=0,
                vmax=2,
                interpolation="none",
                extent=_extent(steps, heat_ET.shape[0] * stride),
            )
            axes.set_title(f"sparse layer {layer}", loc="left")
            axes.grid(visible=False)
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            if position % columns == 0:
                axes.set_ylabel("expert")
            if position + columns >= len(layers):
                axes.set_xlabel("step")
                axes.xaxis.set_major_formatter(_compact())
                axes.xaxis.set_major_locator(_round_ticks(5))
                axes.tick_params(axis="x", labelbottom=True)
        for position in range(len(layers), rows * columns):
            grid[position // columns, position % columns].set_visible(False)
        bar = figure.colorbar(image, ax=grid, extend="max", pad=0.02, aspect=14 * rows)
        bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "1", "1.5", "≥ 2"])
        bar.set_label("load / mean load")
        bar.outline.set_visible(False)

    return _svg("load", draw, width=9.6, height=0.5 + 1.75 * rows)


def dropped(train: Sequence[Record]) -> str:
    """Draws the dropped fraction of each sparse layer over steps."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _per_layer(axes, train, "router/dropped_fraction_per_layer", scale=100)
        axes.set_ylabel("dropped choices (%)")
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.0))
        _legend_below(axes)

    return _svg("dropped", draw, height=3.1)


def entropy(train: Sequence[Record]) -> str:
    """Draws the entropy of routing in each sparse layer, beneath its bound ln E."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _per_layer(axes, train, "router/entropy_nats_per_layer")
        _, load_TLE = _matrix(train, "router/load")
        if load_TLE.size:
            bound = math.log(load_TLE.shape[2])
            label = f"ln E = {bound:.2f}"
            axes.axhline(bound, color=_MUTED, lw=1, ls="--", label=label)
            axes.set_ylim(0, max(1.08 * bound, axes.get_ylim()[1]))
        axes.set_ylabel("entropy of routing (nats)")
        _legend_below(axes)

    return _svg("entropy", draw, height=3.1)


def throughput(train: Sequence[Record]) -> str:
    """Draws tokens per second, and the share of a step that waits for data."""

    def draw(figure: Figure) -> None:
        speed, wait = figure.subplots(2, sharex=True, height_ratios=[2, 1])
        _curve(speed, train, "perf/tokens_per_second", _TRAIN)
        speed.set_ylabel("tokens / s")
        speed.set_ylim(0, max(1.1 * speed.get_ylim()[1], 1))
        speed.yaxis.set_major_formatter(_compact())
        shares = [
            {"step": record["step"], "share": 100 * share}
            for record in train
            if (share := data_wait_share(record)) is not None
        ]
        _curve(wait, shares, "share", _HELDOUT)
        wait.set_ylim(0, max(1.1 * wait.get_ylim()[1], 5))
        wait.set_ylabel("data wait (%)")
        _x_steps(wait, train)
        figure.align_ylabels()

    return _svg("throughput", draw, height=3.3)


def optimization(train: Sequence[Record]) -> str:
    """Draws the gradient norm, on a logarithmic scale, and the learning rate."""

    def draw(figure: Figure) -> None:
        norm, rate = figure.subplots(2, sharex=True, height_ratios=[2, 1])
        positive = [
            r for r in train if (_number(r, "optimizer/gradient_norm") or 0) > 0
        ]
        _curve(norm, positive, "optimizer/gradient_norm", _TRAIN)
        if positive:
            norm.set_yscale("log")
            norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            norm.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            norm.yaxis.set_minor_locator(NullLocator())
        norm.set_ylabel("gradient norm")
        _curve(rate, train, "optimizer/learning_rate", _HELDOUT)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_locator(MaxNLocator(3))
        rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        rate.set_ylabel("learning rate")
        _x_steps(rate, train)
        figure.align_ylabels()

    return _svg("optimization", draw, height=3.3)


def data_wait_share(record: Record) -> float | None:
    """The fraction of a step's time that was spent waiting for data."""
    wait, step = (_number(record, f"perf/{n}_seconds") for n in ("data_wait", "step"))
    return None if wait is None or not step else wait / step


def binned(
    steps: np.ndarray, values: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduces a curve to at most `bins` points over equal spans of steps.

    Returns:
        Mean step, mean value, least and greatest value of each span that has any.
    """
    if len(steps) <= bins:
        return steps, values, values, values
    span = _bin_of(steps, bins)
    starts = np.flatnonzero(np.diff(span, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    mean_steps, mean_values = (
        np.add.reduceat(array, starts) / counts for array in (steps, values)
    )
    low, high = (f.reduceat(values, starts) for f in (np.minimum, np.maximum))
    return mean_steps, mean_values, low, high


def load_heat(steps: np.ndarray, load_TE: np.ndarray) -> tuple[np.ndarray, int]:
    """Load over the mean, for one layer, as rows of experts and columns of steps.

    Returns:
        heat_ET of at most MAX_ROWS x MAX_COLUMNS, and the number of experts per row.
        A span of steps without a record repeats the one before it.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        relative_TE = load_TE / load_TE.mean(axis=1, keepdims=True)
    good = np.isfinite(relative_TE).all(axis=1)
    steps, relative_TE = steps[good], relative_TE[good]
    stride = math.ceil(load_TE.shape[1] / MAX_ROWS)
    if not len(steps):
        return np.full((math.ceil(load_TE.shape[1] / stride), 1), np.nan), stride
    columns = min(len(steps), MAX_COLUMNS)
    span = _bin_of(steps, columns)
    heat_TE = np.empty((columns, load_TE.shape[1]))
    for column in range(columns):
        inside = span == column
        heat_TE[column] = (
            relative_TE[inside].mean(axis=0) if inside.any() else heat_TE[column - 1]
        )
    padding = -load_TE.shape[1] % stride
    heat_TE = np.pad(heat_TE, ((0, 0), (0, padding)), mode="edge")
    blocks = heat_TE.reshape(columns, -1, stride)
    furthest = np.abs(blocks - 1).argmax(axis=2)[..., None]
    return np.take_along_axis(blocks, furthest, axis=2)[..., 0].T, stride


def _bin_of(steps: np.ndarray, bins: int) -> np.ndarray:
    """The span each step falls in, of `bins` equal spans; steps are sorted."""
    reach = max(float(steps[-1] - steps[0]), 1e-9)
    return np.minimum((steps - steps[0]) / reach * bins, bins - 1).astype(int)


def _extent(steps: np.ndarray, experts: int) -> tuple[float, float, float, float]:
    """Edges of a heat map, with expert 0 at the top."""
    first, last = (float(steps[0]), float(steps[-1])) if len(steps) else (0.0, 1.0)
    return first, max(last, first + 1), experts - 0.5, -0.5


def _number(record: Record, name: str) -> float | None:
    """A finite number of a record, or None."""
    value = record.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def _finite(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values where the value is a finite number."""
    pairs = [(r["step"], v) for r in records if (v := _number(r, name)) is not None]
    table = np.array(pairs, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _matrix(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and stacked values of a quantity with one entry per layer (and expert)."""
    found = [
        (r["step"], np.array(r[name], dtype=float)) for r in records if r.get(name)
    ]
    if found:
        shape = found[-1][1].shape  # of a run whose model was changed, the latest
        found = [pair for pair in found if pair[1].shape == shape]
        return np.array([s for s, _ in found], float), np.stack([v for _, v in found])
    return np.zeros(0), np.zeros((0, 0, 0))


def _even_choice(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread, the ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _curve(
    axes: Axes, records: Sequence[Record], name: str, colour: str, label: str = ""
) -> None:
    """A line, the spread of merged points behind it, crosses where not finite."""
    steps, values = _finite(records, name)
    if len(steps):
        x, mean, low, high = binned(steps, values, MAX_POINTS)
        if len(x) < len(steps):
            axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
        marker = "o" if len(x) == 1 else None
        axes.plot(x, mean, color=colour, marker=marker, ms=4, label=label)
    else:
        axes.set_yticks([])
        note: dict[str, Any] = {"ha": "center", "va": "center", "color": _MUTED}
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, **note)
    lost = [r["step"] for r in records if name in r and _number(r, name) is None]
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


def _per_layer(
    axes: Axes, records: Sequence[Record], name: str, scale: float = 1.0
) -> None:
    """A line per sparse layer, the range of all behind it if only some are drawn."""
    steps, values_TL = _matrix(records, name)
    layers = _even_choice(values_TL.shape[1], MAX_LAYERS)
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
            x, low, high, color=_MUTED, alpha=0.2, lw=0, label="all layers"
        )
    _x_steps(axes, records)


def _legend_below(axes: Axes) -> None:
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


def _x_steps(axes: Axes, records: Sequence[Record]) -> None:
    """The step axis, the same for every figure of a run."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(_compact())
    axes.xaxis.set_major_locator(_round_ticks(6))
    steps = [record["step"] for record in records]
    if steps:
        room = 0.02 * (max(steps) - min(steps)) or 1
        axes.set_xlim(min(steps) - room, max(steps) + room)


def _scaling(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Multiplication and division by a factor, as a second axis wants them."""
    return lambda x: x * factor, lambda x: x / factor


def _round_ticks(most: int) -> MaxNLocator:
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=True)


def _compact() -> EngFormatter:
    return EngFormatter(sep="")


def _svg(
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
