"""Signals are heard wherever a run is, and end it where nothing would be lost."""

import contextlib
import dataclasses
import hashlib
import os
import queue
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest

from launch.config.settings import LoopSettings
from launch.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PREEMPTED
from launch.job import end, together
from launch.job.signals import GOES_ON, Stopped, listening
from launch.records.events import EventLog
from launch.records.goodput import Clock
from launch.training import folder, log, loop
from launch.training.books import Books
from tasks import ramp

pytestmark = pytest.mark.fast

BOTH = [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_PREEMPTED)]


@pytest.fixture
def left(monkeypatch) -> queue.Queue:
    """The codes that the process would have ended with, and when."""
    codes = queue.Queue()
    monkeypatch.setattr(end, "leave", lambda code: codes.put((code, time.monotonic())))
    return codes


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_signal_is_heard_inside_a_compiler(number, code, left, capsys):
    before = signal.getsignal(number)
    with listening(GOES_ON, quiet=False):
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
        # A second or more in which no handler of Python's runs.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 3_000_000)
        ended = time.monotonic()
        said, heard = left.get(timeout=5)
    assert said == code
    assert heard < ended - 0.2
    assert signal.getsignal(number) == before
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), BOTH)
def test_a_signal_is_noted_where_something_is_to_be_saved(number, code, left):
    with listening(GOES_ON, quiet=True) as heard:
        with heard.noted():
            before = heard.asked()
            signal.raise_signal(number)
            with pytest.raises(Stopped) as stopped:
                heard.check()
            assert left.empty()
        assert (before, heard.asked(), stopped.value.code) == (EXIT_DONE, code, code)


def heard_twice(left, first, second) -> bool:
    """Whether the process would have ended at the second of two signals."""
    with listening(GOES_ON, quiet=True) as heard, heard.noted():
        heard.kept = lambda: "step 7 is kept"
        for number in (first, second):
            signal.raise_signal(number)
            time.sleep(0.2)
        assert heard.asked() == dict(BOTH)[first]
    return not left.empty()


def test_ctrl_c_twice_ends_at_once_and_says_what_is_kept(left, capsys):
    assert heard_twice(left, signal.SIGINT, signal.SIGINT)
    assert left.get()[0] == EXIT_INTERRUPTED
    assert "ended at once · step 7 is kept" in capsys.readouterr().err


def test_ctrl_c_ends_at_once_what_is_stopping_already(left):
    assert heard_twice(left, signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigterm_does_not_end_what_is_being_saved(left, first):
    assert not heard_twice(left, first, signal.SIGTERM)


def test_when_a_run_begins_to_stop_it_is_told_once(left):
    told = []
    with listening(GOES_ON, quiet=True) as heard, heard.noted():
        heard.begin_to_stop = lambda: told.append(heard.seconds_since())
        assert (heard.asked(), heard.seconds_since()) == (EXIT_DONE, 0)
        signal.raise_signal(signal.SIGTERM)
        assert heard.asked() == heard.asked() == EXIT_PREEMPTED
        assert len(told) == 1
        assert heard.seconds_since() > 0


def test_processes_of_a_job_stop_at_the_same_ask(monkeypatch):
    asks = []

    def asked_to_stop(ask):
        asks.append(ask)
        return signal.SIGTERM if ask == 3 else None

    monkeypatch.setattr(together, "asked_to_stop", asked_to_stop)
    monkeypatch.setattr(end, "in_job", lambda: True)
    with listening(GOES_ON, quiet=True) as heard, heard.noted():
        heard.check()
        assert heard.asked() == EXIT_DONE
        with pytest.raises(Stopped, match="the same command"):
            heard.check()
    assert asks == [1, 2, 3]


# ------------------------------------------------------- between two steps of the loop

between_steps = pytest.mark.usefixtures("left")  # or a late signal ended the tests
LAST = 6


@dataclasses.dataclass(frozen=True)
class State:
    step: int
    data_index: int
    params: int = 0


class Batches:
    sizes = ramp.sizes(2)

    def read(self, index, start, stop):
        return {"tokens": np.full((stop - start, 4), index, np.int32)}


@dataclasses.dataclass
class Recorder:
    """Stands for checkpoints, metrics and a display: what was done, in its order.

    Attributes:
        stop_in: the step in whose scores a signal comes.
        clock: seconds, of which saving and scoring take a thousand.
    """

    stop_in: int = -1
    clock: float = 0.0
    did: list[str] = dataclasses.field(default_factory=list)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def step(self, state, batch, index):
        state = State(state.step + 1, state.data_index + 1, state.step + 1)
        kept = {"state/taken": 1, "state/skipped_in_a_row": 0}
        return state, kept | {"loss/total": 1.0, "loss/target_tokens": 8}

    def score(self, step, number):
        self.clock += 1000
        if step == self.stop_in:
            signal.raise_signal(signal.SIGTERM)
        self.heard.check()
        return {"loss/nats_per_token": 1.0}

    def save(self, state, run, provenance):
        self.clock += 1000
        self.did.append(f"save {state.step}")

    def write(self, record):
        if record["split"] == "heldout":
            self.did.append(f"score {record['step']}")
        else:
            self.seconds[record["step"]] = record["perf/step_seconds"]

    def perf_counter(self):
        self.clock += 1
        return self.clock

    def wait(self):
        self.did.append("wait")

    def flush(self):
        pass

    def update(self, record):
        pass

    def say(self, line):
        pass

    def scored(self, step, scores):
        pass

    def waiting(self, message):
        return contextlib.nullcontext()

    def train(self, start=0, *, was_scored=True, score=2, save=2):
        """Goes on from a step; returns the exit code."""
        device = jax.sharding.Mesh(jax.devices()[:1], ("one",))
        spec = jax.sharding.PartitionSpec()
        run = types.SimpleNamespace(
            settings=types.SimpleNamespace(
                layers=types.SimpleNamespace(hashed=()),
                loop=LoopSettings(
                    model_dir="",
                    log_period_steps=1,
                    eval_period_steps=score,
                    checkpoint_period_steps=save,
                    task_metrics_period_steps=0,
                ),
                train=types.SimpleNamespace(train_steps=LAST, batch_size=2),
                data=types.SimpleNamespace(length=4),
            ),
            batch_sharding=jax.sharding.NamedSharding(device, spec),
        )
        hooks = loop.Hooks(self.step, None, self.score, None, lambda _: {}, None, {})
        books = Books(self, EventLog(None), Clock(), self)
        with (
            pytest.MonkeyPatch.context() as patch,
            listening(GOES_ON, quiet=True) as self.heard,
        ):
            patch.setattr(log, "time", self)
            _, code = loop.train(
                *(run, State(start, start, start), Batches(), hooks),
                *(self, books, self.heard),
                kept=None,
                was_scored=was_scored,
            )
        return code


def test_what_is_saved_and_scored_after_a_step_is_saved_first():
    run = Recorder()
    assert run.train() == EXIT_DONE
    assert run.did == ["save 2", "score 2", "save 4", "score 4", "save 6", "wait"]
    assert max(run.seconds.values()) < 1000, "the time of steps is theirs alone"


@between_steps
def test_scores_that_a_signal_stops_are_made_when_the_run_goes_on():
    run = Recorder(stop_in=2)
    assert run.train() == EXIT_PREEMPTED
    assert run.did == ["save 2", "wait"]
    run = Recorder()
    assert run.train(2, was_scored=False) == EXIT_DONE
    assert run.did == ["score 2", "save 4", "score 4", "save 6", "wait"]
    assert run.seconds[3] < 1000
    run = Recorder()
    assert run.train(2, was_scored=True) == EXIT_DONE
    assert run.did == ["save 4", "score 4", "save 6", "wait"]


@between_steps
def test_what_was_not_saved_when_a_signal_stops_the_scores_is_saved():
    run = Recorder(stop_in=2)
    assert run.train(save=0) == EXIT_PREEMPTED
    assert run.did == ["save 2", "wait"]
    run = Recorder(stop_in=2)
    assert run.train(2, was_scored=False) == EXIT_PREEMPTED
    assert run.did == ["wait"], "it is saved already"


def test_a_step_that_was_not_to_be_scored_is_not():
    run = Recorder()
    assert run.train(3, was_scored=False, score=2, save=0) == EXIT_DONE
    assert run.did == ["score 4", "save 6", "wait"]


# ---------------------------------------------------------- what a folder knows of it


@contextlib.contextmanager
def started(model_dir, grace_seconds=0.0):
    """A start of a run until it is asked to stop; it has until the end to save."""
    with listening(GOES_ON, quiet=True) as heard, heard.noted():
        folder.be_ready_to_stop(model_dir, heard, grace_seconds)
        yield heard


def test_a_run_that_is_killed_while_it_saves_says_so_when_it_goes_on(
    left, tmp_path, capsys
):
    for name in ("7", "12", "19.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with started(tmp_path) as heard:
        signal.raise_signal(signal.SIGTERM)
        assert heard.asked() == EXIT_PREEMPTED
    assert capsys.readouterr().err == ""
    with started(tmp_path, 30):
        said = capsys.readouterr().err
    assert "this run was asked to stop, and killed before it had saved" in said
    assert "(GRACE_SECONDS = 30); it goes on from step 12" in said
    with started(tmp_path, 30):
        assert capsys.readouterr().err == "", "once"


@pytest.mark.parametrize("grace_seconds", [0, 1e-9, 3600])
def test_a_run_that_saves_for_too_long_says_so(left, tmp_path, capsys, grace_seconds):
    with started(tmp_path) as heard:
        signal.raise_signal(signal.SIGTERM)
        heard.asked()
        folder.has_stopped(tmp_path, heard, grace_seconds)
    assert ("GRACE_SECONDS" in capsys.readouterr().err) == (grace_seconds == 1e-9)
    with started(tmp_path):
        assert capsys.readouterr().err == "", "it has saved"


def test_ctrl_c_twice_names_the_newest_whole_checkpoint(left, tmp_path, capsys):
    for name in ("7", "19.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    with started(tmp_path):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)
        assert left.get(timeout=5)[0] == EXIT_INTERRUPTED
    assert "ended at once · the checkpoint of step 7 is kept" in capsys.readouterr().err
