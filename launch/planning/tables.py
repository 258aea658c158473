"""A plan as tables for a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.planning.compiler.records import Compiled, Evaluation, Failure
from launch.planning.cost.sensitivity import Case
from launch.planning.hardware.topologies import Topology
from launch.planning.plan import (
    GIB,
    Plan,
    rules_of_thumb,
    traffic_by_axis,
    what_shrinks,
)
from launch.planning.search import Candidate, told
from launch.terminal.lines import compact
from partitioning.settings import AXES

_LARGEST = 3  # buffers that are named
_NAMES = {
    "step_seconds": "step",
    "tokens_per_second": "tokens/s",
    "model_flops_utilization": "MFU",
    "days": "days",
    "chip_hours": "chip-hours",
    "energy": "energy",
    "emissions": "emissions",
    "cost": "cost",
}


def show(plan: Plan, console: Console) -> None:
    """Prints a plan."""
    for title, head, rows in sections(plan):
        _print(console, title, head, rows)
    for line in closing(plan):
        console.print(Text(line))


def sections(plan: Plan) -> Iterable[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Yields title, head and rows of every table, also for the page."""
    head: Sequence[str] = ("", "", "source")
    yield "The model and its run", head, counts(plan)
    yield "Memory of one device", ("", "GiB", "source"), held(plan)
    if isinstance(plan.compiled, Compiled):
        head = ("program", "arguments", "temporaries", "state beside it", "in all, GiB")
        more = ("lowered in", "compiled in", "source")
        yield "What was compiled", (*head, *more), programs(plan.compiled)
    yield "A step", ("part", "compute", "memory", "takes", "source"), parts(plan)
    head = ("axis", "least GiB sent", "compiled GiB", "ratio", "takes", "source")
    yield "What one device sends in a step", head, sent(plan)
    if isinstance(plan.compiled, Compiled):
        head = ("collective", "axes", "GiB", "times", "asked for in")
        yield "Collectives of the compiled step", head, collectives(plan.compiled)
        head = ("GiB", "value", "operation", "from", "smaller by")
        yield "Largest values", head, buffers(plan.compiled)
    if isinstance(plan.compiled, Failure) and plan.compiled.largest_buffers:
        head = ("GiB", "value", "operation", "from", "smaller by")
        yield "Largest values", head, buffers(plan.compiled)
    head = ("", "if all sending hides", "if none does", "source")
    yield "The run", head, run(plan)
    if plan.imbalance:
        head = ("load of the busiest", "capacity factor", "dropped there", "step")
        yield "If the router is uneven", head, cases(plan.imbalance)
        yield "With another capacity", head, cases(plan.capacities)


def counts(plan: Plan) -> list[Sequence[str]]:
    """Parameters, operations, tokens."""
    found = plan.counts
    step = plan.estimate.tokens
    rows: list[Sequence[str]] = [
        ("parameters", f"{found.total:,}", "exact"),
        ("of them active per token", f"{found.active:,}", "exact"),
        (
            "tokens",
            f"{compact(plan.tokens)} in {plan.estimate.steps:,} steps of {step:,}",
            "exact",
        ),
        (
            "FLOPs per token, of the model",
            f"{compact(found.train_flops_per_token)} to train: three forward passes",
            "exact",
        ),
        (
            "FLOPs per token, executed",
            f"{compact(plan.executed_flops_per_token)} with empty slots and what is "
            "computed again",
            "estimated",
        ),
    ]
    if plan.compiled_flops_per_token is not None:
        flops = compact(plan.compiled_flops_per_token)
        rows.append(("FLOPs per token, in products", flops, "compiled"))
    days = rules_of_thumb(plan)
    told_days = ", ".join(f"{days[name]:,.4g} {name}" for name in days)
    rows.append(("PF-days, three ways", told_days, "estimated"))
    for use, (transport, reason) in plan.transports.items():
        rows.append((f"transport in {use}", f"{transport}: {reason}", "exact"))
    if plan.drops is not None:
        dropped = f"{plan.drops:.1%} of choices, were all experts equally liked"
        rows.append(("expected drops", dropped, "estimated"))
    return rows


def held(plan: Plan) -> list[Sequence[str]]:
    """Memory by category, against what there is."""
    rows: list[Sequence[str]] = [
        (name, _gib(size), "estimated")
        for name, size in plan.memory.categories.items()
        if size >= 0.005 * GIB
    ]
    rows.append(
        (f"in all ({plan.memory.fullest})", _gib(plan.memory.total), "estimated")
    )
    if plan.memory.host:
        rows.append(("in the host's memory", _gib(plan.memory.host), "estimated"))
    if isinstance(plan.compiled, Compiled):
        found = plan.compiled
        for name, ours, size in (
            ("arguments", plan.memory.arguments, found.argument_bytes),
            ("in all", plan.memory.total, found.most_bytes),
        ):
            error = f"{name} (predicted {_gib(ours)}, {ours / size - 1:+.1%})"
            rows.append((error, _gib(size), "compiled"))
    chip = plan.topology.chip.name
    rows.append((f"usable on {chip}", _gib(plan.usable_bytes), "chips.py"))
    return rows


def programs(compiled: Compiled) -> list[Sequence[str]]:
    """Bytes and compile times of both programs, and why evaluation's has none."""
    rows: list[Sequence[str]] = [
        (
            "train step",
            _gib(compiled.argument_bytes),
            _gib(compiled.temp_bytes),
            "–",
            _gib(compiled.total_bytes),
            seconds(compiled.lowering_seconds),
            seconds(compiled.compiling_seconds),
            "compiled",
        )
    ]
    found = compiled.evaluation
    if isinstance(found, Evaluation):
        rows.append(
            (
                f"evaluation, {found.transport}" if found.transport else "evaluation",
                _gib(found.argument_bytes),
                _gib(found.temp_bytes),
                _gib(found.kept_bytes),
                _gib(found.total_bytes),
                seconds(found.lowering_seconds),
                seconds(found.compiling_seconds),
                "compiled",
            )
        )
    else:
        told = "not asked for" if found is None else f"after {seconds(found.seconds)}"
        kind = "not compiled" if found is None else found.kind.replace("_", " ")
        rows.append(("evaluation", *["–"] * 5, told, kind))
    return rows


def parts(plan: Plan) -> list[Sequence[str]]:
    """Seconds of each part by arithmetic and by memory."""
    rows: list[Sequence[str]] = [
        (
            part.name,
            seconds(part.compute_seconds),
            seconds(part.memory_seconds),
            seconds(part.seconds),
            "estimated",
        )
        for part in plan.estimate.parts
    ]
    total = plan.estimate
    rows.append(
        (
            "in all",
            seconds(total.compute_seconds),
            seconds(total.memory_seconds),
            seconds(total.device_seconds),
            "estimated",
        )
    )
    if isinstance(plan.compiled, Compiled):
        guess = plan.compiled.reported_seconds
        words = "unusable: negative" if guess is None else seconds(guess)
        rows.append(("XLA's own guess, loops once", "", "", words, "compiled"))
    return rows


def sent(plan: Plan) -> list[Sequence[str]]:
    """Bytes by axis."""
    return [
        (
            one.axis,
            _gib(one.least_bytes),
            "–" if one.compiled_bytes is None else _gib(one.compiled_bytes),
            "–" if one.ratio is None else f"{one.ratio:.3f}",
            seconds(one.seconds),
            plan.estimate.network_source,
        )
        for one in traffic_by_axis(plan)
    ]


def collectives(compiled: Compiled) -> list[Sequence[str]]:
    """Each kind of collective of the program, but for the smallest."""
    least = sum(one.bytes for one in compiled.collectives) / 1000
    return [
        (
            one.kind,
            " ".join(one.axes) or "others",
            _gib(one.bytes),
            f"{one.count:,}",
            one.source,
        )
        for one in compiled.collectives
        if one.bytes >= least
    ]


def buffers(found: Compiled | Failure) -> list[Sequence[str]]:
    """The largest values, and what would shrink them."""
    return [
        (
            _gib(one.bytes),
            one.shape,
            one.operation,
            one.source,
            what_shrinks(one.source, one.operation),
        )
        for one in found.largest_buffers[:_LARGEST]
    ]


def run(plan: Plan) -> list[Sequence[str]]:
    """Time, energy and cost by both bounds."""
    hidden, serial = plan.outcomes["overlapped"], plan.outcomes["serial"]
    rows: list[Sequence[str]] = []
    for name, figure in hidden.items():
        both = [_figure(name, one) for one in (figure.value, serial[name].value)]
        unit = f" ({figure.unit})" if name in ("energy", "emissions", "cost") else ""
        rows.append((_NAMES[name] + unit, *both, figure.source))
    return rows


def cases(found: Iterable[Case]) -> list[Sequence[str]]:
    """Steps of a sensitivity."""
    return [
        (
            f"{case.load:g} × the mean",
            f"{case.capacity_factor:g}",
            f"{case.dropped:.1%}",
            f"{seconds(case.estimate.overlapped_seconds)} to "
            f"{seconds(case.estimate.serial_seconds)}",
        )
        for case in found
    ]


def closing(plan: Plan) -> list[str]:
    """Whether it fits, what bounds it, and warnings."""
    lines = [f"warning: {one}" for one in plan.warnings]
    if plan.few_slots:
        lines.append(f"warning: {plan.few_slots}")
    share = {axis: getattr(plan.settings.mesh, axis) for axis in AXES}
    mesh = " × ".join(f"{axis} {n}" for axis, n in share.items() if n > 1)
    lines.append(
        f"{plan.topology}, {mesh or 'one device'}: bound by {plan.estimate.bound_by} "
        f"if all sending hides; products are taken to reach {attainable_words()}"
    )
    lines.append(verdict(plan))
    return lines


def attainable_words() -> str:
    """How much of the peak is counted on."""
    from launch.planning.cost.estimate import ATTAINABLE

    return f"{ATTAINABLE:.0%} of the peak"


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    if isinstance(plan.compiled, Compiled):
        total, by = plan.compiled.most_bytes, f"as compiled{_of_which(plan.compiled)}"
        if isinstance(plan.compiled.evaluation, Failure) and total <= plan.usable_bytes:
            return (
                f"cannot run: the train step takes {_gib(total)} of "
                f"{_gib(plan.usable_bytes)} GiB, as compiled, and evaluation did not "
                f"compile ({plan.compiled.evaluation.kind})"
            )
    elif plan.compiled is not None and plan.compiled.needed_bytes:
        total, by = plan.compiled.needed_bytes, "as the compiler says"
    else:
        total, by = plan.memory.total, "by arithmetic"
    usable = plan.usable_bytes
    if plan.fits:
        return f"fits: {_gib(total)} of {_gib(usable)} GiB, {by}"
    return (
        f"does not fit: {_gib(total)} of {_gib(usable)} GiB, {_gib(total - usable)} "
        f"too many, {by}; --search looks for a mesh and knobs that do"
    )


def _of_which(compiled: Compiled) -> str:
    """Which program the larger total is of."""
    if compiled.evaluation is None:
        return "; evaluation was not"
    if compiled.most_bytes > compiled.total_bytes:
        return ", in evaluation"
    return ", in training"


def candidates(found: Sequence[Candidate], topology: Topology) -> Table:
    """The best of a search."""
    table = Table(title=f"What fits {topology}, by arithmetic", title_justify="left")
    for name in ("step", "bound by", "GiB", "knobs"):
        table.add_column(name)
    for one in found:
        table.add_row(
            f"{seconds(one.estimate.overlapped_seconds)} to "
            f"{seconds(one.estimate.serial_seconds)}",
            one.estimate.bound_by,
            _gib(one.plan.total),
            told(one.knobs),
        )
    return table


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return "0" if not value else f"{value:.1e} s"


def _figure(name: str, value: float) -> str:
    if name == "step_seconds":
        return seconds(value)
    if name == "model_flops_utilization":
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _print(
    console: Console, title: str, head: Sequence[str], rows: list[Sequence[str]]
) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(head):
        numbers = place and all(row[place][:1] in "0123456789–" for row in rows)
        table.add_column(name, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
