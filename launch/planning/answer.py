"""Does a run fit, how fast could it be, what would it cost?

Arithmetic alone, or with the TPU's own compiler (`--compile`); no accelerator is
touched. docs/plan.md says how to read it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.config import edit
from launch.config.platform import CPU_FLAG, append_flags, uses_cpu
from launch.config.reader import ResolvedConfig
from launch.config.rules import problems as problems_of_settings
from launch.errors import ConfigError, UserError
from launch.planning.compiler import compile as planned_compile
from launch.planning.compiler.records import Compiled, Failure
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import Topology, parse, problems
from partitioning.settings import MeshSettings

if TYPE_CHECKING:
    from launch.commands.plan import PlanOptions
    from launch.planning import search
    from launch.planning.plan import Plan

_GIB = 2**30
_SHOWN = 8  # candidates of a search


class PlanError(UserError):
    """A plan that cannot be made, or that cannot come true."""


def answer(
    config: ResolvedConfig, options: "PlanOptions", console: Console
) -> tuple["Plan", str]:
    """Plans.

    Args:
        config: what is planned.
        options: options of the verb.
        console: where a search shows what it finds.
    Returns:
        The plan, and what was not compiled though that was asked for; "" if all was.
    Raises:
        PlanError: it cannot be planned.
        ConfigError: it cannot be placed on that slice.
    """
    topology = parse(options.topology)
    _check_options(options, topology)
    # Shapes are traced, on no device: a TPU of this machine is left alone.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if uses_cpu(os.environ):
        append_flags(os.environ, "XLA_FLAGS", [CPU_FLAG])
    from launch.planning.plan import Prices, make
    from launch.run import user_code

    config = user_code.admitted(config, allowed=options.allow_module)
    config = moving.moved(config, topology)
    _refuse_what_never_fits(config, topology)
    found: tuple[search.Candidate, ...] = ()
    compiled: Compiled | Failure | None = None
    if options.search:
        config, found, compiled = _searched(config, topology, options, console)
    else:
        config = _on_its_mesh(config, topology, options.mesh)
        if options.compile:
            compiled = _compile(config, topology, options)
    prices = Prices(options.pue, options.tonnes_per_mwh, options.price)
    plan = make(config, topology, prices, compiled, found)
    failed = ""
    if isinstance(compiled, Failure):
        failed = f"not compiled ({compiled.kind}): {_words(compiled)}"
    elif compiled and isinstance(failure := compiled.evaluation, Failure):
        failed = f"evaluation not compiled ({failure.kind}): {_words(failure)}"
    return plan, failed


def _check_options(options: "PlanOptions", topology: Topology) -> None:
    """Refuses options that contradict one another, or the chip."""
    if options.mesh and options.search:
        raise PlanError("--mesh says what --search looks for: give one of them")
    if options.output and not options.search:
        raise PlanError("--output takes what --search finds: add --search")
    if options.compile and topology.chip.kind != "tpu":
        raise PlanError(
            f"--compile: {topology} has GPUs, and only a machine with one compiles for "
            "them; leave --compile out, or plan for a TPU"
        )
    if options.compile and planned_compile.find_compiler() is None:
        raise PlanError(
            f"--compile needs libtpu: {planned_compile.INSTALL}, or leave it out"
        )
    for name in ("pue", "time_limit", "memory_limit"):
        if getattr(options, name) <= 0:
            raise PlanError(f"--{name} = {getattr(options, name):g}: must be above 0")
    for name in ("tonnes_per_mwh", "price"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise PlanError(f"--{name} = {value:g}: cannot be negative")


# ---------------------------------------------------------------------------- meshes


def _on_its_mesh(
    config: ResolvedConfig, topology: Topology, asked: str | None
) -> ResolvedConfig:
    """The configuration on the mesh that was asked for, or its own."""
    if asked:
        mesh, faults = edit.parse_mesh(asked)
        if faults:
            raise ConfigError("--mesh", faults)
        config = edit.reconfigured(config, edit.mesh_knobs(mesh))
    mesh = config.settings.mesh
    found = problems(topology, mesh)
    if not found:
        found = problems_of_settings(config.settings)
    if found:
        raise ConfigError(config.where, [*found, _what_would_fit(config, topology)])
    return config


def _what_would_fit(config: ResolvedConfig, topology: Topology) -> str:
    """The mesh that a search finds first."""
    from launch.planning import search

    found = search.search(config.settings, topology)
    if not found:
        return f"no mesh of {topology} that this run divides over fits its memory"
    best = found[0].settings.mesh
    sizes = {axis: getattr(best, axis) for axis in MeshSettings.__dataclass_fields__}
    axes = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1)
    return (
        f"what fits {topology} is, for instance, --mesh={axes or 'data=1'} with "
        f"{_without_mesh(found[0])}; --search ranks all, and --output keeps the best"
    )


def _without_mesh(one: "search.Candidate") -> str:
    from launch.planning.search import told

    rest = {k: v for k, v in one.knobs.items() if not k.startswith("MESH_")}
    return " ".join(f"--gin.{word}" for word in told(rest).split())


def _refuse_what_never_fits(config: ResolvedConfig, topology: Topology) -> None:
    """State and gradients that exceed the memory of all devices together."""
    from launch.planning import search
    from launch.planning.hardware.topologies import standard

    usable = topology.chip.device().usable_bytes
    least = search.least_bytes(config.settings, topology)
    if least <= usable:
        return
    large_enough = [
        other
        for other in standard(topology.chip.name)
        if search.least_bytes(config.settings, other) <= usable
    ]
    remedy = (
        f"by that arithmetic {large_enough[0]} is the smallest that could"
        if large_enough
        else f"nor on any slice of {topology.chip.name} that is offered"
    )
    raise PlanError(
        f"{config.where} can never fit {topology}: state and gradients alone, cut over "
        f"all {topology.num_devices:,} devices, take {least / _GIB:.2f} GiB of each, "
        f"{(least - usable) / _GIB:.2f} GiB more than the {usable / _GIB:.2f} it may "
        f"use; {remedy}. PARAM_DTYPE, MOMENT_DTYPE and OFFLOAD_OPTIMIZER make the "
        "state smaller"
    )


# ------------------------------------------------------------------ search and compile


def _searched(
    config: ResolvedConfig,
    topology: Topology,
    options: "PlanOptions",
    console: Console,
) -> tuple[ResolvedConfig, tuple["search.Candidate", ...], Compiled | Failure | None]:
    """The best that a search finds, compiled if that is asked for."""
    from launch.planning import search, tables

    found = search.search(config.settings, topology)
    if not found:
        nearest = search.smallest(config.settings, topology)
        larger = f"; {nearest[0]} is the smallest that does" if nearest else ""
        raise PlanError(
            f"no mesh and knobs of the search fit {config.where} on {topology} with "
            f"{1 - search.MARGIN:.0%} to spare, by arithmetic{larger}"
        )
    console.print(tables.candidates(found[:_SHOWN], topology))
    best = found[0]
    compiled: Compiled | Failure | None = None
    number = options.compile_best if topology.chip.kind == "tpu" else 0
    results = []
    for one in search.best_meshes(found, number if options.compile else 0):
        result = _compile(edit.reconfigured(config, one.knobs), topology, options)
        results.append((one, result))
        predicted = f"predicted {one.plan.total / _GIB:.2f}"
        words = f"compiled {search.told(one.knobs)}: {_in_short(result)}, {predicted}"
        console.print(words)
    fitting = [(o, r) for o, r in results if isinstance(r, Compiled) and r.fits]
    if fitting:
        best, compiled = fitting[0]
    elif results:
        best, compiled = results[0]
    chosen = edit.reconfigured(config, best.knobs)
    if options.output:
        text = search.hardware_text(config.where, topology, best, compiled)
        Path(options.output).write_text(text, encoding="utf-8")
        console.print(f"written: {options.output}")
    return chosen, found[:_SHOWN], compiled


def _compile(
    config: ResolvedConfig, topology: Topology, options: "PlanOptions"
) -> Compiled | Failure:
    from launch.terminal.lines import waiting

    with waiting(f"compiling for {topology}", quiet=options.quiet):
        return planned_compile.compile_step(
            config.operative,
            topology,
            time_limit_s=options.time_limit,
            memory_limit_bytes=int(options.memory_limit * _GIB),
            allow_module=options.allow_module,
        )


def _in_short(result: Compiled | Failure) -> str:
    """What came of compiling, in one line."""
    if isinstance(result, Failure):
        return f"{result.kind}: {result.message.splitlines()[0][:200]}"
    words = f"{result.most_bytes / _GIB:.2f} GiB"
    if isinstance(result.evaluation, Failure):
        words += f", without evaluation, {_in_short(result.evaluation)}"
    return words


def _words(failure: Failure) -> str:
    """What happened, how much was wanted, and what to do."""
    needed, available = failure.needed_bytes, failure.available_bytes
    size = ""
    if needed and available:
        size = (
            f" ({needed / _GIB:.2f} GiB of {available / _GIB:.2f}, "
            f"{(needed - available) / _GIB:.2f} too many)"
        )
    return f"{failure.message.strip()}{size}; {failure.advice}"
