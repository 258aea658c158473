"""The devices that jax finds, and a first small program on them.

    python -m launch.doctor.accelerator PLATFORM

prints both as JSON. A process alone is asked in a child: a flag that a compiler does
not know ends the process, and a device that somebody else holds may never answer.
"""

import collections
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from launch.config.settings import MeshSettings, PlatformSettings
from launch.doctor import shadows
from launch.doctor.line import Line
from launch.errors import EXIT_DONE, UserError
from launch.terminal.lines import compact, duration, waiting

TIME_LIMIT_SECONDS = 300.0
_SLOW_SECONDS = 60.0
_SIZE = 256  # rows and columns of what the small program multiplies
_SAID_LINES = 3  # of a child that ended early


@dataclasses.dataclass(frozen=True)
class Devices:
    """What jax said of the devices of one process.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kinds: number of devices of each kind, of all processes.
        local: how many are of this process.
        memory_bytes: what a program may have of each that says so.
        start_seconds: until jax was imported and had found them; None in a job,
            which has started it before.
        first_seconds: time to compile the small program and to run it.
        again_seconds: time to run it once more.
        wrong: what the check of the CPU's compiler says; "" if it is right.
    """

    platform: str
    kinds: dict[str, int]
    local: int
    memory_bytes: int | None
    start_seconds: float | None
    first_seconds: float
    again_seconds: float
    wrong: str


def ask(platform: PlatformSettings) -> Devices:
    """Starts jax in this process, and runs the small program.

    Raises:
        DeviceError: jax finds no device.
    """
    began, started = time.monotonic(), "jax" in sys.modules
    import jax
    import numpy as np

    from launch.config import devices
    from launch.run import compiler_check

    found = devices.here(platform)
    local = jax.local_devices()
    start = None if started else time.monotonic() - began
    x = jax.device_put(np.full((_SIZE, _SIZE), 0.5, np.float32), local[0])
    program = jax.jit(lambda x: (x @ x).sum())
    seconds = []
    for _ in range(2):
        began = time.monotonic()
        program(x).block_until_ready()
        seconds.append(time.monotonic() - began)
    wrong = ""
    try:
        compiler_check.check()
    except compiler_check.CompilerCheckError as error:
        wrong = str(error)
    limits = [(one.memory_stats() or {}).get("bytes_limit") for one in local]
    known = [int(limit) for limit in limits if limit]
    return Devices(
        platform=local[0].platform,
        kinds=dict(collections.Counter(one.device_kind for one in found)),
        local=len(local),
        memory_bytes=min(known, default=None),
        start_seconds=start,
        first_seconds=seconds[0],
        again_seconds=seconds[1],
        wrong=wrong,
    )


def ask_child(platform: PlatformSettings, *, quiet: bool) -> Devices | str:
    """Asks a process of its own; returns in a sentence why there is no answer."""
    ours = [str(shadows.ours()), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, ours))}
    command = [sys.executable, "-P", "-m", __name__, platform.name]
    with (
        waiting("starting jax, and a first program", quiet=quiet),
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as errors,
    ):
        try:
            code = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                timeout=TIME_LIMIT_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"no answer within {TIME_LIMIT_SECONDS:.0f} s"
        said, answer = _text(errors), _text(out)
    with contextlib.suppress(ValueError, TypeError, IndexError):
        found = json.loads(answer.splitlines()[-1])
        return found["error"] if "error" in found else Devices(**found)
    last = " / ".join(line.strip() for line in said.splitlines()[-_SAID_LINES:])
    return f"jax ended with code {code}: {last[-400:] or 'it said nothing'}"


def lines(
    found: Devices | str, platform: PlatformSettings, mesh: MeshSettings
) -> Iterator[Line]:
    """Yields what there is to say of the devices.

    Args:
        found: what jax said of them, or why it said nothing.
        platform: the configuration's.
        mesh: likewise.
    """
    group = "devices"
    if isinstance(found, str):
        advice = (
            "end what else holds the devices, take flags out that the compiler does "
            "not know, or take another hardware file, such as hardware/cpu1.gin"
        )
        yield Line(group, "devices", found, "problem", advice)
        return
    kinds = ", ".join(f"{n} × {kind}" for kind, n in found.kinds.items())
    number = sum(found.kinds.values())
    here = "" if found.local == number else f", {found.local} of them here"
    yield _of_mesh(f"{found.platform}: {kinds}{here}", number, platform, mesh)
    if found.memory_bytes is not None:
        yield Line(group, "memory of each", compact(found.memory_bytes, "B"))
    if found.start_seconds is not None:
        yield Line(group, "start of jax", duration(found.start_seconds))
    again = max(found.again_seconds, 1e-3)
    took = f"{duration(found.first_seconds)} with compiling, then {duration(again)}"
    if found.first_seconds > _SLOW_SECONDS:
        advice = "compiling is very slow here: see that no other work takes the cores"
        yield Line(group, "first program", took, "note", advice)
    else:
        yield Line(group, "first program", took)
    if found.wrong:
        first, *_, last = found.wrong.splitlines()
        yield Line(group, "compiler", first.rstrip(":"), "problem", last)
    elif found.platform == "cpu":
        yield Line(group, "compiler", "agrees with NumPy on programs known to go wrong")


def _of_mesh(
    value: str, number: int, platform: PlatformSettings, mesh: MeshSettings
) -> Line:
    """Whether the devices are as many as the mesh has."""
    wanted = mesh.num_devices
    if number < wanted:
        advice = (
            f"the mesh has {wanted} devices: set the MESH_ axes so that their product "
            f"is {number}, or start more processes"
        )
        if platform.name in ("auto", "cpu"):
            advice += f", or simulate them: SIMULATED_DEVICES = {wanted}"
        return Line("devices", "devices", value, "problem", advice)
    if number > wanted:
        advice = f"the mesh takes {wanted} of them: set its MESH_ axes to use all"
        return Line("devices", "devices", value, "note", advice)
    return Line("devices", "devices", value)


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def main() -> int:
    """Prints what jax says, or in one sentence why it says nothing."""
    answer: dict[str, Any]
    try:
        answer = dataclasses.asdict(ask(PlatformSettings(name=sys.argv[1])))  # type: ignore[arg-type]
    except UserError as error:
        answer = {"error": str(error)}
    print(f"\n{json.dumps(answer)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
