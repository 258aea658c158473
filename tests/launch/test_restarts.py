"""A run that dies is started again, and learns what it would have learnt anyway."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from test_processes import start, words_of
from test_resume import assert_ended_alike

from launch.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_LOST_PROCESS,
    EXIT_NON_FINITE,
    EXIT_PREEMPTED,
    EXIT_STALLED,
    EXIT_USER_ERROR,
)
from launch.job import restarts
from launch.job.restarts import Deaths, Supervisor
from launch.records.read import read_metrics

# Kills itself, as the kernel does when memory is short, before it reads a batch for the
# first time; each life has its own.
KILLED = """
import os, pathlib, signal, sys, time
from launch import cli
from tasks.batches import Batches

def read(batches, index, start, stop, original=Batches.read):
    mark = pathlib.Path(os.environ["MARKS"], str(index))
    if str(index) in os.environ["KILLED_AT"].split() and not mark.exists():
        mark.touch()
        while not os.path.exists(os.environ["SAVED"]):  # saving goes on beside steps
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(batches, index, start, stop)

Batches.read = read
sys.exit(cli.main())
"""


@pytest.fixture
def lives(tmp_path, monkeypatch):
    """Runs a supervisor whose children end with given codes, and may save before."""
    monkeypatch.setattr(restarts.time, "sleep", lambda seconds: None)

    def run(number: int, *ends: str) -> tuple[int, int]:
        program = (
            "import os, pathlib, sys\n"
            f"folder, ends = pathlib.Path({str(tmp_path)!r}), {ends!r}\n"
            "life = len(list(folder.glob('life*')))\n"
            "(folder / f'life{life}').touch()\n"
            "code, _, step = ends[life].partition(' ')\n"
            "if step: (folder / 'checkpoints' / step).mkdir(parents=True)\n"
            "if int(code) < 0: os.kill(os.getpid(), -int(code))\n"
            "sys.exit(int(code))\n"
        )
        command = [sys.executable, "-S", "-c", program]
        code = Supervisor(command, tmp_path, number).run()
        return code, len(list(tmp_path.glob("life*")))

    return run


@pytest.mark.parametrize(
    "code",
    [EXIT_FAULT, EXIT_LOST_PROCESS, EXIT_STALLED, -signal.SIGKILL, -signal.SIGSEGV],
)
def test_what_may_be_restarted_is(lives, code):
    assert lives(1, f"{code}", "0") == (EXIT_DONE, 2)


@pytest.mark.parametrize(
    "code",
    [EXIT_DONE, EXIT_USER_ERROR, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_INTERRUPTED],
)
def test_what_may_not_be_restarted_is_passed_on(lives, code):
    assert lives(3, f"{code}", "0") == (code, 1)


def test_after_so_many_restarts_the_last_code_is_passed_on(lives, capfd):
    assert lives(2, "70 1", "70 2", "-9 3", "0") == (128 + 9, 3)
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "switchyard: the run ended with exit code 70; start 1 of 2 more follows in 1 "
        "s, from the checkpoint of step 1",
        "switchyard: the run ended with exit code 70; start 2 of 2 more follows in 1 "
        "s, from the checkpoint of step 2",
        "switchyard: the run was killed by SIGKILL; given up after --restarts=2, with "
        "the checkpoint of step 3",
    ]


def test_a_run_that_comes_no_further_is_given_up(lives, capfd):
    assert lives(9, "70 5", "70", "70", "0") == (EXIT_FAULT, 3)
    assert "given up: 2 starts in a row came no further" in capfd.readouterr().err


def test_pauses_grow_until_something_is_saved():
    deaths = Deaths(20)
    newest = [5, 5, 6, 6, 7, 7, 7]
    assert [deaths.pause_seconds(step) for step in newest] == [1, 2, 1, 2, 1, 2, None]
    assert deaths.gave_up


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_ends_both(tmp_path, number):
    child = (
        "import signal, sys, time\n"
        "heard = []\n"
        "for n in (signal.SIGINT, signal.SIGTERM):\n"
        "    signal.signal(n, lambda number, frame: heard.append(number))\n"
        "print('ready', flush=True)\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "print(*map(int, heard), flush=True)\n"
        "sys.exit(70)\n"
    )
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from launch.job.restarts import Supervisor\n"
        f"sys.exit(Supervisor([sys.executable, '-c', {child!r}], Path('.'), 5).run())"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=commands.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert supervisor.stdout.readline() == "ready\n"
    os.killpg(supervisor.pid, number)  # as a terminal does
    assert supervisor.communicate(timeout=30)[0] == f"{int(number)}\n"
    assert supervisor.returncode == EXIT_FAULT, "and no other start"


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such signal")
def test_a_child_is_asked_to_stop_when_its_supervisor_is_killed(tmp_path):
    child = (
        "import os, sys, time\n"
        "from launch.job.restarts import is_child\n"
        "assert is_child()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from launch.job.restarts import Supervisor\n"
        f"sys.exit(Supervisor([sys.executable, '-c', {child!r}], Path('.'), 5).run())"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=commands.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    pid = int(supervisor.stdout.readline())
    supervisor.kill()
    supervisor.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            break
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_one_who_only_inherits_the_word_is_no_child(monkeypatch):
    monkeypatch.setenv("SWITCHYARD_CHILD_OF", "1")
    assert not restarts.is_child()


def supervised(trained, tmp_path, killed_at, saved="", **knobs):
    words = trained.knobs(tmp_path / "run", **knobs)
    return trained.run(
        "train",
        *words,
        f"--restarts={len(killed_at)}",
        program=KILLED,
        MARKS=str(tmp_path),
        KILLED_AT=" ".join(map(str, killed_at)),
        SAVED=str(tmp_path / saved),
    )


def test_a_run_that_is_killed_ends_as_one_that_is_not(trained, tmp_path):
    index = random.randrange(11, 19)
    done = supervised(trained, tmp_path, [index], "run/checkpoints/10")
    assert done.code == EXIT_DONE, (index, done.err)
    assert "the run was killed by SIGKILL; start 1 of 1 more follows in 1 s" in done.err
    assert "from the checkpoint of step 10" in done.err
    assert_ended_alike(tmp_path / "run", trained.folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_is_killed_again_and_again_does_too(trained, tmp_path):
    killed_at = sorted(random.sample(range(2, 19), 4))
    done = supervised(trained, tmp_path, killed_at, CHECKPOINT_PERIOD=1)
    assert done.code == EXIT_DONE, (killed_at, done.err)
    assert done.err.count("was killed by SIGKILL") == 4
    assert_ended_alike(tmp_path / "run", trained.folder)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_processes_of_a_job_come_back_together(trained, tmp_path):
    """Of two, one is killed; the other ends with 134, and both are started again."""
    words = words_of(trained, tmp_path / "run", 1, TRAIN_STEPS=8, CHECKPOINT_PERIOD=3)
    saved = tmp_path / "run" / "checkpoints" / "3"
    exported = {"MARKS": str(tmp_path), "KILLED_AT": "5", "SAVED": str(saved)}
    job = start(
        *(trained, "train", 2, *words, "--restarts=2"), program=KILLED, **exported
    )
    dones = [commands.finish(process, 350) for process in job]  # of two starts
    assert [done.code for done in dones] == [0, 0], dones[0].err + dones[1].err
    said = dones[0].err + dones[1].err
    assert said.count("start 1 of 2 more follows in 1 s") == 2
    assert said.count("from the checkpoint of step 3") == 2
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [*range(1, 9), 8]
