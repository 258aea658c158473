"""A run that was killed, stopped or moved goes on as if nothing had happened."""

import ast
import dataclasses
import importlib.util
import io
import json
import re
import shutil
import signal
import subprocess
import time
import tokenize
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from commands import Done, Trained

from launch.checkpoints.names import named_arrays
from launch.checkpoints.store import Checkpoints
from launch.config import reader
from launch.data.opening import training_batches
from launch.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from launch.records.read import read_metrics
from launch.run.assemble import assemble
from launch.run.feed import place_batch
from tasks.store import open_store


def steps_of(folder: Path) -> list[int]:
    """The steps of which a whole checkpoint is there."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def records_of(folder: Path) -> list[dict]:
    """Every line that a run recorded, in its order, but for its speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {
            name: v
            for name, v in json.loads(line).items()
            if not name.startswith("perf/")
        }
        for line in lines
    ]


def manifest_of(folder: Path, step: int) -> dict:
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(path.read_text())


def state_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, on one device."""
    run = assemble(reader.read([str(folder / "config.gin")], ["MESH_DATA=1"]))
    with Checkpoints(str(folder), keep=1, read_only=True) as saved:
        arrays = named_arrays(saved.restore(step, run))
    return {name: np.asarray(array) for name, array in arrays.items()}


def assert_ended_alike(folder: Path, undisturbed: Path) -> None:
    """Both runs are at step 20, and no bit tells them apart."""
    ours, theirs = manifest_of(folder, 20), manifest_of(undisturbed, 20)
    assert ours["data_index"] == theirs["data_index"] == 20
    assert ours["arrays"] == theirs["arrays"]
    ours, theirs = state_of(folder, 20), state_of(undisturbed, 20)
    for name, array in ours.items():
        np.testing.assert_array_equal(
            array.view("u4"), theirs[name].view("u4"), strict=True, err_msg=name
        )
    assert {name.partition("/")[0] for name in ours} == {
        *("step", "data_index", "skipped_steps", "skipped_in_a_row"),
        *("params", "opt_state"),
    }
    assert records_of(folder) == records_of(undisturbed)


class Life:
    """A run in a process of its own, which waits somewhere."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    def before_batch(cls, trained: Trained, folder: Path, index: int) -> "Life":
        words = ("train", "--self_check=off", *trained.knobs(folder))
        exported = {"PAUSE_AT": str(index)}
        return cls(trained.start(*words, program=commands.PAUSED, **exported))

    @classmethod
    def inside(
        cls, where: str, trained: Trained, folder: Path, *, deaf: bool = False, **knobs
    ) -> "Life":
        """One that waits in a function, if it is deaf whatever signal comes."""
        words = ("train", *trained.knobs(folder, **knobs))
        exported = {"PAUSE_IN": where, "DEAF": "1" if deaf else ""}
        return cls(trained.start(*words, program=commands.PAUSED_IN, **exported))

    def __enter__(self) -> "Life":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()

    def wait(self) -> None:
        """Returns when it waits."""
        assert self._process.stdout is not None
        said = iter(self._process.stdout.readline, "")
        assert "paused\n" in said, self._process.communicate()

    def end(self, number: signal.Signals) -> Done:
        self._process.send_signal(number)
        return commands.finish(self._process)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while step not in steps_of(folder):
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.01)


@dataclasses.dataclass
class Story:
    """What became of a run that was killed, then stopped, then left in peace."""

    folder: Path
    second: Done
    killed: Done
    steps_after_kill: list[int]
    stopped: Done
    steps_after_stop: list[int]
    ended: Done


@pytest.fixture(scope="module")
def story(trained, tmp_path_factory) -> Story:
    """Three lives of one run of 20 steps, checkpoints at every tenth."""
    folder = tmp_path_factory.mktemp("story") / "run"
    with Life.before_batch(trained, folder, 14) as life:
        life.wait()
        wait_for_step(folder, 10)
        second = commands.inline("train", *trained.knobs(folder))
        killed = life.end(signal.SIGKILL)
    steps_after_kill = steps_of(folder)
    with Life.before_batch(trained, folder, 15) as life:
        life.wait()
        stopped = life.end(signal.SIGTERM)
    steps_after_stop = steps_of(folder)
    ended = trained.run("train", *trained.knobs(folder), program=commands.LIGHT)
    return Story(
        folder, second, killed, steps_after_kill, stopped, steps_after_stop, ended
    )


def lines_of_code(module: str) -> int:
    """Lines of a module that are neither blank, nor a comment or a docstring."""
    source = Path(importlib.util.find_spec(module).origin).read_text()
    texts = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    none = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    none |= {tokenize.DEDENT, tokenize.ENDMARKER}
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in none
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - texts)


def test_a_run_imports_what_it_uses_and_no_more(story):
    (names,) = re.findall(r"^imported (.*)$", story.ended.out, re.MULTILINE)
    modules = names.split()
    assert "moe.training.train_step" in modules
    unused = ("planning", "verification", "report.run", "preparation", "quality")
    for name in (*unused, "sampling", "task_metrics", "own_code"):
        assert not [m for m in modules if f".{name}" in m]
    unused = ("checkpoints.bucket", "checkpoints.remote", "training.muon")
    for name in (*unused, "launch.exchange"):
        assert not [m for m in modules if name in m]
    assert sum(map(lines_of_code, modules)) <= 19_000


def test_a_second_run_in_the_same_folder_is_refused(story):
    assert story.second.code == 1
    assert "ModelDirError: another run is writing to " in story.second.err
    assert "Traceback" not in story.second.err


def test_a_killed_run_keeps_its_last_checkpoint(story):
    assert story.killed.code == -signal.SIGKILL
    assert story.steps_after_kill == [10]


def test_sigterm_saves_and_asks_to_be_started_again(story):
    assert story.stopped.code == EXIT_PREEMPTED == 42, story.stopped.err
    assert f"resuming from {story.folder}/checkpoints/10" in story.stopped.err
    (step,) = set(story.steps_after_stop) - {10}
    assert 10 < step < 20
    assert f"stopped, and saved step {step}; the same command" in story.stopped.err
    assert f"resuming from {story.folder}/checkpoints/{step}" in story.ended.err


def test_a_run_is_checked_first_unless_it_is_told_not_to(story):
    # That it is changes no bit of what is learnt, as another test shows.
    for line in ("comparing the sparse layer with the oracle", "self-check: equal to"):
        assert line not in story.stopped.err
        assert line in story.ended.err


def test_a_run_goes_on_from_its_store_without_tensorflow(story):
    assert story.ended.code == 0, story.ended.err  # 99 if it was imported


def test_a_killed_and_a_stopped_run_end_bit_for_bit_as_an_undisturbed_one(
    story, trained
):
    assert_ended_alike(story.folder, trained.folder)
    # What is compared does change from step to step.
    before, after = (manifest_of(trained.folder, step)["arrays"] for step in (10, 20))
    same = {name for name in after if before[name] == after[name]}
    assert same == {"skipped_steps", "skipped_in_a_row"}


def losses_of(folder: Path) -> list[float]:
    """The loss of every step."""
    records = [r for r in read_metrics(folder) if r["split"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 21))
    return [record["loss/nats_per_token"] for record in records]


def moved(source: Path, folder: Path) -> Path:
    """A copy of a run as it was at step 10."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoints" / "20")
    return folder


def test_a_run_of_one_device_learns_the_same_on_eight(trained):
    mesh = ["SIMULATED_DEVICES=8", "MESH_DATA=4", "MESH_EXPERT=2"]
    run = assemble(reader.read([str(trained.folder / "config.gin")], mesh))
    store = open_store(trained.store)
    data, settings = run.settings.data, run.settings.train
    batches = training_batches(store, run.settings)
    losses = []
    with (
        jax.set_mesh(run.mesh),
        Checkpoints(str(trained.folder), keep=1, read_only=True) as saved,
    ):
        state = saved.restore(10, run)
        step = run.compile_train_step()
        for index in range(10, 15):
            shape = (settings.batch_size, data.length)
            batch = place_batch(batches.read, index, shape, run.batch_sharding)
            state, metrics = step(state, batch, np.int32(index))
            assert metrics["state/taken"] == 1
            losses.append(float(metrics["loss/nats_per_token"]))
    assert losses == pytest.approx(losses_of(trained.folder)[10:15], rel=1e-5)
    assert int(state.data_index) == 15


@pytest.mark.slow
def test_a_run_of_one_device_ends_on_eight(trained, tmp_path):
    folder = moved(trained.folder, tmp_path / "run")
    mesh = {"SIMULATED_DEVICES": 8, "MESH_DATA": 4, "MESH_EXPERT": 2}
    done = trained.run("train", *trained.knobs(folder, **mesh))
    assert done.code == 0, done.err
    assert f"resuming from {folder}/checkpoints/10" in done.err
    assert manifest_of(folder, 20)["mesh"]["data"] == 4
    assert losses_of(folder) == pytest.approx(losses_of(trained.folder), rel=1e-5)
    assert steps_of(folder) == [10, 20]


@pytest.mark.slow
def test_a_run_of_four_devices_goes_on_on_one(trained, tmp_path):
    mesh = {"SIMULATED_DEVICES": 4, "MESH_DATA": 2, "MESH_EXPERT": 2}
    on_four = tmp_path / "on_four"
    done = trained.run("train", *trained.knobs(on_four, **mesh))
    assert done.code == 0, done.err
    folder = moved(on_four, tmp_path / "run")
    done = trained.run("train", *trained.knobs(folder))
    assert done.code == 0, done.err
    assert losses_of(folder) == pytest.approx(losses_of(on_four), rel=1e-5)
    # The mesh is no part of what is learnt.
    assert losses_of(on_four) == pytest.approx(losses_of(trained.folder), rel=1e-5)


# To the loop, step 10 looks as if it had been skipped.
SKIPPED = """
import sys
from launch import cli

def before_jax(platform, original=cli._before_jax):
    found = original(platform)
    from launch.training import loop

    owner = next(v for v in vars(loop).values() if hasattr(v, "pause"))
    add = owner.add

    def skipping(log, launched, **how):
        add(log, launched, **how)
        log.skipped_in_a_row = int(launched.step == 10)

    owner.add = skipping
    return found

cli._before_jax = before_jax
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_a_save_waits_for_a_step_that_is_taken(trained, tmp_path):
    folder = tmp_path / "run"
    done = trained.run("train", *trained.knobs(folder), program=SKIPPED)
    assert done.code == 0, done.err
    assert steps_of(folder) == [11, 20]


@pytest.mark.slow
def test_ctrl_c_saves_and_ends_as_the_shell_expects(trained, tmp_path):
    folder = tmp_path / "run"
    with Life.before_batch(trained, folder, 7) as life:
        life.wait()
        done = life.end(signal.SIGINT)
    assert done.code == EXIT_INTERRUPTED == 130, done.err
    (step,) = steps_of(folder)
    assert 0 < step < 20
    assert f"stopped, and saved step {step}; the same command" in done.err
    assert trained.run("train", *trained.knobs(folder)).code == 0
    assert_ended_alike(folder, trained.folder)


SCORING = "launch.evaluation.heldout:heldout"


def heldout_of(folder: Path) -> list[int]:
    """The steps of which held-out metrics are recorded, in the order of the file."""
    return [r["step"] for r in records_of(folder) if r["split"] == "heldout"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_scores_that_were_stopped_are_made_by_the_next_life(trained, tmp_path):
    folder = tmp_path / "run"
    with Life.inside(SCORING, trained, folder, SELF_CHECK="off") as life:
        life.wait()
        wait_for_step(folder, 10)  # saved, and not scored yet
        stopped = life.end(signal.SIGTERM)
    assert stopped.code == EXIT_PREEMPTED, stopped.err
    assert "stopped, and saved step 10; the same command resumes" in stopped.err
    assert (steps_of(folder), heldout_of(folder)) == ([10], [])
    with Life.inside(SCORING, trained, folder, SELF_CHECK="off") as life:
        life.wait()
        killed = life.end(signal.SIGKILL)
    assert killed.code == -signal.SIGKILL
    assert (steps_of(folder), heldout_of(folder)) == ([10], [])
    assert trained.run("train", *trained.knobs(folder)).code == 0
    assert heldout_of(folder) == [10, 20]
    assert_ended_alike(folder, trained.folder)


@pytest.mark.slow
def test_scores_that_are_stopped_save_a_step_that_was_not_to_be_saved(
    trained, tmp_path
):
    folder, knobs = tmp_path / "run", {"EVAL_PERIOD": 7, "SELF_CHECK": "off"}
    with Life.inside(SCORING, trained, folder, **knobs) as life:
        life.wait()
        stopped = life.end(signal.SIGINT)
    assert stopped.code == EXIT_INTERRUPTED, stopped.err
    assert (steps_of(folder), heldout_of(folder)) == ([7], [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        ("launch.run.assemble:Run.compile_train_step", signal.SIGINT, 130),
        ("launch.run.assemble:Run.compile_train_step", signal.SIGTERM, 42),
        ("launch.run.self_check:check", signal.SIGINT, 130),
        ("launch.run.self_check:check", signal.SIGTERM, 42),
        ("launch.checkpoints.store:Checkpoints.restore", signal.SIGTERM, 42),
    ],
)
def test_before_the_first_step_a_signal_ends_a_run_at_once(
    trained, tmp_path, where, number, code
):
    folder = moved(trained.folder, tmp_path / "run")
    with Life.inside(where, trained, folder, deaf=True) as life:
        life.wait()
        began = time.monotonic()
        done = life.end(number)
    assert time.monotonic() - began < 10, "whatever it was doing takes minutes"
    assert done.code == code, done.err
    assert "stopped; the same command goes on from what is kept" in done.err
    assert "Traceback" not in done.err
    assert steps_of(folder) == [10]


@pytest.mark.parametrize(
    ("where", "words", "number", "code"),
    [
        (SCORING, ["evaluate"], signal.SIGINT, EXIT_INTERRUPTED),
        pytest.param(
            "launch.evaluation.sampling:continue_prompt",
            ["generate", "--prompt=def "],
            *(signal.SIGTERM, EXIT_PREEMPTED),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_keeps_nothing_ends_at_once(trained, where, words, number, code):
    words = [*words, f"--model_dir={trained.folder}"]
    exported = {"PAUSE_IN": where, "DEAF": "1"}
    with Life(trained.start(*words, program=commands.PAUSED_IN, **exported)) as life:
        life.wait()
        began = time.monotonic()
        done = life.end(number)
    assert time.monotonic() - began < 10, "what it does takes minutes"
    assert done.code == code, done.err
    assert done.err.endswith("stopped\n")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_after_the_last_step_a_signal_ends_a_run_and_the_next_finishes_it(
    trained, tmp_path
):
    folder = moved(trained.folder, tmp_path / "run")
    (folder / "report.html").unlink()
    for where in (
        SCORING,
        "launch.evaluation.sampling:continue_prompt",
        "launch.report.run:write_report",
    ):
        knobs = {"SAMPLE_PROMPT": "def ", "SELF_CHECK": "off"}
        with Life.inside(where, trained, folder, deaf=True, **knobs) as life:
            life.wait()
            began = time.monotonic()
            done = life.end(signal.SIGTERM)
        assert time.monotonic() - began < 10
        assert done.code == EXIT_PREEMPTED, done.err
        assert steps_of(folder) == [10, 20]
        assert not (folder / "report.html").exists()
    assert trained.run("train", *trained.knobs(folder)).code == 0
    assert (folder / "report.html").is_file()
    recorded = read_metrics(folder)
    assert [r["step"] for r in recorded if r["split"] == "heldout"] == [10, 20]
    assert state_of(folder, 20).keys() == state_of(trained.folder, 20).keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_survives_kills_at_any_moment(trained, tmp_path):
    """Saves at every step, is killed while it saves, and compiles afresh each time."""
    knobs = {"COMPILATION_CACHE_DIR": "", "CHECKPOINT_PERIOD": 1}
    folder, kills = tmp_path / "run", 0
    for number in range(6):
        process = trained.start("train", *trained.knobs(folder, **knobs))
        known = steps_of(folder)
        while process.poll() is None and steps_of(folder) == known:
            time.sleep(0.001)
        time.sleep(0.003 * number)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 3
    done = trained.run("train", *trained.knobs(folder, **knobs))
    assert done.code == 0, done.err
    assert "skipped" not in done.err
    assert_ended_alike(folder, trained.folder)
    leftovers = [p for p in (folder / "checkpoints").iterdir() if "tmp" in p.name]
    assert not leftovers
