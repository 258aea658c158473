"""Memory, cores and open files of this machine, and what limits a process of it."""

import contextlib
import os
import resource
from collections.abc import Mapping
from pathlib import Path

from launch.doctor.line import Line, Verdict
from launch.terminal.lines import compact

_LEAST_BYTES, _LITTLE_BYTES = 1 << 30, 4 << 30
_FEWEST_FILES, _FEW_FILES = 256, 1024


def lines() -> list[Line]:
    """Returns what there is of each."""
    return [memory(), cores(), open_files()]


def memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Line:
    """Returns the memory of the machine, and how much of it a process may have."""
    table = _meminfo(proc / "meminfo")
    if "MemTotal" not in table:
        advice = "this system does not say how much there is: see that it suffices"
        return Line("host", "memory", "unknown", "note", advice)
    total = table["MemTotal"]
    value = f"{compact(total, 'B')}, {compact(_available(table), 'B')} free"
    limit, used = cgroup_memory(proc, groups)
    if limit is not None and limit < total:
        value += f"; limited to {compact(limit, 'B')}, {compact(used, 'B')} used"
    free = free_bytes(proc, groups)
    assert free is not None
    if free < _LEAST_BYTES:
        advice = "a run is likely to be killed: free some, or raise the limit"
        return Line("host", "memory", value, "problem", advice)
    if free < _LITTLE_BYTES:
        advice = "large models and compilers need more than this"
        return Line("host", "memory", value, "note", advice)
    return Line("host", "memory", value)


def free_bytes(
    proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Returns the memory that a process may still have; None if nobody says so."""
    table = _meminfo(proc / "meminfo")
    if "MemTotal" not in table:
        return None
    limit, used = cgroup_memory(proc, groups)
    free = _available(table)
    return free if limit is None else min(free, max(limit - used, 0))


def _available(table: Mapping[str, int]) -> int:
    return table.get("MemAvailable", table["MemTotal"])


def cgroup_memory(proc: Path, groups: Path) -> tuple[int | None, int]:
    """Returns the tightest limit of the groups of this process, and what they use."""
    tightest, used = None, 0
    for folder, limit_file, used_file in _groups(proc, groups):
        limit = _number(folder / limit_file)
        if limit is not None and (tightest is None or limit < tightest):
            tightest, used = limit, _number(folder / used_file) or 0
    return tightest, used


def _groups(proc: Path, groups: Path) -> list[tuple[Path, str, str]]:
    """The folders of the groups of this process, of both versions, and those above."""
    found = []
    text = ""
    with contextlib.suppress(OSError):
        text = (proc / "self" / "cgroup").read_text(encoding="utf-8")
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        inside = Path(path.strip("/"))
        if controllers == "":
            root, names = groups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be that outside; the root is then its own.
        found += [(root / above, *names) for above in (inside, *inside.parents)]
    return found


def cores() -> Line:
    """Returns the cores that a process may use."""
    there = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
    value = f"{usable}" if usable == there else f"{usable} of {there}"
    if usable == 1:
        advice = "reading data and taking steps share it: expect to wait for data"
        return Line("host", "cores", value, "note", advice)
    return Line("host", "cores", value)


def open_files() -> Line:
    """Returns how many files a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return Line("host", "open files", "no limit")
    most = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard}"
    value = f"{soft:,} at most, can be raised to {most}"
    if soft >= _FEW_FILES:
        return Line("host", "open files", value)
    verdict: Verdict = "problem" if soft < _FEWEST_FILES else "note"
    wanted = _FEW_FILES if hard == resource.RLIM_INFINITY else min(hard, _FEW_FILES)
    advice = f"checkpoints of large models open more: `ulimit -n {wanted}`"
    return Line("host", "open files", value, verdict, advice)


def _meminfo(path: Path) -> dict[str, int]:
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            number, *unit = [*rest.split(), ""]
            if number.isdecimal():
                found[name] = int(number) * (1024 if unit[:1] == ["kB"] else 1)
    return found


def _number(path: Path) -> int | None:
    """The number in a file of the system; None for "max", or where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text(encoding="utf-8"))
    return None
