"""A plan as one HTML page that refers to nothing else."""

import html
import importlib.resources
import string

from launch.planning import tables
from launch.planning.plan import Plan
from launch.report import page_parts, plan_figures
from launch.terminal.lines import compact

_FOOTER = """<footer>Written by <code>switchyard plan</code>. What is estimated is
arithmetic, what is compiled was said by the compiler for chips that are not there;
nothing here was measured.</footer>"""


def render(plan: Plan) -> str:
    """Returns the page of a plan."""
    memory = page_parts.figure_of(
        plan_figures.memory(plan),
        "Memory of one device by what it is for; the line is what may be used",
        wide=True,
    )
    roofline = page_parts.figure_of(
        plan_figures.roofline(plan),
        "Each part of the work by operations per byte of memory: under the slope "
        "memory bounds it, under the level arithmetic",
    )
    step = page_parts.figure_of(
        plan_figures.step(plan), "Where the time of a step goes, if nothing hides"
    )
    figures = (
        page_parts.section("Does it fit?", memory),
        page_parts.section(
            "What bounds it?", f'<div class="pair">{roofline}{step}</div>'
        ),
    )
    shown = [
        page_parts.section(title, page_parts.table(head, rows))
        for title, head, rows in tables.sections(plan)
        if rows
    ]
    closing = "".join(f"<p>{html.escape(line)}</p>" for line in tables.closing(plan))
    sections = [page_parts.section("In short", closing), *figures, *shown]
    # The template of a run's report, but for its footer.
    template = importlib.resources.files("launch.report").joinpath("templates/run.html")
    head, _, rest = template.read_text(encoding="utf-8").partition("<footer>")
    frame = head + _FOOTER + rest.partition("</footer>")[2]
    title = f"Plan of {plan.config.where} on {plan.topology}"
    return string.Template(frame).substitute(
        title=html.escape(title),
        facts=page_parts.facts(_facts(plan)),
        sections="\n".join(sections),
    )


def _facts(plan: Plan) -> list[tuple[str, str]]:
    hidden, serial = plan.outcomes["overlapped"], plan.outcomes["serial"]
    days = sorted(one["days"].value for one in (hidden, serial))
    energy = sorted(one["energy"].value for one in (hidden, serial))
    rate = sorted(one["model_flops_utilization"].value for one in (hidden, serial))
    return [
        (
            "parameters",
            f"{compact(plan.counts.total)}, {compact(plan.counts.active)} active",
        ),
        ("chips", f"{plan.topology.num_chips:,} {plan.topology.chip.name}"),
        ("fits", "yes" if plan.fits else "no"),
        ("days, estimated", f"{days[0]:,.3g} to {days[1]:,.3g}"),
        ("MFU, estimated", f"{rate[0]:.0%} to {rate[1]:.0%}"),
        ("MWh, estimated", f"{energy[0]:,.3g} to {energy[1]:,.3g}"),
    ]
