"""Processes meet, or every one of them hears why not."""

import concurrent.futures
import socket
import time

import pytest

from launch.errors import ProcessError
from launch.job import meet


def free_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


def outcomes(processes, address=None, seconds=5.0) -> list[str]:
    """What each of (process, number, facts) hears: "" if all is well."""
    address = address or free_address()

    def attend(process, number, facts) -> str:
        try:
            lines = meet.call(
                address,
                process,
                number,
                facts,
                bind_address=address,
                timeout_seconds=seconds,
            )
            assert sorted(lines) == ([0] if process else list(range(1, number)))
            for line in lines.values():
                line.close()
        except ProcessError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        futures = [pool.submit(attend, *process) for process in processes]
        return [future.result() for future in futures]


SAME = {"TRAIN_STEPS": "20"}


@pytest.mark.parametrize("number", [1, 2, 9])
def test_processes_that_agree_all_go_on_and_the_port_is_free_again(number):
    address = free_address()
    processes = [(i, number, SAME) for i in reversed(range(number))]
    assert outcomes(processes, address) == [""] * number
    assert outcomes(processes, address) == [""] * number


def test_everybody_hears_who_is_missing():
    found = outcomes([(0, 4, SAME), (2, 4, SAME)], seconds=1.0)
    came = "2 of NUM_PROCESSES = 4 processes came within JOIN_TIMEOUT = 1 s; "
    assert found == [came + "missing: 1, 3"] * 2


def test_a_process_without_process_0_says_where_it_looked():
    address = free_address()
    began = time.monotonic()
    (said,) = outcomes([(1, 2, SAME)], address, seconds=0.5)
    assert time.monotonic() - began < 3
    assert said.startswith(
        f"process 1 found no process 0 at COORDINATOR_ADDRESS = {address!r} within "
        "JOIN_TIMEOUT = 0.5 s (Connection refused)"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((1, 3, SAME), "process 1 was started with NUM_PROCESSES = 3 and process 0 "),
        ((2, 2, SAME), "two processes say that they are process 2 of 2"),
        ((0, 2, {}), ""),
        (
            (1, 2, {"TRAIN_STEPS": "30", "jax": "0.9"}),
            "process 1 was started otherwise than process 0:\n"
            "  TRAIN_STEPS = 30, and on process 0 20\n  jax = 0.9, and on process 0 –",
        ),
    ],
)
def test_everybody_hears_of_a_process_that_differs(other, message):
    found = outcomes([(0, 2, SAME), other], seconds=1.0)
    if message:
        assert [said.startswith(message) for said in found] == [True, True]
    else:  # two of them preside: one of them cannot listen
        assert any("cannot listen on 127.0.0.1" in said for said in found)


def test_two_of_one_number_are_refused():
    found = outcomes([(0, 3, SAME), (1, 3, SAME), (1, 3, SAME)])
    assert all("two processes say that they are process 1 of 3" in s for s in found)


def test_strangers_are_not_counted():
    address = free_address()
    host, port = address.split(":")

    def knock() -> None:
        for words in (b"GET / HTTP/1.0\n", b"{}\n", b'{"is": 1}\n', b""):
            for _ in range(50):
                try:
                    with socket.create_connection((host, int(port))) as connection:
                        connection.sendall(words)
                        break
                except OSError:
                    time.sleep(0.02)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        met = pool.submit(outcomes, [(0, 2, SAME)], address, 3.0)
        knock()
        assert outcomes([(1, 2, SAME)], address, 3.0) == [""]
        assert met.result() == [""]


def test_process_0_listens_on_its_own_address_only():
    assert meet.own_address("10.1.2.3:99") == "10.1.2.3:99"
    assert meet.own_address("localhost:99") == "127.0.0.1:99"
    host = meet.own_address(f"{socket.gethostname()}:99").rpartition(":")[0]
    assert host not in ("0.0.0.0", "")
    with pytest.raises(ProcessError, match="is unknown here"):
        meet.own_address("no-such-host.invalid:99")
    (said,) = outcomes([(0, 2, SAME)], "192.0.2.1:45671", seconds=0.5)
    assert "process 0 cannot listen on 192.0.2.1:45671" in said
