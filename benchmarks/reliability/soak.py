"""Runs that are killed, stopped and damaged at random instants until they are done."""

import contextlib
import dataclasses
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.reliability import compare, lives
from launch.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from launch.records import events, goodput

LAST_STEP = 40
# What a life was doing, by the last line that it said.
_DOING = {
    "compiling": "compiling",
    "resuming": "restoring",
    "initialising": "starting",
    "scoring": "evaluating",
    "finishing": "saving",
    "drawing": "drawing a sample",
    "writing": "writing the report",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        name: what the table calls it.
        weight: how often it is chosen, relative to others.
        inject: function of the life and the run's folder; returns exit codes that are
            right after it.
    """

    name: str
    weight: float
    inject: Callable[[lives.Life, Path, random.Random], set[int]]


@dataclasses.dataclass
class Tally:
    """What was injected, and what came of it.

    Attributes:
        undisturbed: folder of the run that was left in peace.
        faults: number by name, and by what the life was doing.
        runs: runs that were finished.
        lost: runs that did not end as the undisturbed one.
        wrong: what told these from it, or ended them.
        seconds: time of all lives.
        goodput: part of it in steps that were kept, of each run.
    """

    undisturbed: Path = Path()
    faults: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    runs: int = 0
    lost: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    goodput: list[float] = dataclasses.field(default_factory=list)

    @property
    def number(self) -> int:
        """How many faults were injected."""
        return sum(self.faults.values())


def _kill(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    life.signal(signal.SIGKILL)
    return {-signal.SIGKILL, 0}


def _terminate(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    life.signal(signal.SIGTERM)
    return {EXIT_PREEMPTED, -signal.SIGTERM, 0}


def _interrupt(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    life.signal(signal.SIGINT)
    return {EXIT_INTERRUPTED, -signal.SIGINT, 0}


def _interrupt_twice(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    life.signal(signal.SIGINT)
    time.sleep(rng.uniform(0, 0.05))
    return _interrupt(life, folder, rng)


def _pause(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    """Stops for a moment, as a machine that is moved does."""
    life.signal(signal.SIGSTOP)
    time.sleep(rng.uniform(0.05, 1.0))
    life.signal(signal.SIGCONT)
    return {0}


def _kill_and_damage(life: lives.Life, folder: Path, rng: random.Random) -> set[int]:
    """Kills, and spoils one file of the newest checkpoint while nobody looks.

    Only where there is an older one: a single copy cannot be had back.
    """
    right = _kill(life, folder, rng)
    life.end()
    steps = sorted(
        (p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    if len(steps) > 1:
        files = sorted(p for p in steps[-1].rglob("*") if p.is_file())
        spoilt = rng.choice(files)
        content = bytearray(spoilt.read_bytes())
        if content and rng.random() < 0.5:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            spoilt.write_bytes(content)
        else:
            spoilt.write_bytes(content[: len(content) // 2])
    return right


FAULTS = (
    Fault("kill -9", 6, _kill),
    Fault("SIGTERM", 1, _terminate),
    Fault("SIGINT", 1, _interrupt),
    Fault("SIGINT twice", 0.5, _interrupt_twice),
    Fault("SIGSTOP, then SIGCONT", 1, _pause),
    Fault("kill -9, and the newest checkpoint damaged", 1, _kill_and_damage),
)


def undisturbed(shared: Path, store: Path) -> tuple[Path, float]:
    """Makes the run that the others must equal; returns its folder, and its seconds."""
    folder, output = shared / "undisturbed", shared / "undisturbed.log"
    lives.fresh(folder)
    for _ in range(2):  # the second finds every program compiled
        lives.fresh(folder)
        life = lives.Life(lives.words_of(folder, store), output)
        code = life.end()
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}: see {output}")
    return folder, time.monotonic() - life.began


def soak(
    shared: Path,
    store: Path,
    *,
    seconds: float,
    least_faults: int,
    seed: int,
    say: Callable[[str], None],
) -> Tally:
    """Disturbs one run after the other, for so long, and until so many faults.

    Ctrl-C ends it sooner; the run that was under way does not count.

    Args:
        shared: folder for the runs.
        store: prepared tokens.
        seconds: time until which runs are begun.
        least_faults: number of faults until which runs are begun.
        seed: seed for the instants, and for what is injected.
        say: shows a line.
    """
    base, length = undisturbed(shared, store)
    tally, rng, began = Tally(base), random.Random(seed), time.monotonic()
    with contextlib.suppress(KeyboardInterrupt):  # what was counted until then counts
        while time.monotonic() - began < seconds or tally.number < least_faults:
            folder = lives.fresh(shared / "disturbed")
            found = list(_disturb(folder, store, length, rng, tally))
            if not found:
                found = compare.differences(folder, base, LAST_STEP)
            tally.runs += 1
            tally.goodput.append(
                goodput.fraction(goodput.of_events(events.read(folder)[0]))
            )
            if found:
                tally.lost += 1
                kept = shared / f"wrong_{tally.runs}"
                shutil.rmtree(kept, ignore_errors=True)
                folder.rename(kept)
                tally.wrong += [f"{text} (kept in {kept})" for text in found]
            say(
                f"run {tally.runs}: {tally.number} faults so far, "
                f"{tally.lost} lost, {time.monotonic() - began:.0f} s"
            )
    tally.seconds = time.monotonic() - began
    return tally


def _disturb(
    folder: Path, store: Path, length: float, rng: random.Random, tally: Tally
) -> Iterator[str]:
    """Starts the run again after each fault, until it is done; yields what is wrong."""
    output = folder.with_suffix(".log")
    words = [word for word in lives.words_of(folder, store) if word != "--quiet"]
    weights = [fault.weight for fault in FAULTS]
    for _ in range(200):
        output.unlink(missing_ok=True)
        life = lives.Life(words, output)
        try:
            right = {0}
            # Now and then a life is left in peace, or none would come to its end.
            if _moment_came(life, folder, output, length, rng):
                (fault,) = rng.choices(FAULTS, weights)
                tally.faults[fault.name, doing(folder, output)] += 1
                right |= fault.inject(life, folder, rng)
            code = life.end(120)
        except TimeoutError as error:
            yield str(error)
            return
        except KeyboardInterrupt:
            life.signal(signal.SIGKILL)
            raise
        if code not in right:
            yield f"exit code {code}, not one of {sorted(right)}"
            return
        if code == 0:
            return
    yield "it was not done after 200 lives"


def _moment_came(
    life: lives.Life, folder: Path, output: Path, length: float, rng: random.Random
) -> bool:
    """Waits for a random instant; False if the life ended before it came.

    A third of them are evenly spread over time, most of which goes into starting; a
    third over the steps, and a third over what a life says that it does at its end.
    """
    kind, moment = rng.randrange(3), rng.uniform(0, 1.3 * length)
    records = rng.randrange(1, LAST_STEP + 5)
    said = rng.choice(["scoring the", "drawing a", "writing the report", "finishing"])

    def came() -> bool:
        if kind == 0:
            return time.monotonic() - life.began >= moment
        if kind == 1:
            return _records(folder) >= records
        return output.exists() and said in output.read_text(errors="replace")

    while not came():
        if life.is_over():
            return False
        time.sleep(0.001)
    if kind:
        time.sleep(rng.uniform(0, 0.2))
    return not life.is_over()


def _records(folder: Path) -> int:
    """How many records of metrics there are."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def doing(folder: Path, output: Path) -> str:
    """Says what a life was doing, by its files and the last line of its output."""
    lines = output.read_text(errors="replace").split("\n") if output.exists() else []
    last = next((line.split()[0] for line in reversed(lines) if line.split()), "")
    if any((folder / "checkpoints").glob("*tmp*")):
        return "saving"
    if last == "compiling" and lines[-2:-1] and not lines[-2].endswith("..."):
        return "training"
    return _DOING.get(last, "starting")
