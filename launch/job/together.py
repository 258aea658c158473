"""Several processes that run one job, by `jax.distributed`.

Every process runs the same program on its own devices. Process 0 alone writes what is
written once (metrics, config.gin, the report) and speaks; the others are heard when
something is wrong.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO, TypeVar

from launch.config import devices
from launch.config.reader import ResolvedConfig
from launch.config.settings import PlatformSettings
from launch.errors import ConfigError, ProcessError
from launch.job.abort import hold_aborts
from launch.job.end import WEEK_MILLISECONDS, Bell, client

T = TypeVar("T")
Work = Callable[[], int]

_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
# What says that this process is one of several.
OF_A_JOB = frozenset({"JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", *_RANKS})


@dataclasses.dataclass(frozen=True)
class Job:
    """One of the processes of a job.

    Attributes:
        process: its number, from 0.
        number: how many there are.
        address: "host:port" of process 0.
        local_devices: which devices of its machine it uses; None: all.
    """

    process: int
    number: int
    address: str
    local_devices: list[int] | None = None

    def __str__(self) -> str:
        """Such as "process 0 of 2, which meet at 10.0.0.1:9876"."""
        return f"process {self.process} of {self.number}, which meet at {self.address}"


def find(
    platform: PlatformSettings, environ: Mapping[str, str] = os.environ
) -> Job | None:
    """Finds out which process of which job this is; None if it is alone.

    Raises:
        ProcessError: neither the configuration nor the environment says.
        DeviceError: nor is its platform here.
    """
    if platform.num_processes == 1:
        return None
    address = environ.get("JAX_COORDINATOR_ADDRESS") or platform.coordinator_address
    process = _process_id(platform, environ)
    if platform.num_processes and address and process is not None:
        number = platform.num_processes
        job = Job(process, number, address)
    else:
        job = _ask_launcher(platform, address, process)
    if job.number == 1:
        return None
    if not 0 <= job.process < job.number:
        raise ProcessError(
            f"this is process {job.process} of NUM_PROCESSES = {job.number}: they are "
            "counted from 0, and each has its own JAX_PROCESS_ID or PROCESS_ID"
        )
    return job


def run(job: Job | None, work: Work, config: ResolvedConfig) -> int:
    """Runs a command as one of the processes of a job, together with the others.

    Args:
        job: which of them; None: this process is alone.
        work: the command.
        config: what all must be given alike.
    Returns:
        The command's exit code. When any process fails, this one ends here.
    """
    if job is None:
        return work()
    import jax

    lines = _join(job, config)
    hold_aborts()
    silence = config.settings.platform.heartbeat_timeout_seconds
    with _streams(job) as say:
        bell = Bell(job.process, lines, say, silence)
        try:
            _refuse_other_devices(job, config)
            code = work()
            together("the end of the command")
        # Whatever it is, the others must hear of it, and not wait.
        except BaseException as error:
            bell.fail(error)
        bell.done()
    jax.distributed.shutdown()
    return code


def is_first() -> bool:
    """Whether this process writes and says what is said once."""
    import jax

    return jax.process_index() == 0


def together(what: str) -> None:
    """Waits until all processes have come here; does nothing if there is one."""
    import jax

    if jax.process_count() > 1:
        client().wait_at_barrier(what, WEEK_MILLISECONDS)


def first_alone(what: str, first: Callable[[], T], others: Callable[[], T]) -> T:
    """Does work in process 0, and other work in the others after it.

    For what process 0 makes and the others find. If it fails there, all end.
    """
    if is_first():
        result = first()
        together(what)
        return result
    together(what)
    return others()


def as_first_finds(what: str, find: Callable[[], T]) -> T:
    """Returns what process 0 finds on a disk, the same in all processes of a job.

    Others may be shown a shared folder as it was a minute ago.

    Args:
        what: names it, once in a job.
        find: returns what JSON can say.
    """
    import jax

    if jax.process_count() == 1:
        return find()
    key = f"switchyard/found/{what}"
    if is_first():
        found = find()
        client().key_value_set(key, json.dumps(found))
        return found
    return json.loads(client().blocking_key_value_get(key, WEEK_MILLISECONDS))


def asked_to_stop(ask: int) -> int | None:
    """The signal to stop at this ask, the same answer in all processes of a job.

    A signal to any of them stops all, at an ask that all can still come to. Every
    process must ask at the same points of its work.

    Args:
        ask: how many there were before, and this one.
    """
    from jax.experimental import multihost_utils

    if multihost_utils.reached_preemption_sync_point(ask):
        return signal.SIGTERM
    return None


# ----------------------------------------------------------------- finding one another


def _process_id(platform: PlatformSettings, environ: Mapping[str, str]) -> int | None:
    """What was exported for jax, else what is configured, else the launcher's rank."""
    names = ["JAX_PROCESS_ID", *(_RANKS if platform.process_id < 0 else ())]
    for name in names:
        if text := environ.get(name):
            if not text.isdecimal():
                raise ProcessError(f"{name}={text} is not the number of a process")
            return int(text)
    return platform.process_id if platform.process_id >= 0 else None


def _ask_launcher(platform: PlatformSettings, address: str, process: int | None) -> Job:
    """Fills in what the launcher of the cluster knows."""
    # jax knows them (SLURM, Open MPI, TPU pods, Kubernetes), and shows it nowhere else.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        address or None,
        platform.num_processes or None,
        process,
        None,
        None,
        platform.join_timeout_seconds,
    )
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID (or JAX_PROCESS_ID)")
    missing = [name for name, x in zip(names, found, strict=False) if x is None]
    if missing:
        devices.here(platform)  # a machine without them is no part of a cluster
        raise ProcessError(
            f"NUM_PROCESSES = {platform.num_processes}, and no launcher (SLURM, Open "
            f"MPI, a TPU pod, Kubernetes) says more: set {', '.join(missing)}, or "
            "NUM_PROCESSES = 1 for a process that is alone"
        )
    where, number, rank, local_devices = found
    assert where is not None
    assert number is not None
    assert rank is not None
    return Job(rank, number, where, None if local_devices is None else [*local_devices])


def _join(job: Job, config: ResolvedConfig) -> dict[int, socket.socket]:
    """Meets the others, then lets jax do the same."""
    import jax

    from launch.job import meet  # of several processes alone

    platform = config.settings.platform
    bind_address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    if not bind_address:
        bind_address = (
            meet.own_address(job.address) if job.process == 0 else job.address
        )
    facts = {
        knob.macro: repr(knob.value)
        for knob in config.knobs
        if knob.macro != "PROCESS_ID"
    }
    facts["version of switchyard"] = importlib.metadata.version("switchyard")
    facts["version of jax"] = jax.__version__
    lines = meet.call(
        job.address,
        job.process,
        job.number,
        facts,
        bind_address=bind_address,
        timeout_seconds=platform.join_timeout_seconds,
    )
    jax.distributed.initialize(
        job.address,
        job.number,
        job.process,
        local_device_ids=job.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=platform.join_timeout_seconds,
        # Who is alive our own connections tell, and with a message. jax would abort.
        heartbeat_timeout_seconds=10 * platform.heartbeat_timeout_seconds,
        coordinator_bind_address=bind_address,
    )
    return lines


def _refuse_other_devices(job: Job, config: ResolvedConfig) -> None:
    """A process without a part of the mesh would have nothing to do."""
    here = len(devices.here(config.settings.platform))
    wanted = config.settings.mesh.num_devices
    if here != wanted:
        raise ConfigError(
            config.where,
            [
                f"the {job.number} processes have {here} devices together, and the "
                f"mesh has {wanted}: set the MESH_ axes so that their product is {here}"
            ],
        )


# ------------------------------------------------------------------------- the voice


class _Prefixed(io.TextIOBase):
    """Says at the start of each line which process says it."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix
        self._at_start = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._at_start else line)
            self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


@contextlib.contextmanager
def _streams(job: Job) -> Iterator[Callable[[str], None]]:
    """Process 0 speaks as always; of the others errors are heard, with their number.

    Gloo greets on the standard output of every process, below Python: not where
    results go.
    """
    out, errors = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        if out is sys.__stdout__ and out is not None:
            out.flush()
            kept = os.dup(out.fileno())
            os.dup2(nowhere.fileno(), out.fileno())
            sys.stdout = open(  # noqa: SIM115
                kept, "w", encoding=out.encoding, errors="replace", buffering=1
            )
        if job.process:
            sys.stdout = nowhere
            sys.stderr = _Prefixed(errors, f"process {job.process}: ")

        try:
            yield functools.partial(print, file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = out, errors
