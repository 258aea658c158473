"""Who owns a folder on a file system without locks, and when another may take it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks import owner
from tasks.owner import TakenError, myself
from tasks.preparation import folders

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]
# Owns a file, says so, and does nothing.
OTHER = """
import pathlib, sys, time
from tasks import owner

with owner.owned(pathlib.Path(sys.argv[1]), say=print, lost=print, beat_seconds=0.05):
    print("mine", flush=True)
    time.sleep(60)
"""
NO_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]


def without_locks(monkeypatch, number=errno.ENOLCK):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.owner"


@pytest.fixture
def other(path):
    """Another process, which owns the file."""
    words = [sys.executable, "-c", OTHER, str(path)]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def owned(path, said=None, lost=None, stale_seconds=0.5):
    return owner.owned(
        path,
        say=(said if said is not None else []).append,
        lost=(lost if lost is not None else []).append,
        beat_seconds=0.05,
        stale_seconds=stale_seconds,
    )


def as_of_another_machine(path):
    """Changes what a file says of its owner's machine, but not its beat."""
    said = json.loads(path.read_bytes())
    said["owner"]["host"] = "elsewhere"
    path.write_text(json.dumps(said))


@pytest.mark.parametrize("number", NO_LOCKS)
def test_where_there_are_no_locks_is_told_from_where_another_has_one(
    tmp_path, monkeypatch, number
):
    path = tmp_path / "lock"
    with path.open("ab") as first, path.open("ab") as second:
        assert owner.locked(first)
        with pytest.raises(BlockingIOError):
            owner.locked(second)
        without_locks(monkeypatch, number)
        assert not owner.locked(second)
        without_locks(monkeypatch, errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            owner.locked(second)


def test_a_live_owner_is_named_and_left_alone(path, other):
    before = path.stat().st_ino
    with pytest.raises(TakenError, match=f"^process {other.pid} on ") as taken:
        owned(path).__enter__()
    assert "since 2" in str(taken.value)
    assert path.stat().st_ino == before


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_an_owner_that_died_here_is_taken_over_at_once(path, other, is_waited_for):
    other.kill()
    if is_waited_for:  # else it is still in the table of processes
        other.wait()
    else:
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    said = []
    with owned(path, said, stale_seconds=60):
        assert json.loads(path.read_bytes())["owner"]["pid"] == os.getpid()
    assert len(said) == 1
    assert said[0].startswith(f"took {path.parent} over from process {other.pid} on ")
    assert said[0].endswith("which has ended")
    assert list(path.parent.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_owner_is_not_it(path):
    with owned(path):
        said = json.loads(path.read_bytes())
    said["owner"] |= {"started": "1"}
    path.write_text(json.dumps(said))
    with owned(path):
        pass


def test_an_owner_on_another_machine_that_is_alive_is_refused(path, other, monkeypatch):
    monkeypatch.setattr(owner.socket, "gethostname", lambda: "here")
    said = []
    with pytest.raises(TakenError, match=f"process {other.pid} on "):
        owned(path, said, stale_seconds=30).__enter__()
    assert "waiting 30 s for a sign of life" in said[0]


def test_an_owner_on_another_machine_that_is_silent_is_taken_over(path, other):
    other.send_signal(signal.SIGSTOP)
    as_of_another_machine(path)
    said = []
    with owned(path, said):
        assert json.loads(path.read_bytes())["owner"]["pid"] == os.getpid()
    assert said[-1].endswith("which gave no sign of life in 0.5 s")


def test_a_stopped_owner_here_is_alive(path, other):
    other.send_signal(signal.SIGSTOP)
    time.sleep(0.6)
    with pytest.raises(TakenError):
        owned(path).__enter__()


def test_a_file_that_nobody_finished_is_taken_over_when_it_stands_still(path):
    path.write_bytes(b'{"owner"')
    said = []
    with owned(path, said):
        pass
    assert "somebody who has not written who" in said[-1]


def test_an_owner_that_was_taken_over_hears_of_it_and_leaves_the_file_alone(path):
    lost = []
    with owned(path, lost=lost) as check:
        check()
        assert lost == []
        os.utime(path, (0, 0))  # clocks mean nothing
        time.sleep(0.2)
        assert lost == []
        thief = path.with_name("thief")
        with owned(thief):
            os.replace(thief, path)
            theirs = path.read_bytes()
            check()
            time.sleep(0.2)
            assert path.read_bytes()[:100] == theirs[:100]
    assert lost[0].startswith(f"{path} was taken over by process {os.getpid()} on ")
    assert path.exists()


def test_two_preparations_exclude_each_other_without_locks(tmp_path, monkeypatch):
    without_locks(monkeypatch)
    work = str(tmp_path / "store.preparing")
    with (
        folders.alone(work),
        pytest.raises(folders.StoreError, match=rf"\(process {os.getpid()} on "),
        folders.alone(work),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_knows_itself():
    assert myself().is_alive()
    assert myself() != myself()
