"""What `verify` prints, and what it refuses once jax is there."""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.config.edit import describe_mesh
from launch.config.reader import ResolvedConfig
from launch.errors import ConfigError
from launch.terminal.lines import duration
from launch.verification.compare import Row
from launch.verification.examine import Verdict, differing
from launch.verification.shrink import Shrunk
from moe import architecture
from moe.model import inventory
from moe.training import new_state
from moe.training.optimizer import make_optimizer
from partitioning import placement, rules
from partitioning.settings import AXES, MeshSettings

_MOST_NAMED = 4  # quantities that differ, in the last line


class Printer:
    """Prints to standard output, where results go."""

    def __init__(self) -> None:
        self._console = Console(
            width=None if Console().is_terminal else 140, highlight=False
        )

    def changes(self, shrunk: Shrunk) -> None:
        """What is another in what is verified."""
        table = Table(
            "knob",
            "of the run",
            "verified",
            title="What was shrunk",
            title_justify="left",
        )
        for mesh in shrunk.meshes:
            table.add_row("mesh", describe_mesh(mesh.asked), describe_mesh(mesh.small))
            if architecture.has_experts(shrunk.settings.model):
                before = shrunk.settings.execution.transport
                table.add_row("TRANSPORT", before, mesh.transport)
        for change in shrunk.changes:
            table.add_row(change.name, str(change.before), str(change.after))
        self._console.print(table)

    def verdict(self, verdict: Verdict, *, every: bool) -> None:
        """Each quantity of a mesh; only those that differ unless `every`."""
        rows = [row for row in verdict.rows if every or not row.ok]
        if not rows:
            return
        table = Table(
            "quantity",
            "difference",
            "may be",
            "",
            "",
            title=f"{describe_mesh(verdict.mesh.small)} against one device",
            title_justify="left",
        )
        for column in table.columns[1:3]:
            column.justify = "right"
        for row in rows:
            table.add_row(*_cells(row))
        self._console.print(table)

    def summary(self, verdict: Verdict) -> None:
        """One line."""
        mesh = verdict.mesh
        what = f"{describe_mesh(mesh.asked)} (as {describe_mesh(mesh.small)})"
        took = duration(verdict.seconds)
        wrong = differing(verdict)
        if not wrong:
            line = f"same: {what}: {len(verdict.rows)} quantities in {took}"
        else:
            names = "; ".join(row.quantity for row in wrong[:_MOST_NAMED])
            more = len(wrong) - _MOST_NAMED
            line = f"DIFFERS: {what}: {names}{f'; and {more} more' if more > 0 else ''}"
        self._console.print(Text(line), soft_wrap=True)


def _cells(row: Row) -> tuple[str | Text, ...]:
    if row.tolerance == 0:
        difference = "0" if row.difference == 0 else f"{row.difference:.6g}"
    elif math.isnan(row.difference):
        difference = "not a number"
    else:
        difference = f"{row.difference:.1e}"
    verdict = Text("same") if row.ok else Text("DIFFERS", style="bold red")
    return row.quantity, difference, f"{row.tolerance:g}", verdict, row.note


def refuse_what_does_not_divide(
    config: ResolvedConfig, asked: Sequence[MeshSettings]
) -> None:
    """Checks the arrays of the run as large as they are; the shrunk ones always divide.

    Raises:
        ConfigError: every dimension that does not divide over a mesh.
    """
    settings = config.settings
    specs = inventory.specs(settings.layers)
    optimizer = make_optimizer(settings.optimizer, settings.train.train_steps, specs)
    shapes = new_state.abstract(
        settings.layers, settings.execution.param_dtype, optimizer
    )
    state_axes = new_state.logical_axes(shapes, settings.layers)
    found = []
    for mesh in asked:
        table = rules.table(dataclasses.replace(settings, mesh=mesh).partition)
        abstract = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
        found += [
            f"on {describe_mesh(mesh)}: {problem}"
            for problem in placement.problems(abstract, shapes, state_axes, table)  # type: ignore[arg-type]
        ]
    if found:
        raise ConfigError(config.where, found)
