"""A plan as one HTML page that refers to nothing else."""

from launch.planning import tables
from launch.planning.plan import Plan
from launch.report import plan_figures
from launch.report.pages import Figure
from launch.report.pages import render as render_page
from launch.terminal.lines import compact


def render(plan: Plan) -> str:
    """Returns the page of a plan."""
    return render_page(
        "plan.html.jinja",
        title=f"Plan of {plan.config.where} on {plan.topology}",
        facts=_facts(plan),
        closing=tables.closing(plan),
        memory=Figure(
            plan_figures.memory(plan),
            "Memory of one device by what it is for; the line is what may be used",
            wide=True,
        ),
        bounds=[
            Figure(
                plan_figures.roofline(plan),
                "Each part of the work by operations per byte of memory: under the "
                "slope memory bounds it, under the level arithmetic",
            ),
            Figure(
                plan_figures.step(plan),
                "Where the time of a step goes, if nothing hides",
            ),
        ],
        tables=[section for section in tables.sections(plan) if section[2]],
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
