"""The figures of a plan: memory against the chip, the roofline, the step."""

import numpy as np
from matplotlib.figure import Figure

from launch.planning.compiler.records import Compiled, Evaluation
from launch.planning.cost import work
from launch.planning.cost.estimate import ATTAINABLE
from launch.planning.plan import GIB, Plan
from launch.planning.tables import seconds
from launch.report.drawing import (
    HELDOUT,
    INK,
    MUTED,
    TRAIN,
    compact_ticks,
    legend_below,
    to_svg,
)

_COLOURS = tuple(f"#01030{digit}" for digit in range(8))
_LEAST_SHARE = 0.01  # of the memory, that a category needs to be drawn by itself


def memory(plan: Plan) -> str:
    """Bars by category; compiled arguments and temporaries beside them."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        least = _LEAST_SHARE * plan.usable_bytes
        sizes = plan.memory.categories
        shown = {name: size for name, size in sizes.items() if size >= least}
        if rest := sum(sizes.values()) - sum(shown.values()):
            shown["others"] = rest
        start = 0.0
        for place, (name, size) in enumerate(shown.items()):
            colour = _COLOURS[place % len(_COLOURS)] if name != "others" else MUTED
            axes.barh("predicted", size / GIB, left=start, color=colour, label=name)
            start += size / GIB
        if isinstance(plan.compiled, Compiled):
            held = plan.compiled.argument_bytes / GIB
            more = plan.compiled.total_bytes / GIB - held
            axes.barh("compiled", held, color=TRAIN, label="arguments")
            axes.barh("compiled", more, left=held, color=HELDOUT, label="temporaries")
            start = max(start, held + more)
            if isinstance(found := plan.compiled.evaluation, Evaluation):
                held = (found.argument_bytes + found.kept_bytes) / GIB
                more = found.total_bytes / GIB - held
                axes.barh("evaluation", held, color=TRAIN)
                axes.barh("evaluation", more, left=held, color=HELDOUT)
                start = max(start, held + more)
        usable = plan.usable_bytes / GIB
        axes.axvline(usable, color=INK, lw=1.2, ls="--")
        axes.text(
            usable,
            1.02,
            f"usable {usable:.4g}",
            ha="center",
            va="bottom",
            color=INK,
            transform=axes.get_xaxis_transform(),
        )
        axes.set_xlim(0, 1.08 * max(usable, start))
        axes.set_xlabel("GiB")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        legend_below(axes)

    rows = 1
    if isinstance(plan.compiled, Compiled):
        rows += 1 + isinstance(plan.compiled.evaluation, Evaluation)
    return to_svg("memory", draw, width=9.6, height=1.7 + 0.45 * rows)


def roofline(plan: Plan) -> str:
    """Operations per second that each part reaches, over operations per byte."""
    device = plan.topology.chip.device()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        points = [
            (part.flops / part.touched_bytes, part)
            for part in work.parts(plan.settings, plan.topology.chip.name)
            if part.flops and part.touched_bytes
        ]
        low = min([1.0, *(x for x, _ in points)]) / 2
        high = 2 * max([1e4, *(x for x, _ in points)])
        x = np.geomspace(low, high, 200)
        for peak, style, name in (
            (device.peak_flops, "-", "peak"),
            (ATTAINABLE * device.peak_flops, "--", f"{ATTAINABLE:.0%} of it"),
        ):
            y = np.minimum(x * device.memory_bandwidth, peak)
            axes.plot(x, y / 1e12, color=MUTED, lw=1.2, ls=style, label=name)
        for place, (intensity, part) in enumerate(points):
            reached = min(
                intensity * device.memory_bandwidth, ATTAINABLE * device.peak_flops
            )
            axes.plot(
                intensity,
                reached / 1e12,
                "o",
                ms=6,
                label=part.name,
                color=_COLOURS[place % len(_COLOURS)],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(compact_ticks())
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("TFLOP/s of one device")
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=3,
            columnspacing=1.0,
            handlelength=1.2,
        )

    return to_svg("roofline", draw, height=3.6)


def step(plan: Plan) -> str:
    """Parts and axes as bars, the longest first."""
    times = {part.name: (part.seconds, TRAIN) for part in plan.estimate.parts}
    times |= {
        f"network, {axis}": (time, HELDOUT)
        for axis, time in plan.estimate.network.items()
    }
    shown = sorted(times.items(), key=lambda one: -one[1][0])[:12]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        lengths = [time for _, (time, _) in shown]
        drawn = axes.barh(
            [name for name, _ in shown],
            lengths,
            color=[colour for _, (_, colour) in shown],
            height=0.62,
        )
        axes.bar_label(drawn, [seconds(t) for t in lengths], padding=4, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(lengths))
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)

    return to_svg("step", draw, height=3.6)
