"""docs/reliability.md, of what was counted."""

import statistics
from collections import Counter
from pathlib import Path

from benchmarks.reliability.soak import Tally
from launch.terminal.lines import duration

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"

_HEAD = """\
# Reliability

**Kill any process at any instant, on any mesh, and the run continues bit for bit as if
nothing had happened (same kind of machine and versions); continue on another mesh or
another number of processes and it continues up to rounding; damage a checkpoint or a
store, and you are told exactly what is damaged and what is used instead.**

How that is done is said in [checkpoints.md](checkpoints.md),
[processes.md](processes.md) and [data.md](data.md). Here is what was injected, for
real, and what came of it.
`python -m benchmarks.reliability` injects it again and writes this page; `make test`
injects a few of each kind, `make test-all` more.
"""


def text(tally: Tally, spoilt: Counter[tuple[str, str]]) -> str:
    """Returns the page."""
    return "\n".join([_HEAD, *_soak(tally), "", *_stores(spoilt), "", _ELSEWHERE])


def _soak(tally: Tally) -> list[str]:
    """Faults of runs, by kind and by what the run was doing."""
    phases = sorted({phase for _, phase in tally.faults})
    names = sorted({name for name, _ in tally.faults})
    every = tally.seconds / max(tally.number, 1)
    lines = [
        "## Runs, disturbed until they were done",
        "",
        f"{tally.number:,} faults in {tally.runs:,} runs of 40 steps, in "
        f"{duration(tally.seconds)}: one every {every:.1f} s. Each run was compared "
        "with one that was left in peace: every bit of parameters, optimizer and "
        "counters, the order of the data, and every record of metrics. "
        f"**{tally.runs - len(tally.wrong):,} of {tally.runs:,} ended as it did; "
        f"lost: {len(tally.wrong)}.**",
        "",
        f"| fault | injected | {' | '.join(phases)} |",
        f"|---|--:|{'--:|' * len(phases)}",
    ]
    for name in names:
        numbers = [tally.faults[name, phase] for phase in phases]
        cells = " | ".join(f"{n or ''}" for n in numbers)
        lines.append(f"| {name} | {sum(numbers)} | {cells} |")
    numbers = [sum(tally.faults[n, phase] for n in names) for phase in phases]
    lines.append(f"| all | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    if tally.goodput:
        lines += [
            "",
            "Goodput, the part of all time in steps that were kept, was "
            f"{100 * statistics.median(tally.goodput):.0f} % at the median: a life of "
            "seconds is mostly a start.",
        ]
    return lines + [f"- {wrong}" for wrong in tally.wrong]


def _stores(spoilt: Counter[tuple[str, str]]) -> list[str]:
    """Outcomes of spoilt stores."""
    outcomes = sorted({outcome for _, outcome in spoilt})
    lines = [
        "## Token stores, spoilt file by file",
        "",
        "Each file, each way; then all was read that a run reads.",
        "",
        f"| way | spoilt | {' | '.join(outcomes)} |",
        f"|---|--:|{'--:|' * len(outcomes)}",
    ]
    for way in sorted({way for way, _ in spoilt}):
        numbers = [spoilt[way, outcome] for outcome in outcomes]
        cells = " | ".join(f"{n or ''}" for n in numbers)
        lines.append(f"| {way} | {sum(numbers)} | {cells} |")
    return lines


_TESTED = (
    (
        "a burst of steps that are not finite",
        "skipped, then back to the last checkpoint, and that data passed over; never "
        "for ever",
        "tests/launch/test_recovery.py",
    ),
    (
        "a spike of the loss",
        "skipped or rolled back, by `SPIKE_ACTION`",
        "tests/launch/test_recovery.py",
    ),
    (
        "a device that computes wrong once",
        "found by `REPLAY_PERIOD`; nothing of it is saved",
        "tests/launch/test_recovery.py",
    ),
    (
        "a device that remembers wrong",
        "found by `COMPARE_REPLICAS`, named, and not saved",
        "tests/launch/test_recovery.py",
    ),
)
_ELSEWHERE = "\n".join(
    [
        "## Proved by tests",
        "",
        "| fault | outcome | test |",
        "|---|---|---|",
        *(f"| {fault} | {outcome} | `{test}` |" for fault, outcome, test in _TESTED),
        "",
    ]
)
