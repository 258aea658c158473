"""`--dry_run`: everything that can be known before compiling."""

import argparse
import math

from rich.console import Console
from rich.table import Table

from launch.assemble import Run, assemble
from launch.errors import EXIT_DONE
from launch.gin_files import ResolvedConfig
from launch.terminal import compact
from moe.accounting import count
from moe.settings import RouterSettings, capacity
from partitioning import rules
from partitioning.mesh import describe


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Prints knobs with their origin, counts, capacity, mesh and placement."""
    del options
    run = assemble(config)
    console = Console(width=None if Console().is_terminal else 160)
    knobs = Table("knob", "value", "origin", title="Knobs", title_justify="left")
    for knob in config.knobs:
        knobs.add_row(knob.macro, repr(knob.value), knob.origin)
    console.print(knobs)

    placement = Table(
        "array",
        "shape",
        "logical axes",
        "mesh axes",
        "bytes per device",
        title="Placement of parameters, optimizer state and batch",
        title_justify="left",
    )
    placement.columns[-1].justify = "right"
    rows = rules.placement_table(run.mesh, run.shapes, run.axes)
    batch_axes = dict.fromkeys(run.batch_shapes(), ("batch", "length"))
    rows += rules.placement_table(run.mesh, run.batch_shapes(), batch_axes)
    for *words, size in rows:
        placement.add_row(*words, f"{size:,}")
    console.print(placement)

    summary = Table.grid(padding=(0, 2))
    for name, value in facts(config, run):
        summary.add_row(name, value)
    held = compact(sum(row[-1] for row in rows), "B")
    summary.add_row("state and batch", f"{held} on each device")
    console.print(summary)
    console.print("dry run: nothing was compiled, nothing was written")
    return EXIT_DONE


def facts(config: ResolvedConfig, run: Run) -> list[tuple[str, str]]:
    """Says in a few lines what the run is."""
    settings = config.settings
    model, router, train = settings.model, settings.router, settings.train
    counts = count(model, router, settings.data.length)
    tokens = train.batch_size * settings.data.length
    lines = [
        ("parameters", f"{counts.total:,} total, {counts.active:,} active per token"),
        (
            "FLOPs per token",
            f"{compact(counts.forward_flops_per_token)} forward, "
            f"{compact(counts.train_flops_per_token)} in training; the forward pass "
            f"executes {compact(counts.executed_forward_flops_per_token)} "
            "with capacity padding",
        ),
        ("mesh", f"{describe(settings.mesh)} ({run.mesh.devices.flat[0].platform})"),
        (
            "tokens",
            f"{tokens:,} a step in {train.microbatches} microbatch(es), "
            f"{compact(tokens * train.train_steps)} in {train.train_steps:,} steps",
        ),
    ]
    if model.moe_every:
        slots = capacity(router, model.num_experts, train=True)
        lines.append(
            (
                "capacity",
                f"{slots} slots per expert in groups of {router.group_size} tokens: "
                f"{router.num_selected} × {router.group_size} / {model.num_experts} × "
                f"{router.capacity_factor}; held-out "
                f"{capacity(router, model.num_experts, train=False)}",
            )
        )
        if router.slot_order == "choice_major" and router.num_selected > 1:
            lines.append(
                ("slot order", "choice by choice: drops depend on later tokens")
            )
        drops = expected_drops(router, model.num_experts, slots)
        lines.append(("expected drops", f"{drops:.1%} with a balanced router"))
    return lines


def expected_drops(router: RouterSettings, num_experts: int, slots: int) -> float:
    """Fraction that a balanced but random router drops: arrivals are Poisson."""
    mean = router.num_selected * router.group_size / num_experts
    seated, probability = 0.0, math.exp(-mean)
    reached = probability
    for arrivals in range(1, slots):
        probability *= mean / arrivals
        seated += arrivals * probability
        reached += probability
    seated += slots * (1 - reached)
    return max(0.0, 1 - seated / mean)
