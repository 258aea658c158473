"""What compiling a run gives: an answer, or a failure that says what to do."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from launch.planning.compiler.hlo import Buffer, Collective
from partitioning.settings import AXES


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The scoring of one batch as the compiler made it. Bytes are those of one device.

    Attributes:
        transport: method by which rows of its sparse layers travel, which may not be
            that of training; "" in a dense model.
        lowering_seconds: tracing, and writing the program.
        compiling_seconds: the compiler's own.
        argument_bytes: parameters and batch.
        temp_bytes: what is neither an argument nor a result, at its most.
        kept_bytes: the rest of the state, which stays where it is meanwhile.
        total_bytes: the most that is held at once, what is kept, and the program.
    """

    transport: str
    lowering_seconds: float
    compiling_seconds: float
    argument_bytes: int
    temp_bytes: int
    kept_bytes: int
    total_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A whole train step as the compiler made it, and evaluation's beside it.

    Bytes are those of one jax device.

    Attributes:
        topology: what it was compiled for.
        compiler: versions of jax and of the compiler.
        lowering_seconds: tracing, and writing the program.
        compiling_seconds: the compiler's own.
        peak_host_bytes: memory of the process that compiled.
        argument_bytes: state and batch.
        output_bytes: state and metrics.
        alias_bytes: outputs that take the place of arguments.
        temp_bytes: what is neither an argument nor a result, at its most.
        code_bytes: the program.
        total_bytes: the most that is held at once, and the program.
        host_bytes: arguments and temporaries that were placed in the host's memory.
        memory_bytes: what a program may have on this chip.
        fits: whether the total is at most that, and evaluation's too if it was asked
            for.
        product_flops: multiply-adds of products per step, times 2, loops counted as
            often as they run; see `hlo.product_flops`.
        reported_flops: XLA's figure, which counts loops once.
        reported_seconds: XLA's guess at the time of a step; None where it has none.
        collectives: what is sent, the most bytes first.
        largest_buffers: the largest values.
        unknown_loops: loops counted once for want of a number of trips.
        notes: what was said on the way, such as of a torus that had to be cut.
        fastest_first: the mesh axes in the order of `partitioning.links.fastest_first`;
            by default that of programs made before there was one.
        evaluation: the other program of a run, why there is none, or None if it was
            not asked for.
    """

    topology: str
    compiler: str
    lowering_seconds: float
    compiling_seconds: float
    peak_host_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    code_bytes: int
    total_bytes: int
    host_bytes: int
    memory_bytes: int
    fits: bool
    product_flops: float
    reported_flops: float
    reported_seconds: float | None
    collectives: tuple[Collective, ...]
    largest_buffers: tuple[Buffer, ...]
    unknown_loops: int = 0
    notes: tuple[str, ...] = ()
    fastest_first: tuple[str, ...] = AXES
    evaluation: "Evaluation | Failure | None" = None

    @property
    def most_bytes(self) -> int:
        """The larger of the two programs, as far as the compiler said."""
        if isinstance(self.evaluation, Evaluation):
            return max(self.total_bytes, self.evaluation.total_bytes)
        needed = self.evaluation.needed_bytes if self.evaluation else None
        return max(self.total_bytes, needed or 0)

    @property
    def optimal_seconds(self) -> float | None:
        """XLA's guess; it counts loops once."""
        return self.reported_seconds


FailureKind = Literal[
    "out_of_memory", "crashed", "killed", "timed_out", "no_compiler", "rejected"
]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A program that did not compile, which is an answer too.

    Attributes:
        kind: "out_of_memory" of the chip; "crashed", the compiler ended its process or
            broke; "killed", it took more of this machine's memory than it may;
            "timed_out"; "no_compiler"; "rejected", the configuration or the program is
            not possible there.
        message: what happened, in the words of who found it.
        advice: what to do.
        needed_bytes: demand on the chip's memory, where the compiler said so.
        available_bytes: what it may use, likewise.
        largest_buffers: the largest, where the compiler listed them.
        seconds: until it failed.
        peak_host_bytes: memory of the process that compiled.
    """

    kind: FailureKind
    message: str
    advice: str
    needed_bytes: int | None = None
    available_bytes: int | None = None
    largest_buffers: tuple[Buffer, ...] = ()
    seconds: float = 0.0
    peak_host_bytes: int = 0


def to_json(record: Compiled | Failure) -> str:
    """Writes a record; `from_json` reads it back."""
    kind = "compiled" if isinstance(record, Compiled) else "failure"
    return json.dumps({"record": kind, **dataclasses.asdict(record)}, indent=1)


def from_json(text: str) -> Compiled | Failure:
    """Reads what `to_json` wrote."""
    fields = json.loads(text)
    if fields.pop("record") == "failure":
        return _failure(fields)
    fields["largest_buffers"] = tuple(Buffer(**b) for b in fields["largest_buffers"])
    fields["collectives"] = tuple(_collective(c) for c in fields["collectives"])
    for name in ("notes", "fastest_first"):
        if name in fields:
            fields[name] = tuple(fields[name])
    evaluation = fields.pop("evaluation", None)
    if evaluation is not None:
        read = _failure if "kind" in evaluation else _evaluation
        fields["evaluation"] = read(evaluation)
    return Compiled(**fields)


def _evaluation(fields: Mapping[str, Any]) -> Evaluation:
    return Evaluation(**fields)


def _failure(fields: Mapping[str, Any]) -> Failure:
    buffers = tuple(Buffer(**b) for b in fields["largest_buffers"])
    return Failure(**{**fields, "largest_buffers": buffers})


def _collective(fields: Mapping[str, Any]) -> Collective:
    return Collective(**{**fields, "axes": tuple(fields["axes"])})
