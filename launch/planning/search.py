"""Looks for the mesh and the knobs with which a run fits a topology, and is fast there.

Every mesh that divides is tried with every way to place weights, and for each the
options that save memory, cheapest first, until it fits. What fits is ranked by the
estimate. All of it is arithmetic: a few thousand answers in seconds.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.config.edit import changed
from launch.config.rules import problems
from launch.config.settings import Settings
from launch.errors import UserError
from launch.planning.compiler.records import Compiled, Failure
from launch.planning.cost import estimate, memory
from launch.planning.hardware.moving import hardware_file
from launch.planning.hardware.topologies import Topology, standard, warnings
from moe import architecture
from moe.routing.capacity import never_drops
from partitioning.settings import AXES, MeshSettings

# Of the usable memory, what a prediction may fill: compilers take more than arithmetic
# says, or less.
MARGIN = 0.92
LARGEST_MODEL_AXIS = 8
LARGEST_CONTEXT_AXIS = 32
LONG_ROWS = 8192  # tokens, from which rows may be cut over `context`
MOST_MICROBATCHES = 16
LOGITS_BYTES = 2**29  # above which logits are formed in pieces
NARROWEST = 128  # piece of the vocabulary; narrower products waste the machine
SCORES_BYTES = 2**29
SMALL_BLOCK = 512

# What saves memory, cheapest first: REMAT, SPARSE_REMAT, and MICROBATCHES.
_SAVINGS: tuple[tuple[str, str, int], ...] = (
    ("none", "same", 1),
    ("minimal", "same", 1),
    ("minimal", "full", 1),
    ("full", "same", 1),
    ("minimal", "same", 2),
    ("minimal", "same", 4),
    ("full", "same", 2),
    ("full", "same", 4),
    ("full", "same", 8),
    ("full", "same", MOST_MICROBATCHES),
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Knobs with which a run fits, by arithmetic.

    Attributes:
        knobs: by macro.
        settings: with these knobs.
        plan: memory of a chip.
        estimate: time of a step.
        cuts: whether the mesh cuts dimensions of the torus.
    """

    knobs: Mapping[str, Any]
    settings: Settings
    plan: memory.MemoryPlan
    estimate: estimate.Estimate
    cuts: bool

    @property
    def seconds(self) -> float:
        """A step, in the middle between its bounds."""
        return (self.estimate.overlapped_seconds + self.estimate.serial_seconds) / 2


class NothingFitsError(UserError):
    """No mesh and no knobs with which a run fits a topology."""


def search(
    settings: Settings, topology: Topology, margin: float = MARGIN
) -> tuple[Candidate, ...]:
    """Ranks what fits, the shortest step first; one for each mesh and placement.

    Args:
        settings: configuration of the run, for a chip of that kind (`knobs.moved`).
        topology: the chips.
        margin: fraction of the usable memory that may be filled.
    """
    limit = topology.chip.device().usable_bytes * margin
    found = []
    for knobs in _placements(settings, topology):
        one = _first_that_fits(settings, topology, knobs, limit)
        if one is not None:
            found.append(one)
    found.sort(key=lambda one: (one.cuts, one.seconds, one.plan.total))
    best = [
        one for one in found[:8] for one in (one, *_travelling(one, topology, limit))
    ]
    return tuple(sorted([*best, *found[8:]], key=lambda one: (one.cuts, one.seconds)))


def smallest(
    settings: Settings, topology: Topology, margin: float = MARGIN
) -> tuple[Topology, tuple[Candidate, ...]] | None:
    """Returns the smallest slice of the same chip on which something fits."""
    for other in standard(topology.chip.name):
        if other.num_devices > settings.train.batch_size * LARGEST_MODEL_AXIS:
            break
        if least_bytes(settings, other) > topology.chip.device().usable_bytes:
            continue
        if found := search(settings, other, margin):
            return other, found
    return None


def candidate(
    settings: Settings, topology: Topology, knobs: Mapping[str, Any]
) -> Candidate:
    """Returns a run with these knobs, whether it fits or not."""
    found = changed(settings, knobs)
    return Candidate(
        knobs,
        found,
        memory.predict(found, topology.chip.name),
        estimate.estimate(found, topology),
        bool(warnings(topology, found.mesh)),
    )


def least_bytes(settings: Settings, topology: Topology) -> int:
    """Bytes of state and gradients of one device, were everything cut by all."""
    bare = changed(settings, {f"MESH_{axis.upper()}": 1 for axis in AXES})
    plan = memory.predict(bare, topology.chip.name)
    gradients = plan.moments["optimizer"]["gradients"]
    return (plan.parameters + plan.optimizer + gradients) // topology.num_devices


# ---------------------------------------------------------------------- candidates


def meshes(settings: Settings, topology: Topology) -> Iterator[MeshSettings]:
    """Yields every mesh of the topology's devices that this run could have."""
    left = topology.num_devices // topology.num_slices
    sparse = settings.layers.settings("sparse")
    experts = math.gcd(*(s.num_experts for s in sparse)) or 1
    contexts = (
        [c for c in _powers(LARGEST_CONTEXT_AXIS) if settings.data.length // c >= 1024]
        if settings.data.length >= LONG_ROWS
        else [1]
    )
    for expert in _divisors(math.gcd(experts, left)):
        for width in _powers(min(LARGEST_MODEL_AXIS, left // expert)):
            for context in contexts:
                used = expert * width * context
                if left % used == 0:
                    yield MeshSettings(
                        replica=topology.num_slices,
                        data=left // used,
                        context=context,
                        expert=expert,
                        model=width,
                    )


def _placements(settings: Settings, topology: Topology) -> Iterator[dict[str, Any]]:
    """Meshes, and how weights are placed on them; those that divide."""
    sparse = architecture.has_experts(settings.model)
    for mesh in meshes(settings, topology):
        places = ["none", "optimizer", "data"]
        if mesh.data * mesh.context == 1:
            places = ["none"]
        if mesh.expert > 1:
            places.append("data_expert")
        for fsdp in places:
            for cut in (True, False) if sparse and mesh.model > 1 else (True,):
                yield {
                    **{f"MESH_{axis.upper()}": getattr(mesh, axis) for axis in AXES},
                    "FSDP": fsdp,
                    "EXPERT_TENSOR_PARALLEL": cut,
                }


def _first_that_fits(
    settings: Settings, topology: Topology, knobs: Mapping[str, Any], limit: float
) -> Candidate | None:
    """The fastest of the first savings that suffice, with logits whole or in pieces."""
    for remat, sparse_remat, microbatches in _SAVINGS:
        wanted = {
            **knobs,
            "REMAT": remat,
            "SPARSE_REMAT": sparse_remat,
            "MICROBATCHES": microbatches,
        }
        found = changed(settings, wanted)
        if sparse_remat != "same" and not architecture.has_experts(found.model):
            continue
        if problems(found):
            if microbatches == 1:
                return None
            continue
        wanted |= _pieces(found)
        found = changed(settings, wanted)
        plan = memory.predict(found, topology.chip.name)
        if plan.arguments > limit:
            return None
        if plan.total > limit or problems(found):
            continue
        return candidate(settings, topology, wanted)
    return None


def _pieces(settings: Settings) -> dict[str, int]:
    """Pieces of logits and blocks of attention that keep both small."""
    model, mesh, execution = settings.model, settings.mesh, settings.execution
    tokens = settings.train.batch_size * settings.data.length
    tokens //= mesh.batch_shards * mesh.context * settings.train.microbatches
    found = {}
    part = model.vocab_size // mesh.model
    wide = [n for n in _divisors(part) if part // n >= NARROWEST] or [1]
    fitting = [n for n in wide if 8 * tokens * (part // n) <= LOGITS_BYTES]
    found["VOCAB_CHUNKS"] = execution.vocab_chunks
    if execution.vocab_chunks == 1:
        found["VOCAB_CHUNKS"] = (fitting or wide[-1:])[0]
    scores = 8 * tokens * settings.data.length * max(1, model.num_heads // mesh.model)
    block = execution.attention_block
    whole = not 0 < block < settings.data.length
    found["ATTENTION_BLOCK"] = SMALL_BLOCK if whole and scores > SCORES_BYTES else block
    return found


def _travelling(
    one: Candidate, topology: Topology, limit: float
) -> Iterator[Candidate]:
    """The same with other transports, where there is a choice."""
    settings = one.settings
    sparse = settings.layers.settings("sparse")
    if settings.mesh.expert == 1 or not sparse:
        return
    if settings.execution.transport != "auto" or not all(
        never_drops(s.router, s.num_experts, train=True) for s in sparse
    ):
        # Grouped products of capacity's rows were compiled to masked dense ones, six
        # times the work (M6-T 1T on v4): slots of fixed capacity are left as they are.
        return
    for transport in ("ring", "all_to_all"):
        found = changed(settings, {"TRANSPORT": transport})
        plan = memory.predict(found, topology.chip.name)
        if plan.total > limit or problems(found):
            continue
        yield Candidate(
            {**one.knobs, "TRANSPORT": transport},
            found,
            plan,
            estimate.estimate(found, topology),
            one.cuts,
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def told(knobs: Mapping[str, Any]) -> str:
    """Says knobs in a few words, without those that have their default."""
    default = {
        "EXPERT_TENSOR_PARALLEL": True,
        "SPARSE_REMAT": "same",
        "MICROBATCHES": 1,
        "VOCAB_CHUNKS": 1,
        "ATTENTION_BLOCK": 1024,
        "TRANSPORT": "auto",
    }
    return " ".join(
        f"{macro}={value}"
        for macro, value in knobs.items()
        if value != default.get(macro, 1 if macro.startswith("MESH_") else None)
    )


def best_meshes(found: Sequence[Candidate], number: int) -> list[Candidate]:
    """The first of each mesh, so that attempts differ."""
    kept: dict[MeshSettings, Candidate] = {}
    for one in found:
        kept.setdefault(one.settings.mesh, one)
    return list(kept.values())[:number]


def hardware_text(
    where: str,
    topology: Topology,
    one: Candidate,
    compiled: Compiled | Failure | None = None,
) -> str:
    """Writes a hardware file: the mesh and knobs that were found, the chip's flags.

    Args:
        where: the configuration that was searched for.
        topology: the chips.
        one: what was found.
        compiled: what the compiler said of it.
    """
    gib = 2**30
    held = f"{one.plan.total / gib:.2f} GiB of each device by arithmetic"
    if isinstance(compiled, Compiled):
        held += f", {compiled.most_bytes / gib:.2f} as compiled"
    elif compiled is not None:
        held += f"; not compiled: {compiled.kind}"
    bounds = one.estimate
    lines = [
        f"# {topology}, found by `switchyard plan --search` for {where}.",
        "#",
        f"# Mesh: {_axes(one.settings.mesh)}.",
        f"# Memory: {held},",
        f"#     of {topology.chip.device().usable_bytes / gib:.2f} usable.",
        f"# Step: {bounds.overlapped_seconds:.3g} s if all sending hides, "
        f"{bounds.serial_seconds:.3g} s if none does; estimated.",
        "",
    ]
    if name := hardware_file(topology.chip.name):
        lines += [
            "# For its compiler's flags; what follows is read later, and wins.",
            f'include "{name}"',
            "",
        ]
    kind = "tpu" if topology.chip.kind == "tpu" else "cuda"
    # One process for each host; the pod, or the launcher, says how many there are.
    first = {"PLATFORM": kind, "SIMULATED_DEVICES": 0, "NUM_PROCESSES": 0}
    if topology.chip.kind == "gpu" and topology.num_chips <= topology.chip.node_size:
        first["NUM_PROCESSES"] = 1
    lines += [f"{macro} = {value!r}" for macro, value in {**first, **one.knobs}.items()]
    return "\n".join(lines) + "\n"


def _axes(mesh: MeshSettings) -> str:
    large = [f"{axis} {n}" for axis in AXES if (n := getattr(mesh, axis)) > 1]
    return " × ".join(large) or "one device"
