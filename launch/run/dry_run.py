"""A dry run: everything that can be known before compiling."""

from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from launch.config.reader import ResolvedConfig
from launch.data import opening
from launch.errors import EXIT_DONE
from launch.run import describe
from launch.run.assemble import assemble
from launch.terminal.lines import compact
from moe.model.transformer import feature_axes
from partitioning import placement
from tasks.store import is_there


def show(
    config: ResolvedConfig,
    devices: Sequence[jax.Device] | None = None,
    known: str = "",
) -> int:
    """Prints knobs with their origin, counts, capacity, mesh, data and placement.

    Args:
        config: configuration of the run.
        devices: those that it would have, described; by default all that jax finds.
        known: what is known of those devices, in words.
    """
    run = assemble(config, devices)
    store = None
    if is_there(config.settings.data.store_dir):
        store = opening.open_checked(config)
    console = Console(width=None if Console().is_terminal else 160)
    knobs = Table("knob", "value", "origin", title="Knobs", title_justify="left")
    for knob in config.knobs:
        knobs.add_row(knob.macro, repr(knob.value), knob.origin)
    console.print(knobs)

    shown = Table(
        "array",
        "shape",
        "logical axes",
        "mesh axes",
        "bytes per device",
        title="Placement of parameters, optimizer state and batch",
        title_justify="left",
    )
    shown.columns[-1].justify = "right"
    rows = placement.table(run.mesh, run.shapes, run.axes, run.learner.model.grid.table)
    batch_axes = {name: feature_axes(name) for name in run.batch_shapes()}
    rows += placement.table(run.mesh, run.batch_shapes(), batch_axes)
    for *words, size in rows:
        shown.add_row(*words, f"{size:,}")
    console.print(shown)

    summary = Table.grid(padding=(0, 2))
    if known:
        summary.add_row("devices", known)
    for name, value in describe.facts(config, run, store):
        summary.add_row(name, value)
    held = compact(sum(row[-1] for row in rows), "B")
    summary.add_row("state and batch", f"{held} on each device")
    console.print(summary)
    console.print("dry run: nothing was compiled, nothing was written")
    return EXIT_DONE
