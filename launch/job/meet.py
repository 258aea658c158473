"""Processes of one job find one another, before jax does.

jax's own rendezvous aborts the process when somebody is missing, is there twice, or was
given another number of processes. So each process first tells process 0 who it is and
what it was configured with, over a connection to the address that jax will then use;
process 0 tells everybody whether all are there and agree. Standard library only.
"""

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from launch.errors import ProcessError

_LONGEST_LINE = 1 << 20  # of JSON, in bytes
_RETRY_SECONDS = 0.2
_REPLY_SECONDS = 5.0  # that a process has to say who it is
_SHOWN = 5  # differences that a message names
_PROTOCOL = "switchyard roll call 1"


def call(
    address: str,
    process: int,
    number: int,
    facts: Mapping[str, str],
    *,
    bind_address: str,
    timeout_seconds: float,
) -> dict[int, socket.socket]:
    """Returns when all processes of a job have met and agree.

    Args:
        address: "host:port" of process 0.
        process: who this is.
        number: how many there are.
        facts: what must be the same everywhere, by the name of what to change.
        bind_address: "host:port" that process 0 listens on.
        timeout_seconds: to wait for all.
    Returns:
        Open connections by process: those of process 0 to all others, that of another
        to process 0. When a process dies its connections close, at once.
    Raises:
        ProcessError: on all that have come, with what is wrong.
    """
    deadline = time.monotonic() + timeout_seconds
    mine = {"is": _PROTOCOL, "process": process, "number": number, "facts": {**facts}}
    if process == 0:
        return _preside(bind_address, mine, deadline, timeout_seconds)
    return {0: _attend(address, mine, deadline, timeout_seconds)}


def own_address(address: str) -> str:
    """The address to listen on: that of process 0, on no other interface.

    Some systems resolve their own name to a loopback address, which no other machine
    could reach; then it is the address that packets to others leave from.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return address
    try:
        resolved = socket.gethostbyname(host)
    except OSError as error:
        raise ProcessError(
            f"the host of COORDINATOR_ADDRESS = {address!r} is unknown here: "
            f"{error.strerror or error}"
        ) from error
    if host != "localhost" and ipaddress.ip_address(resolved).is_loopback:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        ):
            probe.connect(("192.0.2.1", 9))  # no packet is sent to choose a route
            resolved = probe.getsockname()[0]
    return f"{resolved}:{port}"


def _preside(
    bind_address: str, mine: dict[str, Any], deadline: float, timeout_seconds: float
) -> dict[int, socket.socket]:
    """Process 0 waits for the others and tells each how it went."""
    number = mine["number"]
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(
                socket.create_server(
                    _pair(bind_address), family=_family(bind_address), backlog=number
                )
            )
        except OSError as error:
            raise ProcessError(
                f"process 0 cannot listen on {bind_address}: "
                f"{error.strerror or error}. COORDINATOR_ADDRESS must be an address of "
                "this machine, with a port that nobody uses; behind another one, "
                "export JAX_COORDINATOR_BIND_ADDRESS"
            ) from error
        present: dict[int, socket.socket] = {}
        fault = ""
        while len(present) < number - 1 and not fault:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = sorted({*range(1, number)} - present.keys())
                named = ", ".join(map(str, missing[:20]))
                fault = (
                    f"{len(present) + 1} of NUM_PROCESSES = {number} processes came "
                    f"within JOIN_TIMEOUT = {timeout_seconds:g} s; missing: {named}"
                    f"{' ...' if len(missing) > 20 else ''}"
                )
                break
            stack.enter_context(connection)
            connection.settimeout(_REPLY_SECONDS)
            theirs = _read(connection)
            if theirs is None:
                continue  # a stranger
            fault = _fault(mine, theirs, present)
            present[theirs["process"] if not fault else -1] = connection
        for connection in present.values():
            _send(connection, {"is": _PROTOCOL, "fault": fault})
        if fault:
            raise ProcessError(fault)
        stack.pop_all()  # they stay open
        listener.close()
        return present


def _attend(
    address: str, mine: dict[str, Any], deadline: float, timeout_seconds: float
) -> socket.socket:
    """Another process tells process 0 who it is, and hears how it went."""
    why = ""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ProcessError(
                f"process {mine['process']} found no process 0 at COORDINATOR_ADDRESS "
                f"= {address!r} within JOIN_TIMEOUT = {timeout_seconds:g} s ({why}): "
                "start it there, or open that port between the machines"
            )
        try:
            connection = socket.create_connection(_pair(address), timeout=left)
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(_RETRY_SECONDS, left))
            continue
        # Process 0 answers at its own deadline; it may have begun to wait later.
        connection.settimeout(timeout_seconds + _REPLY_SECONDS)
        _send(connection, mine)
        answer = _read(connection)
        if answer is not None and answer.get("fault") == "":
            return connection
        connection.close()
        if answer is not None and "fault" in answer:
            raise ProcessError(answer["fault"])
        why = "what listens there is not process 0 of this job"
        time.sleep(_RETRY_SECONDS)


def _fault(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], present: Mapping[int, Any]
) -> str:
    """What is wrong with a process that came; "" if nothing is."""
    process, number = theirs["process"], mine["number"]
    if theirs["number"] != number:
        return (
            f"process {process} was started with NUM_PROCESSES = {theirs['number']} "
            f"and process 0 with {number}: give all the same"
        )
    if not 0 < process < number or process in present:
        return (
            f"two processes say that they are process {process} of {number}: give each "
            "its own PROCESS_ID, by JAX_PROCESS_ID in its environment"
        )
    ours, others = mine["facts"], theirs["facts"]
    different = [n for n in {**ours, **others} if ours.get(n) != others.get(n)]
    if not different:
        return ""
    rows = [
        f"  {name} = {others.get(name, '–')}, and on process 0 {ours.get(name, '–')}"
        for name in different[:_SHOWN]
    ]
    more = len(different) - _SHOWN
    return "\n".join(
        [
            f"process {process} was started otherwise than process 0:",
            *rows,
            *([f"  and {more} more"] if more > 0 else []),
            "Give all processes the same files and knobs, and the same versions",
        ]
    )


def _read(connection: socket.socket) -> dict[str, Any] | None:
    """One line of JSON of this protocol; None from whoever speaks another."""
    text = b""
    try:
        while not text.endswith(b"\n"):
            piece = connection.recv(1 << 16)
            if not piece or len(text) > _LONGEST_LINE:
                return None
            text += piece
        said = json.loads(text)
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict) or said.get("is") != _PROTOCOL:
        return None
    whole = isinstance(said.get("process"), int) and isinstance(said.get("facts"), dict)
    return said if whole or "fault" in said else None


def _send(connection: socket.socket, said: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # whoever has gone hears nothing
        connection.sendall(json.dumps(said).encode() + b"\n")


def _pair(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in _pair(address)[0] else socket.AF_INET
