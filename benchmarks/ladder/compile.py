"""Compiles every published model of a billion parameters or more, one after another.

    python -m benchmarks.ladder.compile [--only NAME ...] [--force] [--page_only]

For each the smallest slice on which the compiler says that it fits. A row's result is
kept in benchmarks/ladder/results/NAME.json; rows whose configuration and program have
not changed are not compiled again. docs/ladder.md is made from those files.
"""

import argparse
import dataclasses
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.ladder import page
from benchmarks.ladder import rows as kept
from benchmarks.ladder.rows import (
    ATTEMPTS_PER_SLICE,
    MOST_SLICES,
    Attempt,
    Row,
    compile_seconds,
    fingerprint,
    load,
    read,
    save,
    slices_of,
)
from launch.config import edit
from launch.config.reader import ResolvedConfig
from launch.errors import EXIT_INTERRUPTED
from launch.planning import search
from launch.planning.compiler.compile import compile_step
from launch.planning.compiler.records import Compiled, Failure
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import Topology


def candidates(
    name: str, config: ResolvedConfig
) -> Iterator[tuple[Topology, search.Candidate]]:
    """Yields what to try: the best meshes of the smallest slices.

    On its slice, what fitted at last is tried first: a search that is by now more
    careful by a hair loses nothing.
    """
    slices, known = 0, load(name)
    for other in slices_of(name):
        before = []
        if known is not None and known.compiled and str(other) == str(known.topology):
            chosen = known.attempts[-1].knobs
            before.append(search.candidate(config.settings, other, chosen))
        found = search.search(config.settings, other)
        best = search.best_meshes(found, ATTEMPTS_PER_SLICE)
        tried = {search.told(one.knobs): one for one in (*before, *best)}
        for one in tried.values():
            yield other, one
        slices += bool(tried)
        if slices == MOST_SLICES:
            return


def climb(name: str, parameters: int, *, time_limit_s: float, memory_gib: float) -> Row:
    """Compiles a row until something fits."""
    config = read(name)
    current = fingerprint(config)  # of what is compiled, should a file change meanwhile
    moved = moving.moved(config, slices_of(name)[0])
    attempts: list[Attempt] = []
    compiled = None
    for place, one in candidates(name, moved):
        told = search.told(one.knobs)
        print(f"{name}: {place} {told}", flush=True)
        result = compile_step(
            edit.reconfigured(moved, one.knobs).operative,
            place,
            time_limit_s=time_limit_s,
            memory_limit_bytes=int(memory_gib * 2**30),
        )
        attempts.append(_attempt(place, one.knobs, result))
        print(f"  {attempts[-1].kind}: {attempts[-1].message[:300]}", flush=True)
        if isinstance(result, Compiled):
            print(_beside(one, result), flush=True)
            for words in () if result.fits else attempts[-1].largest:
                print(f"    {words}", flush=True)
            if result.fits:
                compiled = dataclasses.replace(
                    result, collectives=result.collectives[:60]
                )
                break
        if attempts[-1].kind in ("timed_out", "killed", "no_compiler"):
            break
    return Row(name, parameters, current, tuple(attempts), compiled)


def _attempt(
    topology: Topology, chosen: Mapping[str, Any], result: Compiled | Failure
) -> Attempt:
    needed: int | None
    if isinstance(result, Compiled):
        seconds = compile_seconds(result)
        kind = "fits" if result.fits else "too_large"
        message, needed = "", result.most_bytes
        if isinstance(failure := result.evaluation, Failure):
            kind, message = failure.kind, f"evaluation: {failure.message}"[:500]
    else:
        seconds, kind = result.seconds, result.kind
        message, needed = result.message[:500], result.needed_bytes
    return Attempt(
        str(topology),
        dict(chosen),
        kind,
        message,
        needed,
        seconds,
        result.peak_host_bytes,
        tuple(
            f"{one.bytes / 2**30:.2f} GiB {one.shape} {one.operation} {one.source}"
            for one in result.largest_buffers
        ),
    )


def _beside(one: search.Candidate, result: Compiled) -> str:
    gib = 2**30
    return (
        f"  arguments {result.argument_bytes / gib:.2f} GiB, predicted "
        f"{one.plan.arguments / gib:.2f}; total {result.total_bytes / gib:.2f}, "
        f"predicted {one.plan.total / gib:.2f} ({one.plan.fullest}); "
        f"compiled in {result.compiling_seconds:.0f} s, lowered in "
        f"{result.lowering_seconds:.0f} s{_evaluation_beside(result)}"
    )


def _evaluation_beside(result: Compiled) -> str:
    found = result.evaluation
    if found is None:
        return ""
    if isinstance(found, Failure):
        return f"; evaluation {found.kind} after {found.seconds:.0f} s"
    return (
        f"; evaluation ({found.transport or 'dense'}) {found.total_bytes / 2**30:.2f}, "
        f"compiled in {found.compiling_seconds:.0f} s, lowered in "
        f"{found.lowering_seconds:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what has changed, and writes the page after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--force", action="store_true", help="compile again")
    parser.add_argument("--page_only", action="store_true", help="compile nothing")
    parser.add_argument("--time_limit", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--memory_limit", type=float, default=12, metavar="GIB")
    options = parser.parse_args(argv)
    # So that the compiler's process ends with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))
    todo = [] if options.page_only else kept.rows()
    if options.only:
        by_name = dict(todo)
        unknown = sorted(set(options.only) - set(by_name))
        if unknown:
            parser.error(f"{', '.join(unknown)}: rows are {', '.join(by_name)}")
        todo = [(name, by_name[name]) for name in options.only]
    for name, parameters in todo:
        before = load(name)
        current = fingerprint(read(name))
        if before and before.fingerprint == current and not options.force:
            print(f"{name}: unchanged", flush=True)
            continue
        start = time.monotonic()
        row = climb(
            name,
            parameters,
            time_limit_s=options.time_limit,
            memory_gib=options.memory_limit,
        )
        save(row)
        page.write()
        outcome = row.attempts[-1].kind if row.attempts else "nothing fits"
        print(f"{name}: {outcome}, {time.monotonic() - start:.0f} s", flush=True)
    page.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
