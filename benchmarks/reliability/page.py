"""docs/reliability.md, of what was counted."""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.reliability.others import Killed
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


def text(
    tally: Tally,
    killed: Sequence[Killed],
    of_runs: Counter[tuple[str, str]],
    of_stores: Counter[tuple[str, str]],
) -> str:
    """Returns the page.

    Args:
        tally: what was injected into runs.
        killed: jobs and other commands that were killed.
        of_runs: outcomes of spoilt checkpoints, by way.
        of_stores: outcomes of spoilt token stores, by way.
    """
    checkpoints = [
        "## Checkpoints, spoilt file by file",
        "",
        "Each file of the newest checkpoint, each way; then the run went on as `train` "
        'does. "Same bits" are files that restoring does not read, and bytes in files '
        "that hold nothing.",
        *_table(of_runs),
    ]
    stores = [
        "## Token stores, spoilt file by file",
        "",
        "Each file, each way; then all was read that a run reads.",
        *_table(of_stores),
    ]
    parts = [_soak(tally), _killed(killed), checkpoints, stores]
    return "\n".join([_HEAD, *(line for part in parts for line in [*part, ""]), _TESTS])


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
        f"**{tally.runs - tally.lost:,} of {tally.runs:,} ended as it did; "
        f"lost: {tally.lost}.**",
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


def _killed(killed: Sequence[Killed]) -> list[str]:
    """Kills of jobs and of other commands than `train`."""
    return [
        "## Jobs and other commands, killed until they were done",
        "",
        "| fault | injected | what has to come of it | done | lost |",
        "|---|--:|---|--:|--:|",
        *(
            f"| {one.what} | {one.kills} | {one.outcome} | {one.finished} | "
            f"{one.lost} |"
            for one in killed
        ),
        *(f"- {one.what}: {wrong}" for one in killed for wrong in one.wrong),
    ]


def _table(spoilt: Counter[tuple[str, str]]) -> list[str]:
    """Outcomes across, ways down."""
    outcomes = sorted({outcome for _, outcome in spoilt})
    lines = [
        "",
        f"| way | spoilt | {' | '.join(outcomes)} |",
        f"|---|--:|{'--:|' * len(outcomes)}",
    ]
    for way in sorted({way for way, _ in spoilt}):
        numbers = [spoilt[way, outcome] for outcome in outcomes]
        cells = " | ".join(f"{n or ''}" for n in numbers)
        lines.append(f"| {way} | {sum(numbers)} | {cells} |")
    return lines


TESTED = (
    (
        "a burst of steps that are not finite",
        "skipped, then back to the last checkpoint, and that data passed over; never "
        "for ever",
        "test_recovery.py",
    ),
    (
        "a spike of the loss",
        "skipped or rolled back, by `SPIKE_ACTION`",
        "test_recovery.py",
    ),
    (
        "a device that computes wrong once",
        "found by `REPLAY_PERIOD`; nothing of it is saved",
        "test_recovery.py",
    ),
    (
        "a device that remembers wrong",
        "found by `COMPARE_REPLICAS`, named, and not saved",
        "test_recovery.py",
    ),
    (
        "one of two or four processes killed, or stopped longer than HEARTBEAT_TIMEOUT",
        "the others name it and end with 134; the same command goes on",
        "test_processes.py",
    ),
    (
        "SIGTERM or Ctrl-C while compiling, scoring, restoring or drawing",
        "heard at once; what is learnt is saved first",
        "test_resume.py",
    ),
    (
        "a run killed again and again under `--restarts`",
        "the same bits as one in peace",
        "test_restarts.py",
    ),
    (
        "a step that hangs",
        "stacks of all threads, and exit code 75",
        "test_watchdog.py",
    ),
    (
        "two runs in one folder, also without `flock`",
        "the second is refused by the name of the first; a dead owner is replaced",
        "test_owner.py",
    ),
    (
        "a full disk while saving",
        "one line; what was written of it is removed, those before stay",
        "test_checkpoints.py",
    ),
    (
        "a run killed while it uploads to a bucket, and before every write of one",
        "a checkpoint is whole or not there; another machine goes on to the same bits",
        "test_bucket.py",
    ),
    (
        "a bucket that is busy, late, silent, loses answers or cuts them off, or holds "
        "what was cut or changed",
        "tried again, or refused and gone round; never learnt from",
        "test_bucket.py",
    ),
    (
        "`prepare` killed a hundred times",
        "the same store, file by file",
        "test_preparing_again.py",
    ),
    (
        "torn and damaged records, foreign files, a report that fails",
        "said in a line; no run ends by it",
        "test_writers.py",
    ),
    (
        "damaged manifests, gin text, tokenizers and arrays, drawn at random",
        "read, or refused in a message",
        "test_fuzz.py",
    ),
)
_TESTS = "\n".join(
    [
        "## Proved by tests",
        "",
        "| fault | outcome | test |",
        "|---|---|---|",
        *(f"| {fault} | {outcome} | `{test}` |" for fault, outcome, test in TESTED),
        "",
    ]
)
