"""`--dry_run`: everything that can be known before compiling."""

import argparse
import math

import jax
from rich.console import Console
from rich.table import Table

from launch.assemble import Run, assemble
from launch.errors import EXIT_DONE
from launch.gin_files import ResolvedConfig
from launch.settings import Settings
from launch.terminal import compact
from moe.accounting import count
from moe.dispatch import choice
from moe.settings import RouterSettings, capacity, never_drops
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
            f"{compact(counts.train_flops_per_token)} in training; slots of fixed "
            "capacity would make the forward pass "
            f"{compact(counts.executed_forward_flops_per_token)}",
        ),
        ("mesh", f"{describe(settings.mesh)} ({run.mesh.devices.flat[0].platform})"),
        (
            "tokens",
            f"{tokens:,} a step in {train.microbatches} microbatch(es), "
            f"{compact(tokens * train.train_steps)} in {train.train_steps:,} steps",
        ),
    ]
    if model.moe_every:
        lines += sparse_facts(settings, run.mesh)
    return lines


def sparse_facts(settings: Settings, mesh: jax.sharding.Mesh) -> list[tuple[str, str]]:
    """Router, transport, capacity, and what to expect of them."""
    model, router = settings.model, settings.router
    E, S = model.num_experts, router.group_size
    lines = [("router", _describe_router(settings))]
    axis_size = mesh.shape["expert"]
    platform = mesh.devices.flat[0].platform
    picks = {}
    for train in (True, False):
        name, reason = choice.pick(model, router, axis_size, platform, train=train)
        picks[train] = f"{name} ({reason})"
    same = picks[True] == picks[False]
    lines.append(
        (
            "transport",
            picks[True] if same else f"{picks[True]}; held-out {picks[False]}",
        )
    )
    slots = capacity(router, E, train=True)
    if never_drops(router, E, train=True):
        budget = f"; room for {router.row_budget:g} × an even share of rows"
        lines.append(("capacity", f"nothing drops{budget if axis_size > 1 else ''}"))
        return lines
    heldout = capacity(router, E, train=False)
    lines.append(
        (
            "capacity",
            f"{slots} slots per expert in groups of {S} tokens, even load "
            f"{float(router.mean_choices(E)) * S / E:g}; held-out "
            f"{'nothing drops' if heldout == S else heldout}",
        )
    )
    if router.slot_order == "choice_major" and router.num_choices(E) > 1:
        lines.append(("slot order", "choice by choice: drops depend on later tokens"))
    if router.family != "expert_choice":
        drops = expected_drops(router, E, slots)
        lines.append(("expected drops", f"{drops:.1%} with a balanced router"))
    return lines


def _describe_router(settings: Settings) -> str:
    """Names the router, and says which losses it has no use for."""
    router, loss = settings.router, settings.loss
    words = {
        "token_choice": f"top-{router.num_selected} of {settings.model.num_experts}",
        "prototypes": f"top-{router.num_selected} in each of {router.num_prototypes} "
        "prototypes",
        "expert_choice": "experts choose tokens",
        "hashed": f"a table from token id to {router.num_selected} expert(s)",
        "sinkhorn": f"top-{router.num_selected} of balanced assignments",
    }[router.family]
    if router.allow_future_leak:
        words += "; ALLOW_FUTURE_LEAK: tokens may depend on later ones"
    if router.family == "hashed" and (loss.balance_weight or loss.router_z_weight):
        words += "; it has no logits, so balance and z losses are 0"
    return words


def expected_drops(router: RouterSettings, num_experts: int, slots: int) -> float:
    """Fraction that a balanced but random router drops: arrivals are Poisson."""
    mean = float(router.mean_choices(num_experts)) * router.group_size / num_experts
    seated, probability = 0.0, math.exp(-mean)
    reached = probability
    for arrivals in range(1, slots):
        probability *= mean / arrivals
        seated += arrivals * probability
        reached += probability
    seated += slots * (1 - reached)
    return max(0.0, 1 - seated / mean)
