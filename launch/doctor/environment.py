"""Variables that change what a run does: from a list, so that no key is ever shown."""

import os
import re
from collections.abc import Mapping

from launch.config.platform import CPU_FLAG, uses_cpu
from launch.doctor.line import Line, Verdict

# Nothing else is shown: not what is set besides, and not that it is.
ALLOWED = (
    "JAX_PLATFORMS",
    "JAX_NUM_CPU_DEVICES",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_X64",
    "JAX_DISABLE_JIT",
    "JAX_DEBUG_NANS",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION",
    "JAX_COORDINATOR_ADDRESS",
    "JAX_COORDINATOR_BIND_ADDRESS",
    "JAX_PROCESS_ID",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    "CUDA_VISIBLE_DEVICES",
    "TPU_VISIBLE_CHIPS",
    "TPU_PROCESS_BOUNDS",
    "TPU_CHIPS_PER_PROCESS_BOUNDS",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PYTHONOPTIMIZE",
    "LC_ALL",
    "LANG",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_RIGHT = ("", "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT")  # values of CPU_FLAG
_ON = ("1", "true", "yes", "on")
_OLDER_DEVICES = "--xla_force_host_platform_device_count"
_LONGEST = 200  # characters of a value that are shown


def variables(environ: Mapping[str, str] = os.environ) -> list[Line]:
    """Returns the variables of the list that are set, and what they do."""
    lines = []
    for name in ALLOWED:
        if name in environ:
            value = environ[name][:_LONGEST]
            note = _note(name, value)
            verdict: Verdict = "note" if note else "fine"
            lines.append(Line("environment", name, value or '""', verdict, note))
    return lines


def _note(name: str, value: str) -> str:
    """What a value does that its user may not want."""
    on = value.lower() in _ON
    if name == "JAX_DISABLE_JIT" and on:
        return "nothing is compiled, and a step takes minutes: unset it"
    if name == "JAX_DEBUG_NANS" and on:
        return "every operation is checked, and steps are slower: unset it"
    if name == "JAX_ENABLE_X64" and on:
        return "numbers are float64 where nobody says float32: unset it"
    if name == "CUDA_VISIBLE_DEVICES" and value in ("", "-1"):
        return "it hides every GPU: unset it to use them"
    if name == "PYTHONOPTIMIZE" and value not in ("", "0"):
        return "it takes out Switchyard's checks of itself: unset it"
    return ""


def flags(environ: Mapping[str, str] = os.environ) -> list[Line]:
    """Returns each flag of the compilers, as a run would have it."""
    lines = []
    for name in FLAGS:
        given = environ.get(name, "").split()
        if not given:
            lines.append(Line("compilers", name, "none"))
        for flag in given:
            fault = _fault(flag, environ) if name == "XLA_FLAGS" else ""
            lines.append(
                Line(
                    "compilers",
                    name,
                    flag[:_LONGEST],
                    "note" if fault else "fine",
                    fault,
                )
            )
    return lines


def _fault(flag: str, environ: Mapping[str, str]) -> str:
    """What is known of a flag, or is wrong with how it is written."""
    if not re.fullmatch(r"--\w+(=\S*)?", flag):
        return "it is not written --name=value: XLA may end the process at it"
    wrong = flag.startswith(CPU_FLAG) and flag.removeprefix(CPU_FLAG) not in _RIGHT
    if wrong and uses_cpu(environ):
        return (
            "XLA's CPU compiler is known to compute wrong numbers with it "
            f"(docs/hardware.md): take it out, and {CPU_FLAG} is set in its place"
        )
    if flag.startswith(_OLDER_DEVICES):
        return "it wins over SIMULATED_DEVICES: leave the number to that knob"
    return ""
