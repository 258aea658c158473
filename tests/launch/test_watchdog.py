"""A step that hangs ends the run; nothing else that takes long does."""

import bdb
import re
import subprocess
import sys
import threading
import time
import types

import pytest
from commands import ROOT

from launch.config import reader
from launch.errors import EXIT_STALLED, ConfigError
from launch.job import end, watchdog
from launch.job.watchdog import NEVER, Patience, Watchdog, is_debugged

pytestmark = pytest.mark.fast

TICK = 0.01


@pytest.fixture
def codes(monkeypatch, capfd) -> list[int]:
    """What the process would have ended with."""
    found = []
    monkeypatch.setattr(end, "leave", found.append)
    return found


def test_a_step_that_hangs_ends_the_run_and_shows_every_thread(codes, capfd):
    with Watchdog(5 * TICK, TICK) as dog:
        dog._thread.join(timeout=5)
    assert codes == [EXIT_STALLED]
    said = capfd.readouterr().err
    assert "(STEP_TIMEOUT); the same command goes on" in said
    assert "test_a_step_that_hangs_ends_the_run" in said, "the stack of this thread"


def test_neither_steps_nor_pauses_count(codes):
    with Watchdog(20 * TICK, TICK) as dog:
        for _ in range(10):
            time.sleep(5 * TICK)
            dog.step_is_done()
        with dog.paused(), dog.paused():
            time.sleep(40 * TICK)
        assert dog.not_counting(lambda: time.sleep(40 * TICK)) is not None
        dog.not_counting(lambda: time.sleep(40 * TICK))()
    assert codes == []


def test_it_can_be_turned_off(codes):
    with Watchdog(NEVER, TICK) as dog:
        time.sleep(3 * TICK)
        assert not dog._thread.is_alive()
    assert codes == []


def test_a_clock_that_jumps_counts_no_more_than_two_ticks(codes, monkeypatch):
    jumps = iter([0.0, 1e6, 2e6, 3e6, *[3e6] * 10_000])
    clock = types.SimpleNamespace(monotonic=lambda: next(jumps))
    monkeypatch.setattr(watchdog, "time", clock)
    with Watchdog(10 * TICK, TICK) as dog:
        threading.Event().wait(20 * TICK)
        assert dog._patience.waited_seconds == pytest.approx(3 * 2 * TICK)
    assert codes == []


def test_the_time_that_a_step_may_take_follows_from_those_before():
    patience = Patience(0)
    assert patience.limit_seconds == 1800, "half an hour, until one is known"
    for seconds in (100, 100, 10_000):
        assert not patience.wait(seconds) or seconds > 1800
        patience.step_is_done()
    assert patience.limit_seconds == 50 * 100, "one step of 10,000 s is no rule"
    assert Patience(60).limit_seconds == 60


def test_a_debugger_of_python_stops_the_watch():
    assert not is_debugged()

    class Debugger(bdb.Bdb):
        def user_line(self, frame):
            self.found = is_debugged()
            self.set_quit()

    debugger = Debugger()
    debugger.run("1 + 1")
    assert debugger.found


def test_a_debugger_of_the_system_stops_the_watch():
    """As of gdb, strace or py-spy: a parent that traces its child."""
    program = (
        "import ctypes, os, sys\n"
        "from launch.job.watchdog import is_debugged\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    ctypes.CDLL(None).ptrace(0, 0, 0, 0)\n"
        "    os._exit(is_debugged())\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1", done.stderr


def test_durations_are_taken_from_clocks_that_nobody_sets():
    """`time.time` jumps where somebody sets the clock: it only stamps."""
    found = {
        str(file.relative_to(ROOT))
        for folder in ("launch", "tasks", "moe", "partitioning")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.(now|today)", file.read_text())
    }
    stamps = {"launch/records/write.py"}  # of TensorBoard
    assert found <= stamps | {"launch/doctor/network.py"}, "which compares clocks"


@pytest.mark.parametrize("macro", ["STEP_TIMEOUT", "GRACE_SECONDS"])
def test_a_time_that_is_none_is_refused(macro):
    with pytest.raises(ConfigError, match=rf"{macro} = -2(\.0)?: "):
        reader.read(["runs/tiny.gin"], [f"{macro}=-2"])
    reader.read(["runs/tiny.gin"], ["STEP_TIMEOUT=-1", "GRACE_SECONDS=90"])
