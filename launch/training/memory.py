"""What a run says when the memory of its devices is too small for it."""

import contextlib
import math
from collections.abc import Iterator

import jax

from launch.checkpoints.store import named_arrays
from launch.config.settings import Settings
from launch.errors import UserError
from launch.run.assemble import Run

_GIB = 2**30
_SHOWN = 4  # of what is large
_OF_STATE = frozenset({"parameters", "optimizer", "counters"})


class OutOfMemoryError(UserError):
    """The memory of the devices is too small for the run.

    The same command would end in the same way, so it is not for a supervisor.
    """


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Makes one message of what compilers and allocators say about memory.

    Raises:
        OutOfMemoryError: there is too little of it, with what is large and what helps.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explanation(run, str(error))) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is about the memory of devices; of a full disk the same code tells."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text and "No space left" not in text


def explanation(run: Run, said: str) -> str:
    """Returns the message: what was asked for, what is large, which knobs help.

    Args:
        run: the run.
        said: words of the compiler or the allocator.
    """
    # With all of planning, which a run that goes well never needs.
    from launch.planning.compiler.compile import out_of_memory
    from launch.planning.cost.memory import predict

    device = run.mesh.devices.flat[0]
    settings, plan = run.settings, predict(run.settings, device.platform)
    found = out_of_memory(said)
    held = "; ".join(
        f"{name} {_size(number)}"
        for name, number in [*plan.categories.items()][:_SHOWN]
    )
    lines = [
        f"the memory of a device is too small for this run: {found.message[:300]}",
        f"by arithmetic, each of the {run.mesh.devices.size} devices holds "
        f"{_size(plan.total)}{_limit(device)}: {held}",
        f"its largest arrays: {'; '.join(_largest_arrays(run))}",
    ]
    if found.needed_bytes and found.available_bytes:
        needed, there = _size(found.needed_bytes), _size(found.available_bytes)
        lines.insert(1, f"the compiler needs {needed} of {there}")
    if found.largest_buffers:
        buffers = [
            f"{_size(b.bytes)} {b.shape}" for b in found.largest_buffers[:_SHOWN]
        ]
        lines.append(f"the compiler's largest: {'; '.join(buffers)}")
    of_state = sum(plan.categories[name] for name in _OF_STATE) > plan.total / 2
    lines += [
        f"what helps: {'; '.join(remedies(settings, device.platform, of_state))}",
        "`switchyard plan` says of any of these, before it is tried, whether it fits",
    ]
    return "\n  ".join(lines)


def remedies(settings: Settings, platform: str, of_state: bool) -> list[str]:
    """Returns the knobs that would save memory, those that save most first.

    Args:
        settings: settings of the run.
        platform: what its devices are.
        of_state: whether the state takes most of the memory; else what comes and goes.
    """
    mesh, train, execution = settings.mesh, settings.train, settings.execution
    optimizer, vocabulary = settings.optimizer, settings.model.vocab_size
    state, passing = [], []
    if (
        settings.partition.fsdp in ("none", "optimizer")
        and mesh.data * mesh.context > 1
    ):
        state.append('FSDP = "data"')
    if not optimizer.offload and platform != "cpu":
        state.append("OFFLOAD_OPTIMIZER = True")
    if optimizer.moment_dtype == "float32":
        state.append('MOMENT_DTYPE = "bfloat16"')
    rows = train.batch_size // mesh.batch_shards
    pieces = [n for n in range(train.microbatches + 1, rows + 1) if rows % n == 0]
    if pieces:
        passing.append(f"MICROBATCHES = {pieces[0]} (now {train.microbatches})")
    if execution.remat != "full":
        passing.append(f'REMAT = "full" (now "{execution.remat}")')
    chunks = execution.vocab_chunks
    if finer := [n for n in range(chunks + 1, 65) if vocabulary % n == 0]:
        passing.append(f"VOCAB_CHUNKS = {finer[0]} (now {chunks})")
    both = [*state, *passing] if of_state else [*passing, *state]
    return [*both, "more devices (MESH_MODEL, MESH_EXPERT, MESH_DATA with FSDP)"]


def _largest_arrays(run: Run) -> list[str]:
    """The largest arrays of the state, as one device has them."""
    sizes = {
        path: math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
        for path, shape in named_arrays(run.placed_shapes()).items()
    }
    largest = sorted(sizes, key=lambda path: -sizes[path])[:_SHOWN]
    return [f"{path} {_size(sizes[path])}" for path in largest]


def _limit(device: jax.Device) -> str:
    """What a device may use, where it says so."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if limit := (device.memory_stats() or {}).get("bytes_limit"):
            return f" of {_size(limit)}"
    return ""


def _size(number: float) -> str:
    if number >= _GIB / 100:
        return f"{number / _GIB:,.2f} GiB"
    return f"{number / 2**20:,.2f} MiB"
