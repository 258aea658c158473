"""One run over several real processes: the same run, and one end for all of them.

Over loopback, by Gloo, which adds in an order of its own: a run agrees with that of one
process up to the rounding of float32, measured as 8e-8 of the loss after 20 steps.
"""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import commands
import pytest
from commands import Done, Trained

from launch.errors import EXIT_LOST_PROCESS, EXIT_PREEMPTED
from launch.records.read import read_metrics

KNOBS = {
    "TRAIN_STEPS": 4,
    "WARMUP_STEPS": 2,
    "CHECKPOINT_PERIOD": 100,
    "EVAL_PERIOD": 100,
    "XLA_FLAGS": "()",  # those of the tests alone, in every process
}

# Reads no more from batch FAULT_AT on, in the process whose turn it is.
FAULTY = """
import os, sys
from launch import cli
from tasks.batches import Batches
from tasks.errors import StoreError

def read(batches, index, start, stop, original=Batches.read):
    if index == 2 and os.environ["JAX_PROCESS_ID"] == "1":
        raise StoreError("shard 7 cannot be read")
    return original(batches, index, start, stop)

Batches.read = read
sys.exit(cli.main())
"""

# To process 1 the shared folder is shown as it was before the run.
STALE = """
import os, pathlib, sys
from launch import cli
from launch.job import together

def run(job, work, config, original=together.run):
    def stale():
        from launch.checkpoints.store import Checkpoints
        from launch.training import finish

        def exists(path, original=pathlib.Path.exists):
            return path.name != "report.html" and original(path)

        pathlib.Path.exists = exists
        Checkpoints.latest = lambda saved: None
        finish.newest = lambda *given: None
        return work()

    return original(job, stale if job.process else work, config)

together.run = run
sys.exit(cli.main())
"""


# Process 1 alone finds that a file of step 12 is missing.
ONE_FINDS = """
import sys
from launch import cli
from launch.job import together

def run(job, work, config, original=together.run):
    def finding():
        from launch.checkpoints import store
        from launch.checkpoints.places import DamagedError

        def placed(arrays, wanted, original=store.placed):
            if arrays.path.name == "12":
                raise DamagedError(arrays.path, "a file of process 1 is missing")
            return original(arrays, wanted)

        store.placed = placed
        return work()

    return original(job, finding if job.process else work, config)

together.run = run
sys.exit(cli.main())
"""


# Takes a second for every batch that is scored, or minutes to compile the train step,
# and leaves a file when process 1 begins with it.
SLOW = """
import hashlib, os, pathlib, sys, time
from launch import cli
from launch.job import together

def slow(work, seconds):
    def slowly(*arguments, **options):
        pathlib.Path(os.environ["BEGUN"]).touch()
        if seconds:
            time.sleep(seconds)
        else:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        return work(*arguments, **options)

    return slowly

def run(job, work, config, original=together.run):
    def slowed():
        from launch.run.assemble import Run
        from launch.job.signals import Signals

        if os.environ["SLOW"] == "scoring":
            Signals.check = slow(Signals.check, 1)
        else:
            Run.compile_train_step = slow(Run.compile_train_step, 0)
        return work()

    return original(job, slowed if job.process else work, config)

together.run = run
sys.exit(cli.main())
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(
    trained: Trained, verb: str, number: int, *words: str, program="", **exported
):
    """Starts the processes of one job, which differ in their environment only."""
    job = [
        f"--gin.NUM_PROCESSES={number}",
        f"--gin.COORDINATOR_ADDRESS=127.0.0.1:{free_port()}",
    ]
    return [
        trained.start(
            *(verb, *words, *job),
            program=program,
            JAX_PROCESS_ID=str(process),
            **exported,
        )
        for process in range(number)
    ]


def words_of(trained: Trained, folder: Path, devices: int, **knobs) -> list[str]:
    given = KNOBS | {"SIMULATED_DEVICES": devices, "MESH_DATA": 2} | knobs
    return [*trained.knobs(folder, **given), "--self_check=off"]


def arrays_of(folder: Path, step: int) -> dict:
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(path.read_text())["arrays"]


def records_of(folder: Path) -> list[dict]:
    return [
        {name: x for name, x in record.items() if not name.startswith("perf/")}
        for record in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory) -> tuple[Path, list[Done]]:
    """Two processes that trained together, each on one device."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    processes = start(trained, "train", 2, *words_of(trained, folder, 1))
    return folder, [commands.finish(process) for process in processes]


def losses_of(records: list[dict]) -> list[float]:
    return [record["loss/nats_per_token"] for record in records]


def test_two_processes_learn_what_one_does(trained, pair, tmp_path):
    folder, dones = pair
    assert [done.code for done in dones] == [0, 0], dones[0].err + dones[1].err
    alone = commands.inline("train", *words_of(trained, tmp_path / "run", 2))
    assert alone.code == 0, alone.err
    ours, theirs = records_of(folder), records_of(tmp_path / "run")
    assert len(ours) == 5, "every step, and the whole held-out split"
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=1e-6)
    for ledger in ("ledger/routed_choices", "ledger/dropped_choices"):
        assert [r[ledger] for r in ours] == [r[ledger] for r in theirs]
    assert arrays_of(folder, 4).keys() == arrays_of(tmp_path / "run", 4).keys()


def test_one_process_speaks_and_writes_for_both(pair):
    folder, (first, second) = pair
    assert "process 0 of 2, which meet at 127.0.0.1:" in first.err
    assert "step 4/4" in first.err
    assert "this model" in first.out
    assert "Gloo" not in first.out + second.out
    assert second.out == ""
    assert "step " not in second.err
    assert (folder / "report.html").is_file()
    assert len(list((folder / "tensorboard" / "train").iterdir())) == 1


@pytest.mark.slow
def test_what_two_saved_four_go_on_with_and_one_scores(trained, pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair[0], folder)
    mesh = {"MESH_DATA": 2, "MESH_EXPERT": 2, "TRAIN_STEPS": 8}
    # All is checked, scored and drawn by four.
    words = words_of(trained, folder, 1, **mesh, EVAL_PERIOD=6, SAMPLE_PROMPT="def ")
    words.remove("--self_check=off")
    dones = [commands.finish(p) for p in start(trained, "train", 4, *words)]
    assert {done.code for done in dones} == {0}, "".join(d.err for d in dones)
    assert f"resuming from {folder}/checkpoints/4" in dones[0].err
    alone = tmp_path / "alone"
    shutil.copytree(pair[0], alone)
    done = commands.inline("train", *words_of(trained, alone, 4, **mesh))
    assert done.code == 0, done.err
    ours, theirs = records_of(folder), records_of(alone)
    losses = [
        losses_of([r for r in records if r["split"] == "train"])
        for records in (ours, theirs)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    scored = commands.inline(
        "evaluate", f"--model_dir={folder}",
        "--gin_file=hardware/cpu4_d2e2.gin",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    evaluated = [
        commands.finish(process)
        for process in start(trained, "evaluate", 2, f"--model_dir={folder}",
                             "--gin.SIMULATED_DEVICES=2")
    ]  # fmt: skip
    assert [done.code for done in evaluated] == [0, 0], evaluated[0].err
    assert evaluated[0].out == scored.out
    assert evaluated[1].out == ""


@pytest.mark.slow
def test_all_processes_go_by_what_process_0_finds(trained, pair, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(pair[0], folder)
    words = words_of(trained, folder, 1)
    processes = start(trained, "train", 2, *words, program=STALE)
    first, second = (commands.finish(process) for process in processes)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "is complete: step 4 of 4" in first.out
    assert "scoring" not in first.err


@pytest.mark.slow
def test_damage_that_one_process_finds_all_go_round(trained, tmp_path):
    folder = tmp_path / "run"
    # By the clock of process 0, at which all look every 10 steps.
    knobs = {"TRAIN_STEPS": 12, "CHECKPOINT_MINUTES": 0.0001, "EVAL_PERIOD": 100}
    processes = start(trained, "train", 2, *words_of(trained, folder, 1, **knobs))
    dones = [commands.finish(process) for process in processes]
    assert [done.code for done in dones] == [0, 0], dones[0].err
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["10", "12"]
    knobs |= {"TRAIN_STEPS": 14, "CHECKPOINT_MINUTES": 0}
    words = words_of(trained, folder, 1, **knobs)
    processes = start(trained, "train", 2, *words, program=ONE_FINDS)
    first, second = (commands.finish(process) for process in processes)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    said = "12 is damaged: a file of process 1 is missing; it is kept as 12.damaged, "
    assert f"{said}and the run goes on from step 10\n" in first.err
    there = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert there == ["10", "12.damaged", "14"]
    assert "12" not in second.err


def wait_for_records(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < number:
        assert time.monotonic() < deadline, "it never got so far"
        time.sleep(0.01)


def disturb(
    trained, folder, number: signal.Signals, victim: int, processes=2, **knobs
) -> list[Done]:
    """Sends a signal to one of the processes in the middle of a long run.

    One that it stops goes on when the others have ended.
    """
    given = {"MESH_EXPERT": 2, "TRAIN_STEPS": 5000} | knobs
    words = words_of(trained, folder, 4 // processes, **given)
    job = start(trained, "train", processes, *words)
    wait_for_records(folder, 3)
    job[victim].send_signal(number)
    began = time.monotonic()
    others = {
        place: commands.finish(process)
        for place, process in enumerate(job)
        if place != victim
    }
    assert time.monotonic() - began < 30, "the heartbeat's time is 100 s"
    if number == signal.SIGSTOP:
        job[victim].send_signal(signal.SIGCONT)
    others[victim] = commands.finish(job[victim])
    return [others[place] for place in range(processes)]


@pytest.mark.slow
def test_a_signal_to_one_process_saves_one_step_of_all(trained, tmp_path):
    dones = disturb(trained, tmp_path / "run", signal.SIGTERM, 1)
    assert [done.code for done in dones] == [EXIT_PREEMPTED] * 2, dones[0].err
    (step,) = (int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped, and saved step {step}; the same command resumes" in dones[0].err
    assert arrays_of(tmp_path / "run", step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "knobs", "steps"),
    [
        ("compiling", {}, []),
        ("scoring", {"EVAL_PERIOD": 2, "EVAL_BATCHES": 0}, ["2"]),
        ("scoring", {}, ["4"]),  # the whole split, after the last step
    ],
)
def test_a_signal_to_one_process_stops_all_while_they_compile_or_score(
    trained, tmp_path, what, knobs, steps
):
    folder, begun = tmp_path / "run", tmp_path / "begun"
    words = words_of(trained, folder, 1, **knobs)
    exported = {"BEGUN": str(begun), "SLOW": what}
    processes = start(trained, "train", 2, *words, program=SLOW, **exported)
    deadline = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < deadline, "it never got so far"
        time.sleep(0.01)
    if what == "scoring":  # the first check is that before the first step
        begun.unlink()
        while not begun.exists():
            assert time.monotonic() < deadline, "nothing was scored"
            time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    dones = [commands.finish(process) for process in processes]
    assert [d.code for d in dones] == [EXIT_PREEMPTED] * 2, dones[0].err + dones[1].err
    said = "stopped; the same command goes on"
    if steps == ["2"]:  # it has learnt something that it saved first
        said = "stopped, and saved step 2; the same command resumes"
    assert said in dones[0].err
    found = sorted(p.name for p in folder.glob("checkpoints/*"))
    assert found == steps
    assert not [r for r in records_of(folder) if r["split"] == "heldout"]


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "processes"), [(0, 2), (1, 2), (3, 4)])
def test_when_a_process_is_killed_the_others_end_and_say_which(
    trained, tmp_path, victim, processes
):
    dones = disturb(trained, tmp_path / "run", signal.SIGKILL, victim, processes)
    assert dones.pop(victim).code == -signal.SIGKILL
    for done in dones:
        assert done.code == EXIT_LOST_PROCESS, done.err
        assert f"process {victim} was lost. The same command, started" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_stopped_all_end_and_it_writes_no_more(
    trained, tmp_path, victim
):
    folder = tmp_path / "run"
    dones = disturb(trained, folder, signal.SIGSTOP, victim, HEARTBEAT_TIMEOUT=4)
    for done in dones:
        assert done.code == EXIT_LOST_PROCESS, done.err
        assert "was lost" in done.err
    said = f"process {victim} was lost: silent for HEARTBEAT_TIMEOUT = 4 s"
    assert said in dones[1 - victim].err
    assert not list(folder.glob("checkpoints/*"))


@pytest.mark.slow
def test_data_that_one_process_cannot_read_end_all_with_its_message(trained, tmp_path):
    words = words_of(trained, tmp_path / "run", 1)
    processes = start(trained, "train", 2, *words, program=FAULTY)
    first, second = (commands.finish(process) for process in processes)
    assert (first.code, second.code) == (1, 1)
    assert "process 1: StoreError: shard 7 cannot be read" in second.err
    assert "process 1 ended: StoreError: shard 7 cannot be read" in first.err
    assert "Traceback" not in first.err + second.err
