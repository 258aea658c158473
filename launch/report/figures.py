"""The figures of a run, each as an SVG element to stand inside a page."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from launch.report.drawing import (
    HELDOUT,
    INK,
    MUTED,
    TRAIN,
    compact_ticks,
    curve,
    legend_below,
    per_layer,
    round_ticks,
    scaling,
    to_svg,
    x_steps,
)
from launch.report.gather import DATA_WAIT_PERCENT, Loads
from launch.report.series import Trends, load_heat


def bars(ours: Mapping[str, float], others: Mapping[str, float], *, unit: str) -> str:
    """Compares a few numbers; ours stand out."""
    values = [*ours.items(), *others.items()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, lengths = zip(*values, strict=True)
        colours = [TRAIN] * len(ours) + [MUTED] * len(others)
        drawn = axes.barh(names, lengths, color=colours, height=0.62)
        axes.bar_label(drawn, fmt="%.3f", padding=4, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(lengths))
        axes.set_xlabel(unit)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return to_svg("bars", draw, width=9.6, height=0.55 + 0.27 * len(values))


def loss(
    train: Trends,
    heldout: Trends,
    *,
    tokens_per_step: int | None = None,
    reference: tuple[str, float] | None = None,
) -> str:
    """Draws training and held-out loss over steps, and over tokens if they are known.

    Args:
        train: trends of training.
        heldout: trends of held-out evaluations.
        tokens_per_step: gives the second axis.
        reference: a name and a loss, drawn as a level.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        name = "loss/nats_per_token"
        curve(axes, train.curve(name), TRAIN, label="train")
        scored = heldout.curve(name)
        marker = "o" if len(scored.steps) <= 30 else None
        if len(scored.steps):
            given: dict[str, Any] = {"color": HELDOUT, "marker": marker, "ms": 4}
            axes.plot(scored.steps, scored.mean, label="held-out", **given)
        if reference is not None and math.isfinite(reference[1]):
            axes.axhline(reference[1], color=MUTED, lw=1, ls="--", label=reference[0])
        x_steps(axes, train.reach, heldout.reach)
        axes.set_ylabel("loss (nats per token)")
        axes.margins(y=0.08)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
        if tokens_per_step:
            top = axes.secondary_xaxis("top", scaling(tokens_per_step))
            top.set_xlabel("tokens")
            top.xaxis.set_major_formatter(compact_ticks())
            top.xaxis.set_major_locator(round_ticks(6))
            top.spines["top"].set_visible(False)

    return to_svg("loss", draw, width=9.6, height=3.5)


def load(loads: Loads) -> str:
    """Draws, per sparse layer, each expert's load over time as a heat map.

    Blue is idle, red is overloaded, white is the mean. Beyond MAX_LAYERS layers an
    even choice is shown; beyond MAX_ROWS experts neighbours share a row, which shows
    the one furthest from the mean.
    """
    steps, layers = loads.steps, loads.layers
    columns = 1 if len(layers) == 1 else 2
    rows = math.ceil(len(layers) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        image: Any = None
        for position, layer in enumerate(layers):
            axes = grid[position // columns, position % columns]
            load_TE = loads.load_TLE[:, position]
            there_E = ~np.isnan(load_TE).all(axis=0)  # layers may have fewer experts
            there_E |= not there_E.any()
            heat_ET, stride = load_heat(steps, load_TE[:, there_E])
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
                axes.xaxis.set_major_formatter(compact_ticks())
                axes.xaxis.set_major_locator(round_ticks(5))
                axes.tick_params(axis="x", labelbottom=True)
        for position in range(len(layers), rows * columns):
            grid[position // columns, position % columns].set_visible(False)
        bar = figure.colorbar(image, ax=grid, extend="max", pad=0.02, aspect=14 * rows)
        bar.set_ticks([0, 0.5, 1, 1.5, 2], labels=["0", "0.5", "1", "1.5", "≥ 2"])
        bar.set_label("load / mean load")
        bar.outline.set_visible(False)

    return to_svg("load", draw, width=9.6, height=0.5 + 1.75 * rows)


def dropped(train: Trends) -> str:
    """Draws the dropped fraction of each sparse layer over steps."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shown = train.layer_curves("router/dropped_fraction_per_layer")
        per_layer(axes, shown, scale=100)
        x_steps(axes, train.reach)
        axes.set_ylabel("dropped choices (%)")
        axes.set_ylim(0, max(axes.get_ylim()[1], 1.0))
        legend_below(axes)

    return to_svg("dropped", draw, height=3.1)


def entropy(train: Trends, num_experts: int | None) -> str:
    """Draws the entropy of routing in each sparse layer, beneath its bound ln E."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        per_layer(axes, train.layer_curves("router/entropy_nats_per_layer"))
        x_steps(axes, train.reach)
        if num_experts:
            bound = math.log(num_experts)
            label = f"ln E = {bound:.2f}"
            axes.axhline(bound, color=MUTED, lw=1, ls="--", label=label)
            axes.set_ylim(0, max(1.08 * bound, axes.get_ylim()[1]))
        axes.set_ylabel("entropy of routing (nats)")
        legend_below(axes)

    return to_svg("entropy", draw, height=3.1)


def throughput(pace: Trends) -> str:
    """Draws tokens per second, and the share of a step that waits for data."""

    def draw(figure: Figure) -> None:
        speed, wait = figure.subplots(2, sharex=True, height_ratios=[2, 1])
        curve(speed, pace.curve("perf/tokens_per_second"), TRAIN)
        speed.set_ylabel("tokens / s")
        speed.set_ylim(0, max(1.1 * speed.get_ylim()[1], 1))
        speed.yaxis.set_major_formatter(compact_ticks())
        curve(wait, pace.curve(DATA_WAIT_PERCENT), HELDOUT)
        wait.set_ylim(0, max(1.1 * wait.get_ylim()[1], 5))
        wait.set_ylabel("data wait (%)")
        x_steps(wait, pace.reach)
        figure.align_ylabels()

    return to_svg("throughput", draw, height=3.3)


def optimization(train: Trends) -> str:
    """Draws the gradient norm, on a logarithmic scale, and the learning rate."""

    def draw(figure: Figure) -> None:
        norm, rate = figure.subplots(2, sharex=True, height_ratios=[2, 1])
        positive = train.curve("optimizer/gradient_norm")
        curve(norm, positive, TRAIN)
        if len(positive.steps):
            norm.set_yscale("log")
            norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            norm.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            norm.yaxis.set_minor_locator(NullLocator())
        norm.set_ylabel("gradient norm")
        curve(rate, train.curve("optimizer/learning_rate"), HELDOUT)
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_locator(MaxNLocator(3))
        rate.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        rate.set_ylabel("learning rate")
        x_steps(rate, train.reach)
        figure.align_ylabels()

    return to_svg("optimization", draw, height=3.3)


def _extent(steps: np.ndarray, experts: int) -> tuple[float, float, float, float]:
    """Edges of a heat map, with expert 0 at the top."""
    first, last = (float(steps[0]), float(steps[-1])) if len(steps) else (0.0, 1.0)
    return first, max(last, first + 1), experts - 0.5, -0.5
