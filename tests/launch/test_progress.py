import io
import logging

import numpy as np
import pytest
from rich.console import Console

from launch.terminal.lines import compact, duration, waiting
from launch.terminal.preparing import preparing
from launch.terminal.training import Extreme, TrainProgress, load_extremes
from tasks.prepare import Progress

pytestmark = pytest.mark.fast

SPARSE = {
    "step": 100,
    "split": "train",
    "loss/nats_per_token": 2.34567,
    "perf/tokens_per_second": 61_234.0,
    "perf/step_seconds": 0.5,
    "perf/data_wait_seconds": 0.01,
    "router/dropped_fraction": 0.0123,
    "router/load": [[0.25] * 4, [0.45, 0.05, 0.25, 0.25]],
}
DENSE = {name: value for name, value in SPARSE.items() if "router" not in name}
HELDOUT = {
    "step": 100,
    "split": "heldout",
    "loss/nats_per_token": 2.5,
    "loss/bits_per_byte": 1.75,
    "tokens": 12_345,
}


class _Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def _plain_console(encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    return Console(file=file, width=80, force_terminal=False)


def _printed(console):
    console.file.flush()
    return console.file.buffer.getvalue().decode(console.encoding).splitlines()


def _terminal(width=80):
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, _environ={"TERM": "xterm"}
    )


def _display(shown, width=80):
    """The live display as lines of text, without its colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(shown)
    return console.file.getvalue().splitlines()


def test_the_most_and_least_loaded_experts_are_relative_to_their_layers_mean():
    # Layer 0 has mean 0.25, layer 1 mean 2: 0.3/0.25 = 1.2, 5/2 = 2.5; 1/2 = 0.5.
    most, least = load_extremes([[0.2, 0.3, 0.25, 0.25], [1.0, 5.0, 1.0, 1.0]])
    assert most == Extreme(layer=1, expert=1, relative=2.5)
    assert least == Extreme(layer=1, expert=0, relative=0.5)
    assert str(most) == "L1·e1 2.5×"


def test_extremes_leave_out_layers_without_a_finite_load():
    nan = float("nan")
    found = load_extremes([[nan, 1.0], [0.0, 0.0], [nan, nan], [1.0, 3.0]])
    assert found == (Extreme(3, 1, 1.5), Extreme(3, 0, 0.5))
    # Layer 0 has two experts of mean 1, layer 1 three of mean 2: 1.5/1, 0.5/2.
    found = load_extremes([[0.5, 1.5, nan], [2.5, 0.5, 3.0]])
    assert found == (Extreme(0, 1, 1.5), Extreme(1, 1, 0.25))
    assert load_extremes([[0.0, 0.0]]) is None
    assert load_extremes([]) is None
    assert load_extremes(np.full((1, 4), 0.25))[0].relative == 1.0


def test_extremes_are_looked_for_once_a_record_however_often_they_are_drawn(
    monkeypatch,
):
    asked = []
    monkeypatch.setattr(
        "launch.terminal.training.load_extremes",
        lambda load, original=load_extremes: asked.append(1) or original(load),
    )
    shown = TrainProgress(1000, quiet=True, clock=_Clock())
    for step in (1, 2):
        shown.update({**SPARSE, "step": step})
        for _ in range(3):
            assert "most L1·e0 1.8×" in shown.plain_line()
    assert len(asked) == 2


def test_a_plain_line_contains_the_quantities():
    console = _plain_console()
    with TrainProgress(1000, console=console, clock=_Clock()) as shown:
        shown.update(SPARSE)
    (line,) = _printed(console)
    for part in (
        "step 100/1,000",
        "loss 2.3457 nats/token",
        "61.2k tokens/s",
        "dropped 1.2 %",
        "most L1·e0 1.8×",
        "least L1·e1 0.2×",
        "data wait 2.0 %",
        "7 min 30 s left",  # 900 steps of 0.5 s
    ):
        assert part in line


def test_plain_lines_come_at_the_first_step_every_ten_seconds_and_at_the_last():
    console, clock = _plain_console(), _Clock()
    with TrainProgress(10, console=console, clock=clock) as shown:
        for step in range(1, 11):
            shown.update({**DENSE, "step": step})
            clock.now += 4
    steps = [line.split("/")[0] for line in _printed(console)]
    # Seconds 0, 12 and 24 are 10 s or more after the line before; 36 is the last.
    assert steps == ["step 1", "step 4", "step 7", "step 10"]


def test_time_left_follows_the_clock_and_leaves_out_the_first_record():
    clock = _Clock()
    shown = TrainProgress(1000, quiet=True, clock=clock)
    clock.now += 60  # compiling
    shown.update({**DENSE, "step": 100})
    clock.now += 20
    shown.update({**DENSE, "step": 200})
    # 100 steps in 20 s, 800 to go: 160 s.
    assert "2 min 40 s left" in shown.plain_line()
    clock.now += 10
    assert "2 min 30 s left" in shown.plain_line()


@pytest.mark.parametrize(("record", "lines"), [(SPARSE, 3), (DENSE, 2)])
def test_the_live_display_fits_eighty_columns(record, lines):
    large = {
        **record,
        "loss/nats_per_token": 12.34567,
        "perf/data_wait_seconds": 0.0617,
        "router/load": [[1e-9] * 255 + [1.0]] * 48 if "router/load" in record else [],
        "step": 1_234_000,
    }
    shown = TrainProgress(9_999_000, quiet=True, clock=_Clock())
    shown.update(large)
    shown.update({**HELDOUT, "loss/nats_per_token": 12.5})
    display = _display(shown)
    assert len(display) == lines
    assert max(map(len, display)) <= 80
    text = "\n".join(display)
    assert "step 1,234,000 / 9,999,000" in text
    assert "loss 12.3457 nats/token" in text
    assert "held-out 12.5000" in text
    assert "data wait 12.3 %" in text  # the last of its line: nothing was cut
    assert ("most L0·e255" in text) == (lines == 3)


def test_a_narrow_terminal_loses_the_least_important_parts_only():
    shown = TrainProgress(1000, quiet=True, clock=_Clock())
    shown.update(SPARSE)
    display = _display(shown, width=44)
    assert max(map(len, display)) <= 44
    assert "loss 2.3457 nats/token" in display[1]
    assert "data wait" not in display[1]


def test_skipped_steps_are_shown():
    shown = TrainProgress(1000, quiet=True, clock=_Clock())
    shown.update({**DENSE, "state/skipped_steps": 0})
    assert "skipped" not in shown.plain_line()
    shown.update({**DENSE, "state/skipped_steps": 3})
    assert "3 steps skipped" in shown.plain_line()


def test_spills_and_steps_taken_again_are_shown():
    shown = TrainProgress(1000, quiet=True, clock=_Clock())
    shown.update({**DENSE, "perf/steps_taken_again": 0})
    assert "again" not in shown.plain_line()
    shown.update(
        {**DENSE, "perf/steps_taken_again": 3, "router/spilled_fraction": 0.05}
    )
    assert "3 steps taken again  spilled 5.0 %" in shown.plain_line()


def test_non_finite_numbers_are_shown_as_such():
    shown = TrainProgress(1000, quiet=True, clock=_Clock())
    shown.update(
        {name: float("nan") for name in SPARSE}
        | {"step": 5, "split": "train"}
        | {"router/load": [[float("nan")] * 4]}
    )
    assert "loss nan" in shown.plain_line()
    assert "loss nan" in _display(shown)[1]


def test_a_held_out_evaluation_is_always_said():
    console = _plain_console()
    with TrainProgress(1000, console=console, clock=_Clock()) as shown:
        shown.update(SPARSE)
        shown.update(HELDOUT)
    assert _printed(console)[1] == (
        "step 100  held-out 2.5000 nats/token  1.7500 bits/byte  over 12,345 tokens"
    )


def test_quiet_says_nothing():
    console = _plain_console()
    with TrainProgress(1000, quiet=True, console=console) as shown:
        shown.update(SPARSE)
        shown.update(HELDOUT)
        with shown.waiting("saving"):
            pass
    with waiting("compiling", quiet=True, console=console):
        pass
    with preparing(quiet=True, console=console) as callback:
        callback(_prepared(1))
    assert _printed(console) == []


def test_a_console_without_these_characters_gets_others():
    console = _plain_console(encoding="ascii")
    with TrainProgress(1000, console=console, clock=_Clock()) as shown:
        shown.update(SPARSE)
    assert "most L1.e0 1.8x" in _printed(console)[0]


def test_waiting_says_how_long_it_took():
    console, clock = _plain_console(), _Clock()
    with waiting("compiling the train step", console=console, clock=clock):
        clock.now += 12.34
    assert _printed(console) == [
        "compiling the train step ...",
        "compiling the train step: 12.3 s",
    ]


def test_waiting_says_when_it_was_stopped():
    console, clock = _plain_console(), _Clock()

    def fail():
        with waiting("compiling", console=console, clock=clock):
            clock.now += 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert _printed(console)[1] == "compiling: stopped after 3.0 s"


def _prepared(documents, phase="train"):
    return Progress(phase, documents, documents * 300, documents * 1000)


def test_preparing_shows_totals_and_rate_per_split():
    console, clock = _plain_console(), _Clock()
    with preparing(console=console, clock=clock) as callback:
        callback(_prepared(1000))
        clock.now += 10
        callback(_prepared(5000))
        clock.now += 10
        callback(_prepared(50, "test"))
        clock.now += 2
    assert _printed(console) == [
        "preparing train: 5,000 documents · 1.50M tokens · 5.00 MB · 500 kB/s",
        "preparing train: 5,000 documents · 1.50M tokens · 5.00 MB · 250 kB/s · 20.0 s",
        "preparing test: 50 documents · 15.0k tokens · 50.0 kB · 25.0 kB/s · 2.0 s",
    ]


def test_preparing_takes_phases_that_count_less():
    console, clock = _plain_console(), _Clock()
    with preparing(console=console, clock=clock) as callback:
        callback(Progress("vocabulary", documents=7, text_bytes=2000))
        clock.now += 4
        callback(Progress("baselines"))
        clock.now += 3
    assert _printed(console) == [
        "preparing vocabulary: 7 documents · 2.00 kB · 500 B/s · 4.0 s",
        "preparing baselines · 3.0 s",
    ]


def test_log_lines_are_led_around_the_live_display(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    handler = logging.StreamHandler()  # holds the stream of this moment
    logger = logging.getLogger("test_progress")
    logger.addHandler(handler)
    console = _terminal()
    try:
        with TrainProgress(1000, console=console, clock=_Clock()) as shown:
            shown.update(SPARSE)
            logger.warning("a line of the log")
            assert handler.stream is not stderr
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    assert handler.stream is stderr
    assert stderr.getvalue() == "after\n"
    assert "a line of the log" in console.file.getvalue()
    assert "loss" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0421, "42 ms"),
        (0.9999, "1.0 s"),
        (59.96, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600 * 5 + 61, "5 h 01 min"),
        (86400 * 2 + 3600 * 4, "2 d 04 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("number", "unit", "words"),
    [
        (987, "", "987"),
        (999.9, "", "1.00k"),
        (61_234, "", "61.2k"),
        (1_234_567, "", "1.23M"),
        (987, "B", "987 B"),
        (12_100_000, "B", "12.1 MB"),
        (float("nan"), "", "nan"),
    ],
)
def test_counts_have_three_digits(number, unit, words):
    assert compact(number, unit) == words
