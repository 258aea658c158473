"""Compiles a run's two programs with the TPU's own compiler, without a TPU.

The compiler can end its process, or take all memory, so it runs in a process of its own
that is watched.
"""

import dataclasses
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from launch.planning.compiler.hlo import Buffer
from launch.planning.compiler.records import Compiled, Failure, FailureKind, from_json
from launch.planning.hardware.topologies import Topology

_PACKAGES = Path(__file__).resolve().parents[3]
_WAIT_SECONDS = 0.1
_LAST_LINES = 12
INSTALL = (
    "install the TPU's compiler: `make tpu-compiler` in the repository, or "
    "`pip install 'switchyard[tpu]'`; no TPU is needed"
)
_SHRINK = (
    "cut more (FSDP, MESH_MODEL, MESH_CONTEXT), save less (REMAT, MICROBATCHES, "
    "VOCAB_CHUNKS, MOMENT_DTYPE), or take more chips"
)


def find_compiler(prefix: str = sys.prefix) -> str | None:
    """Returns the folder to import libtpu from, "" if it is installed, None if missing.

    Args:
        prefix: the environment beside which `make tpu-compiler` puts it.
    """
    if importlib.util.find_spec("libtpu") is not None:
        return ""
    beside = Path(prefix, "tpu-compiler")
    return str(beside) if (beside / "libtpu").is_dir() else None


def compile_step(
    config: str,
    topology: Topology,
    *,
    time_limit_s: float = 600,
    memory_limit_bytes: int = 12 * 2**30,
    compiler: str | None = None,
    hlo_file: str = "",
    evaluation: bool = True,
    allow_module: bool = False,
) -> Compiled | Failure:
    """Compiles the whole train step, and evaluation's, for a described topology.

    Flags of the configuration (XLA_FLAGS, LIBTPU_INIT_ARGS) are passed on; PLATFORM and
    SIMULATED_DEVICES are set aside.

    Args:
        config: gin text, such as `ResolvedConfig.operative`.
        topology: TPUs to compile for.
        time_limit_s: after which the compiler is ended.
        memory_limit_bytes: most memory of this machine that it may take, likewise.
        compiler: the folder of libtpu; by default what `find_compiler` finds.
        hlo_file: where to keep the compiled train step's text; "" keeps none.
        evaluation: whether evaluation's program is compiled as well.
        allow_module: whether code that the configuration names may be imported.
    Returns:
        What the compiler said, also where it failed: neither out of memory nor a crash
        raises.
    """
    if topology.chip.kind != "tpu":
        return Failure(
            "no_compiler",
            f"{topology} has GPUs: only a machine with one can compile for them",
            "plan with estimates alone, or for a TPU",
        )
    folder = find_compiler() if compiler is None else compiler
    if folder is None or (folder and not Path(folder, "libtpu").is_dir()):
        where = folder or f"the environment or in {Path(sys.prefix).name}/tpu-compiler"
        return Failure("no_compiler", f"no libtpu in {where}", INSTALL)
    with tempfile.TemporaryDirectory(prefix="switchyard-plan-") as scratch:
        Path(scratch, "config.gin").write_text(config, encoding="utf-8")
        command = [sys.executable, "-m", "launch.planning.compiler.child"]
        command += [scratch, str(topology), os.path.abspath(hlo_file or os.devnull)]
        command += ["evaluation"] if evaluation else []
        command += ["allow_module"] if allow_module else []
        ended = _watch(
            command,
            Path(scratch),
            _environment(folder),
            time_limit_s,
            memory_limit_bytes,
        )
        return _answer(ended, Path(scratch), time_limit_s, memory_limit_bytes)


def _environment(folder: str) -> dict[str, str]:
    """That of this process, without what would change what is compiled."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name
        not in (
            "XLA_FLAGS",
            "LIBTPU_INIT_ARGS",
            "JAX_NUM_CPU_DEVICES",
            "TPU_LIBRARY_PATH",
        )
        and not name.startswith("JAX_COMPILATION_CACHE")
    }
    before = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    paths = [*filter(None, [folder]), str(_PACKAGES), *before]
    return ours | {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else one process at a time
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


# -------------------------------------------------------------------------- watching


class _Ended(NamedTuple):
    code: int | None  # None if it was ended from here
    reason: str  # "", "time" or "memory"
    seconds: float
    peak_bytes: int


def _watch(
    command: list[str],
    scratch: Path,
    environment: Mapping[str, str],
    time_limit_s: float,
    memory_limit_bytes: int,
) -> _Ended:
    """Runs a process in a group of its own, and ends that group at either limit."""
    start, peak = time.monotonic(), 0
    with (
        open(scratch / "stdout", "wb") as stdout,
        open(scratch / "stderr", "wb") as stderr,
    ):
        child = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    reason = ""
    try:
        while child.poll() is None:
            peak = max(peak, _resident_bytes(child.pid))
            if time.monotonic() - start > time_limit_s:
                reason = "time"
            elif peak > memory_limit_bytes:
                reason = "memory"
            if reason:
                break
            time.sleep(_WAIT_SECONDS)
    finally:  # also when this process is interrupted
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    code = None if reason else child.returncode
    return _Ended(code, reason, time.monotonic() - start, peak)


def _resident_bytes(group: int) -> int:
    """Memory of all processes of a group; 0 where the system does not tell."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                pages = (folder / "statm").read_text().split()[1]
                total += int(pages) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue  # it has just ended
    return total


# --------------------------------------------------------------------------- answers


def _answer(
    ended: _Ended, scratch: Path, time_limit_s: float, memory_limit_bytes: int
) -> Compiled | Failure:
    """Reads the child's result, or says why there is none.

    The train step's is there while evaluation's is made: what ends the process then is
    evaluation's failure alone.
    """
    result = scratch / "result.json"
    found = from_json(result.read_text(encoding="utf-8")) if result.exists() else None
    if ended.code == 0 and found is not None:
        return found
    failure = _ended_early(ended, scratch, time_limit_s, memory_limit_bytes)
    if isinstance(found, Compiled):
        return dataclasses.replace(found, evaluation=failure, fits=False)
    return failure


def _ended_early(
    ended: _Ended, scratch: Path, time_limit_s: float, memory_limit_bytes: int
) -> Failure:
    said = _last_lines(scratch / "stderr")
    kind: FailureKind
    if ended.reason == "time":
        kind, message = "timed_out", f"no answer within {time_limit_s:g} s"
        advice = "raise the time limit, or plan fewer layers: time grows with them"
    elif ended.reason == "memory":
        kind = "killed"
        message = (
            f"compiling took more than {memory_limit_bytes / 2**30:.1f} GiB of this "
            f"machine's memory, after {ended.seconds:.0f} s"
        )
        advice = "raise the memory limit, or compile on a machine that has more"
    else:
        assert ended.code is not None
        kind = "crashed"
        message = f"the compiler ended its process {_ending(ended.code)}; last it said:"
        message += f"\n{said}" if said else " nothing"
        advice = (
            "the compiler's fault, not the configuration's: try another mesh, "
            "transport, or flags"
        )
        if re.search(r"Unknown (flag|command line flag)|unknown flag", said, re.I):
            kind, advice = "rejected", "take the flag out of XLA_FLAGS, or of the other"
    return Failure(
        kind, message, advice, seconds=ended.seconds, peak_host_bytes=ended.peak_bytes
    )


def _ending(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _last_lines(file: Path) -> str:
    """The end of what a process said, without its notices."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [
        line for line in lines if line.strip() and not line.startswith(("W0", "I0"))
    ]
    return "\n".join(line[:400] for line in kept[-_LAST_LINES:])


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)i?B?"


def out_of_memory(message: str, seconds: float = 0.0) -> Failure:
    """Reads what the compiler says when the chip's memory is too small.

    It has two ways: early, the sum of the temporaries alone; and late, all bytes and
    the largest allocations.
    """
    needed = available = None
    if early := re.search(
        rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
        message,
    ):
        needed, available = _size(*early.groups()[:2]), _size(*early.groups()[2:])
    elif late := re.search(rf"Used {_SIZE} of {_SIZE} hbm", message):
        needed, available = _size(*late.groups()[:2]), _size(*late.groups()[2:])
    buffers = [
        Buffer(_size(size, unit), shape, source or "", name)
        for size, unit, name, source, shape in re.findall(
            rf"Size: {_SIZE}\n(?:.*\n)*?\s*Operator: op_name=\"([^\"]*)\""
            r"(?: source_file=\"([^\"]*)\")?.*\n(?:.*\n)*?\s*Shape: (\S+)",
            message,
        )
    ]
    return Failure(
        "out_of_memory",
        message.splitlines()[0],
        _SHRINK,
        needed_bytes=needed,
        available_bytes=available,
        largest_buffers=tuple(buffers),
        seconds=seconds,
    )


def _size(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
