"""Between the processes of a job: clocks, answers, and how much goes through."""

import dataclasses
import json
import time

from launch.doctor.line import Line, Verdict
from launch.job.end import WEEK_MILLISECONDS, client
from launch.job.together import together
from launch.terminal.lines import compact, duration, waiting

_ROUNDS = 20  # the fastest counts
_BYTES = 16 * 10**6  # that each process tells all others
_SKEW_SECONDS, _FAR_SKEW_SECONDS = 1.0, 60.0
_SLOW_ANSWER_SECONDS = 0.05
_SLOW_BYTES_PER_SECOND = 12.5e6  # of a network of 100 Mbit/s


@dataclasses.dataclass(frozen=True)
class Heard:
    """What process 0 heard from another one.

    Attributes:
        skew_seconds: its clock less that of process 0.
        answer_seconds: until a word had come back, at best.
    """

    skew_seconds: float
    answer_seconds: float


def measure(process: int, number: int, *, quiet: bool) -> list[Line]:
    """Measures with all processes; each must call this. Process 0 has the lines.

    Args:
        process: which of them this is.
        number: how many there are.
        quiet: whether no progress is shown.
    """
    together("the doctor asks")
    with waiting("asking the other processes", quiet=quiet):
        heard = {}
        for other in range(1, number):
            if process == 0:
                heard[other] = _ask(other)
            elif process == other:
                _answer(process)
        speed = _exchange()
    return [] if process else [*described(heard), _throughput(speed)]


def _ask(other: int) -> Heard:
    """Sends a word and hears a clock, several times; by way of the coordinator."""
    best = None
    for turn in range(_ROUNDS):
        sent = time.time()
        began = time.monotonic()
        client().key_value_set(f"switchyard/doctor/ask/{other}/{turn}", "?")
        key = f"switchyard/doctor/clock/{other}/{turn}"
        clock = float(client().blocking_key_value_get(key, WEEK_MILLISECONDS))
        took = time.monotonic() - began
        if best is None or took < best.answer_seconds:
            best = Heard(clock - (sent + took / 2), took)
    assert best is not None
    return best


def _answer(process: int) -> None:
    for turn in range(_ROUNDS):
        key = f"switchyard/doctor/ask/{process}/{turn}"
        client().blocking_key_value_get(key, WEEK_MILLISECONDS)
        client().key_value_set(
            f"switchyard/doctor/clock/{process}/{turn}", repr(time.time())
        )


def _exchange() -> float:
    """Bytes a second that a process takes in, as devices exchange arrays."""
    import numpy as np
    from jax.experimental import multihost_utils

    words = np.zeros(_BYTES // 4, np.float32)
    multihost_utils.process_allgather(words)  # compiled, and connected
    together("the doctor exchanges")
    began = time.monotonic()
    gathered = multihost_utils.process_allgather(words)
    return (gathered.nbytes - words.nbytes) / max(time.monotonic() - began, 1e-9)


def described(heard: dict[int, Heard]) -> list[Line]:
    """Returns the lines of clocks and answers."""
    far = max(heard, key=lambda other: abs(heard[other].skew_seconds))
    slow = max(heard, key=lambda other: heard[other].answer_seconds)
    skew, answer = heard[far].skew_seconds, heard[slow].answer_seconds
    # No clock is known better than within half of an answer.
    doubt = heard[far].answer_seconds / 2
    value = f"process {far} by {skew:+.3f} s, ± {doubt:.3f} s"
    line = Line("processes", "clocks", value)
    if abs(skew) - doubt > _SKEW_SECONDS:
        advice = "set the clocks by NTP: times in logs and records do not compare"
        verdict: Verdict = "note"
        if abs(skew) - doubt > _FAR_SKEW_SECONDS:
            advice, verdict = (
                "set the clocks by NTP: buckets refuse such times",
                "problem",
            )
        line = dataclasses.replace(line, verdict=verdict, remedy=advice)
    value = f"process {slow} after {duration(max(answer, 1e-3))} at best"
    if answer > _SLOW_ANSWER_SECONDS:
        advice = "every exchange waits that long: put the machines closer together"
        return [line, Line("processes", "answers", value, "note", advice)]
    return [line, Line("processes", "answers", value)]


def _throughput(speed: float) -> Line:
    value = f"{compact(speed, 'B')}/s into each process ({compact(_BYTES, 'B')} each)"
    if speed < _SLOW_BYTES_PER_SECOND:
        advice = "gradients and tokens cross it in every step: use a faster network"
        return Line("processes", "throughput", value, "note", advice)
    return Line("processes", "throughput", value)


def gathered(lines: list[Line], process: int, number: int) -> list[Line]:
    """Returns in process 0 what all say; what all say alike is there once.

    Args:
        lines: what this process says.
        process: which of them this is.
        number: how many there are.
    """
    key = "switchyard/doctor/lines"
    if process:
        text = json.dumps([dataclasses.asdict(line) for line in lines])
        client().key_value_set(f"{key}/{process}", text)
        return lines
    said = {line: [0] for line in lines}
    for other in range(1, number):
        text = client().blocking_key_value_get(f"{key}/{other}", WEEK_MILLISECONDS)
        for fields in json.loads(text):
            line = Line(**{**fields, "processes": ()})
            said.setdefault(line, []).append(other)
    names = list(dict.fromkeys((line.group, line.name) for line in said))
    groups = list(dict.fromkeys(group for group, _ in names))

    def place(item: tuple[Line, list[int]]) -> tuple[int, int]:
        line = item[0]
        return groups.index(line.group), names.index((line.group, line.name))

    return [
        line if len(by) == number else dataclasses.replace(line, processes=tuple(by))
        for line, by in sorted(said.items(), key=place)
    ]
