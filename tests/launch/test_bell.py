"""A job ends as one, whatever happens to one of its processes. Without jax: quick."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT
from test_processes import free_port

from launch.errors import EXIT_LOST_PROCESS

# One process of a job: meets the others, and then does what it is told on its input.
MEMBER = """
import ctypes, signal, sys, threading, time
from launch.errors import UserError
from launch.job import meet
from launch.job.abort import hold_aborts
from launch.job.end import Bell

process, number, address, silence = sys.argv[1:]
process, number = int(process), int(number)
lines = meet.call(
    address, process, number, {}, bind_address=address, timeout_seconds=60
)
hold_aborts()
say = lambda message: print(message, file=sys.stderr, flush=True)
bell = Bell(process, lines, say, float(silence))
print("met", flush=True)
for line in sys.stdin:
    if line == "done\\n":
        bell.done()
        print("all done", flush=True)
        break
    if line == "speak\\n":  # to somebody who does not listen
        threading.Thread(
            target=lambda: sys.stderr.write("x" * 10**7), daemon=True
        ).start()
    elif line == "abort\\n":  # as jax does, in a thread of its own
        threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
    else:
        kind = {"user": UserError, "fault": ValueError, "lost": RuntimeError}
        word, _, message = line.strip().partition(" ")
        bell.fail(kind[word](message))
"""


class Job:
    """Its processes; ends them all when it is left."""

    def __init__(self, number, silence=60.0):
        address = f"127.0.0.1:{free_port()}"
        self.members = [
            subprocess.Popen(
                [sys.executable, "-c", MEMBER]
                + [str(word) for word in (process, number, address, silence)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(number)
        ]

    def __enter__(self):
        for member in self.members:
            assert member.stdout.readline() == "met\n", member.communicate()[1]
        return self

    def __exit__(self, *exception):
        for member in self.members:
            member.kill()
            member.communicate()

    def tell(self, process, line):
        self.members[process].stdin.write(f"{line}\n")
        self.members[process].stdin.flush()

    def ends(self, *processes):
        """The exit code and the errors of some, once they have ended."""
        found = []
        for process in processes:
            member = self.members[process]
            code = member.wait(timeout=30)
            found.append((code, member.stderr.read()))
        return found


@pytest.mark.parametrize("victim", [0, 2])
def test_of_four_processes_three_name_the_one_that_was_killed(victim):
    others = [process for process in range(4) if process != victim]
    with Job(4) as job:
        job.members[victim].kill()
        for code, said in job.ends(*others):
            assert code == EXIT_LOST_PROCESS
            assert f"process {victim} was lost. The same command, started" in said


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_is_named_and_ends_when_it_goes_on(victim):
    with Job(3, silence=1.0) as job:
        time.sleep(2)  # in which nobody says anything but that it lives
        assert [member.poll() for member in job.members] == [None] * 3
        job.members[victim].send_signal(signal.SIGSTOP)
        ended = job.ends(*{0, 1, 2} - {victim})
        for code, said in ended:
            assert code == EXIT_LOST_PROCESS
            assert f"process {victim} was lost: silent for HEARTBEAT_TIMEOUT" in said
        job.members[victim].send_signal(signal.SIGCONT)
        ((code, said),) = job.ends(victim)
        assert code == EXIT_LOST_PROCESS
        assert "was lost" in said


def test_what_a_killed_process_leads_to_in_others_does_not_hide_which_it_was():
    with Job(3) as job:
        job.members[1].kill()
        job.tell(0, "lost Gloo: connection closed by peer")
        job.tell(2, "fault something else that follows from it")
        for code, said in job.ends(0, 2):
            assert code == EXIT_LOST_PROCESS
            assert "process 1 was lost. The same command" in said
            assert "Traceback" not in said


def test_an_abort_of_jax_does_not_win_over_what_the_connections_tell():
    with Job(2) as job:
        job.tell(1, "abort")
        time.sleep(0.5)
        job.members[0].kill()
        ((code, said),) = job.ends(1)
        assert code == EXIT_LOST_PROCESS
        assert "process 0 was lost" in said


def test_an_error_in_one_process_ends_all_with_its_message_and_code():
    with Job(3) as job:
        job.tell(2, "user shard 7 cannot be read")
        ended = job.ends(0, 1, 2)
    assert [code for code, _ in ended] == [1] * 3
    for _, said in ended[:2]:
        assert "process 2 ended: UserError: shard 7 cannot be read" in said
    assert ended[2][1].strip() == "UserError: shard 7 cannot be read"


def test_the_same_error_in_all_is_said_once_by_each():
    with Job(3) as job:
        for process in range(3):
            job.tell(process, "user too many experts")
        ended = job.ends(0, 1, 2)
    assert {code for code, _ in ended} == {1}
    assert sum(said.count("too many experts") for _, said in ended) <= 3


def test_processes_that_are_done_leave_in_any_order():
    with Job(3) as job:
        job.tell(2, "done")
        job.tell(0, "done")
        time.sleep(0.3)
        assert [member.poll() for member in job.members] == [None] * 3
        job.tell(1, "done")
        assert job.ends(0, 1, 2) == [(0, "")] * 3


def test_a_process_that_is_killed_before_all_are_done_is_named():
    with Job(3) as job:
        job.tell(0, "done")
        job.tell(2, "done")
        os.kill(job.members[1].pid, signal.SIGKILL)
        for code, said in job.ends(0, 2):
            assert code == EXIT_LOST_PROCESS
            assert "process 1 was lost" in said


@pytest.mark.slow
def test_a_process_whose_words_nobody_reads_ends_all_the_same():
    with Job(2) as job:
        job.tell(1, "speak")
        time.sleep(0.5)
        job.members[0].kill()
        assert job.members[1].wait(timeout=30) == EXIT_LOST_PROCESS
