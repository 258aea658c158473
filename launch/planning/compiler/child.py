"""Compiles a run's programs for a described topology, and leaves the answer in a file.

    python -m launch.planning.compiler.child FOLDER TOPOLOGY HLO_FILE [WORD ...]

Words: evaluation, to compile it too; allow_module, to import what the configuration
names and is not Switchyard's own.

Run by `launch.planning.compiler.compile`, whose process survives whatever the compiler
does.
"""

import contextlib
import dataclasses
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import reader
from launch.config.platform import prepare_environment
from launch.config.settings import PlatformSettings
from launch.errors import ConfigError, is_user_error
from launch.planning.compiler.compile import out_of_memory
from launch.planning.compiler.hlo import Buffer
from launch.planning.compiler.records import Compiled, Evaluation, Failure, to_json
from launch.planning.hardware.topologies import Topology, parse, problems

if TYPE_CHECKING:
    import jax

    from launch.run.assemble import Run

_MOST_COLLECTIVES = 200


def main(folder: str, topology_name: str, hlo_file: str, *words: str) -> None:
    """Compiles, and writes `result.json` into the folder.

    First the train step's answer alone: evaluation may end this process.
    """
    start = time.monotonic()
    topology = parse(topology_name)
    config_file = Path(folder, "config.gin")
    try:
        run, record = _compile(
            config_file, topology, hlo_file, allow_module="allow_module" in words
        )
    except Exception as error:
        _write(folder, _failure(error, topology, start))
        return
    _write(folder, record)
    if "evaluation" not in words:
        return
    start = time.monotonic()
    evaluation: Evaluation | Failure
    try:
        evaluation = _compile_evaluation(run, record)
        fits = evaluation.total_bytes <= record.memory_bytes
    except Exception as error:
        evaluation, fits = _failure(error, topology, start), False
    both = dataclasses.replace(record, evaluation=evaluation, fits=record.fits and fits)
    _write(folder, both)


def _write(folder: str, record: Compiled | Failure) -> None:
    """Writes what is known so far, whole or not at all."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    record = dataclasses.replace(record, peak_host_bytes=peak)
    unfinished = Path(folder, "unfinished.json")
    unfinished.write_text(to_json(record), encoding="utf-8")
    unfinished.replace(Path(folder, "result.json"))


def _failure(error: Exception, topology: Topology, start: float) -> Failure:
    """What came of compiling instead of a program, that many seconds after `start`."""
    failure = _kind_of_failure(error, topology)
    return dataclasses.replace(failure, seconds=time.monotonic() - start)


def _kind_of_failure(error: Exception, topology: Topology) -> Failure:
    """Tells a chip that is too small from a program that is refused, and a fault."""
    message = str(error)
    if isinstance(error, OutOfMemoryError):
        failure = out_of_memory(message)
        listed = failure.largest_buffers or error.largest_buffers
        return dataclasses.replace(failure, largest_buffers=listed)
    if isinstance(error, NoCompilerError):
        return Failure(
            "no_compiler", message, "`make tpu-compiler` installs the one that matches"
        )
    if is_user_error(error):
        return Failure("rejected", message, "change what it names")
    if type(error).__name__ == "JaxRuntimeError":
        return Failure(
            "rejected",
            message,
            f"the compiler for {topology} refuses this program: try another mesh, "
            "TRANSPORT, or flags",
        )
    return Failure(
        "crashed",
        "".join(traceback.format_exception(error)[-3:]) + message,
        "an error of Switchyard or of jax, before the compiler was asked",
    )


class OutOfMemoryError(Exception):
    """The chip is too small; with the largest values of what was to be compiled."""

    def __init__(self, message: str, largest_buffers: tuple[Buffer, ...]) -> None:
        self.largest_buffers = largest_buffers
        super().__init__(message)


class NoCompilerError(Exception):
    """libtpu is missing, or cannot describe what was asked."""


def _compile(
    config_file: Path, topology: Topology, hlo_file: str, *, allow_module: bool
) -> tuple["Run", Compiled]:
    """Compiles the train step."""
    config = reader.read([str(config_file)])
    config = dataclasses.replace(config, where="the configuration to plan")
    if found := problems(topology, config.settings.mesh):
        raise ConfigError(config.where, found)
    # Flags are as in a run; where it runs is not.
    asked = config.settings.platform
    prepare_environment(
        PlatformSettings(
            name="cpu",
            xla_flags=asked.xla_flags,
            libtpu_init_args=asked.libtpu_init_args,
            compilation_cache_dir="",
        )
    )
    from launch.run import user_code
    from launch.run.assemble import assemble
    from partitioning.links import fastest_first

    config = user_code.admitted(config, allowed=allow_module)
    devices = describe(topology)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = assemble(config, devices=devices)
        lowered = run.lower_train_step()
    lowering = time.monotonic() - start
    compiled, compiling = _compiled(lowered)
    text = compiled.as_text() or ""
    if hlo_file != os.devnull:
        Path(hlo_file).write_text(text, encoding="utf-8")
    notes = [str(one.message) for one in said if "Split" in one.category.__name__]
    record = _measure(compiled, text, dict(run.mesh.shape), topology)
    return run, dataclasses.replace(
        record,
        lowering_seconds=lowering,
        compiling_seconds=compiling,
        notes=tuple(dict.fromkeys(notes)),
        fastest_first=fastest_first(run.mesh),
    )


def _compile_evaluation(run: "Run", record: Compiled) -> Evaluation:
    """Compiles the scoring of a batch, beside the state that training leaves there."""
    from moe.dispatch import auto

    start = time.monotonic()
    lowered = run.lower_eval_step()
    lowering = time.monotonic() - start
    compiled, compiling = _compiled(lowered)
    memory = compiled.memory_analysis()
    transport, mesh = "", run.mesh
    for s in run.settings.layers.settings("sparse")[:1]:
        transport, _ = auto.transport_for(
            run.settings.execution.transport,
            s,
            mesh.shape["expert"],
            auto.mesh_has_ragged_exchange(mesh),
            train=False,
        )
    kept = max(0, record.argument_bytes - memory.argument_size_in_bytes)
    return Evaluation(
        transport=transport,
        lowering_seconds=lowering,
        compiling_seconds=compiling,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=_between(memory),
        kept_bytes=kept,
        total_bytes=_total(memory) + kept,
    )


def _compiled(lowered: Any) -> tuple[Any, float]:
    """Compiles, and takes the time."""
    start = time.monotonic()
    try:
        return lowered.compile(), time.monotonic() - start
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(str(error), _held(lowered)) from error


def _total(memory: Any) -> int:
    """All that a program has on a device, and the program itself.

    The peak is what the compiler holds against the chip's memory. Its figure of
    temporaries is not: on TPU the results and the core's own memory are in it too.
    """
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def _between(memory: Any) -> int:
    """What is neither an argument nor a result, at its most."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return memory.peak_memory_in_bytes - kept + memory.alias_size_in_bytes


def describe(topology: Topology) -> Sequence["jax.Device"]:
    """Returns the devices of a topology that is not there.

    Raises:
        NoCompilerError: libtpu is missing, of another version, or does not know it.
    """
    from jax.experimental import topologies

    name = topology.slice_name
    options: dict[str, Any] = {}
    if topology.num_slices > 1:
        options["num_slices"] = topology.num_slices
    if topology.chip.name == "7x":
        name = f"tpu{name}"
    if topology.chip.name == "v4":
        # One device per chip; v4 otherwise shows its two cores.
        options |= {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": (2, 2, 1),
            "num_slices": topology.num_slices,
        }
    if topology.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except Exception as error:
        raise NoCompilerError(f"libtpu cannot describe {topology}: {error}") from error
    assert len(described.devices) == topology.num_devices, len(described.devices)
    return described.devices


def _held(lowered: Any) -> tuple[Buffer, ...]:
    """The largest values that the program asks for: the compiler lists none.

    Inside `shard_map` shapes are those of one device.
    """
    from launch.planning.compiler import hlo
    from launch.planning.compiler.hlo_text import Module

    text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
    return tuple(hlo.largest_buffers(Module(text), optimised=False))


def _measure(
    compiled: Any, text: str, sizes: dict[str, int], topology: Topology
) -> Compiled:
    import jax

    from launch.planning.compiler import hlo
    from launch.planning.compiler.hlo_text import Module

    memory = compiled.memory_analysis()
    total = _total(memory)
    costs: dict[str, float] = {}
    with contextlib.suppress(NotImplementedError):
        found = compiled.cost_analysis()
        costs = found if isinstance(found, dict) else (found or [{}])[0]
    seconds = costs.get("optimal_seconds")
    module = Module(text)
    sent = hlo.collectives(module, sizes)
    capacity = topology.chip.device().usable_bytes
    return Compiled(
        topology=str(topology),
        compiler=f"jax {jax.__version__}, libtpu {_version()}",
        lowering_seconds=0.0,
        compiling_seconds=0.0,
        peak_host_bytes=0,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=_between(memory),
        code_bytes=memory.generated_code_size_in_bytes,
        total_bytes=total,
        host_bytes=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        memory_bytes=capacity,
        fits=total <= capacity,
        product_flops=hlo.product_flops(module),
        reported_flops=float(costs.get("flops", 0.0)),
        # Negative where XLA has lost count.
        reported_seconds=seconds if seconds is not None and seconds > 0 else None,
        collectives=tuple(sent[:_MOST_COLLECTIVES]),
        largest_buffers=tuple(hlo.largest_buffers(module)),
        unknown_loops=len(module.unknown_loops),
    )


def _version() -> str:
    """The compiler's version, as its package says."""
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    main(*sys.argv[1:])
