"""A plan: everything that is said of a run on a topology, gathered once.

`table`, `page` and JSON say the same numbers; each says whether it was compiled or
estimated.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.errors import ConfigError
from launch.planning.compiler.records import Compiled, Failure
from launch.planning.cost import estimate, local, memory, sensitivity, traffic, work
from launch.planning.cost.estimate import Estimate, Figure
from launch.planning.hardware.topologies import Topology, fastest_first, warnings
from launch.planning.search import Candidate, told
from moe import architecture, energy, expected_drops
from moe.accounting import Counts, count
from moe.model import inventory
from moe.training import trained

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Prices:
    """What an hour and a watt cost; None where nobody said."""

    pue: float = estimate.PUE
    tonnes_per_mwh: float | None = None
    per_chip_hour: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it runs.

    Attributes:
        config: as it would run there.
        topology: the chips.
        counts: parameters and operations of the model.
        memory: predicted, of one device.
        drops: expected fraction of choices that chance alone drops; None where no law
            holds.
        few_slots: a warning, or "".
        warnings: remarks on mesh axes that share a dimension of the torus.
        estimate: time of a step, by the compiled step's traffic if there is one.
        prices: unit costs of the run's energy and hours.
        imbalance: the step under uneven loads.
        capacities: the step under other capacities.
        compiled: what the compiler said, if it was asked.
        candidates: results of a search, the best first.
    """

    config: ResolvedConfig
    topology: Topology
    counts: Counts
    memory: memory.MemoryPlan
    drops: float | None
    few_slots: str
    warnings: tuple[str, ...]
    estimate: Estimate
    prices: Prices
    imbalance: tuple[sensitivity.Case, ...]
    capacities: tuple[sensitivity.Case, ...]
    compiled: Compiled | Failure | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def settings(self) -> Settings:
        """Configuration of the run."""
        return self.config.settings

    @property
    def usable_bytes(self) -> int:
        """Memory of one device that a program may have."""
        return self.topology.chip.device().usable_bytes

    @property
    def fits(self) -> bool:
        """By the compiler if it was asked and answered, else by arithmetic.

        Training's step and evaluation's both must.
        """
        if isinstance(self.compiled, Compiled):
            return self.compiled.fits
        if self.compiled is not None and self.compiled.kind == "out_of_memory":
            return False
        return self.memory.total <= self.usable_bytes

    @property
    def transports(self) -> dict[str, tuple[str, str]]:
        """How rows travel in training and in evaluation, and why; {} if dense."""
        sparse = self.settings.layers.settings("sparse")
        if not sparse:
            return {}
        sizes = local.local(self.settings, self.topology.chip.name)
        scoring = dataclasses.replace(sizes, train=False)
        return {
            "training": sizes.transport(sparse[0]),
            "evaluation": scoring.transport(sparse[0]),
        }

    @property
    def tokens(self) -> int:
        """Number in the whole run."""
        return self.estimate.tokens * self.estimate.steps

    @property
    def executed_flops_per_token(self) -> float:
        """Forward and backward, with padding and what is computed again."""
        return executed_flops(self.settings, self.topology) * self._devices_per_token

    @property
    def compiled_flops_per_token(self) -> float | None:
        """Products of the compiled program; None where it was not compiled."""
        if not isinstance(self.compiled, Compiled):
            return None
        return self.compiled.product_flops * self._devices_per_token

    @property
    def _devices_per_token(self) -> float:
        return self.topology.num_devices / self.estimate.tokens

    @property
    def outcomes(self) -> dict[str, dict[str, Figure]]:
        """What the run takes by either bound of the step."""
        return {
            bound: estimate.outcome(
                self.estimate,
                self.estimate.seconds(bound),
                pue=self.prices.pue,
                tonnes_per_mwh=self.prices.tonnes_per_mwh,
                price_per_chip_hour=self.prices.per_chip_hour,
                devices_per_chip=self.topology.chip.devices,
            )
            for bound in ("overlapped", "serial")
        }


def make(
    config: ResolvedConfig,
    topology: Topology,
    prices: Prices,
    compiled: Compiled | Failure | None = None,
    candidates: tuple[Candidate, ...] = (),
) -> Plan:
    """Gathers a plan.

    Args:
        config: for that kind of chip (`knobs.moved`), with a mesh that fits.
        topology: the chips.
        prices: unit costs of energy and hours.
        compiled: what the compiler said.
        candidates: results of a search, the best first.

    Raises:
        ConfigError: a pattern of what is trained matches nothing.
    """
    settings = config.settings
    specs = inventory.specs(settings.layers)
    if found := trained.problems(specs, settings.optimizer):
        raise ConfigError(config.where, found)
    model, router = settings.model, settings.router
    sent = compiled.collectives if isinstance(compiled, Compiled) else None
    sparse = architecture.has_experts(model)
    E = model.num_experts
    return Plan(
        config=config,
        topology=topology,
        counts=count(
            settings.layers, settings.data.length, settings.data.encoder_length
        ),
        memory=memory.predict(settings, topology.chip.name),
        drops=expected_drops.of_router(router, E) if sparse else None,
        few_slots=expected_drops.few_slots(router, E) if sparse else "",
        warnings=tuple(warnings(topology, settings.mesh)),
        estimate=estimate.estimate(settings, topology, collectives=sent),
        prices=prices,
        imbalance=sensitivity.imbalance(settings, topology) if sparse else (),
        capacities=sensitivity.capacities(settings, topology) if sparse else (),
        compiled=compiled,
        candidates=candidates,
    )


def executed_flops(settings: Settings, topology: Topology) -> float:
    """Operations of one device in a step, each counted once whatever it costs."""
    total = 0.0
    for part in work.parts(settings, topology.chip.name):
        exact = part.name == "router" and settings.router.logit_dtype == "float32"
        total += part.flops / (work.HIGHEST_PRECISION if exact else 1)
    return total


def rules_of_thumb(plan: Plan) -> dict[str, float]:
    """PF-days of the whole run, by convention; they must not be compared."""
    tokens, active = plan.tokens, plan.counts.active
    by_rule = energy.training_flops(active, tokens, convention="6ND")
    return {
        "6ND": energy.pf_days(by_rule),
        "model": energy.pf_days(plan.counts.train_flops_per_token * tokens),
        "executed": energy.pf_days(plan.executed_flops_per_token * tokens),
    }


# ------------------------------------------------------------------------ collectives


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in a step over one axis: by arithmetic and compiled."""

    axis: str
    least_bytes: float
    compiled_bytes: float | None
    seconds: float

    @property
    def ratio(self) -> float | None:
        """Compiled over least; None where there is nothing to compare."""
        if self.compiled_bytes is None or not self.least_bytes:
            return None
        return self.compiled_bytes / self.least_bytes


def traffic_by_axis(plan: Plan) -> list[Traffic]:
    """Compares what is sent over each mesh axis with the least."""
    order = fastest_first(plan.topology, plan.settings.mesh)
    sent: Mapping[str, Mapping[str, float]] | None = None
    if isinstance(plan.compiled, Compiled):
        order = plan.compiled.fastest_first
        sent = estimate.compiled_traffic(plan.settings, plan.compiled.collectives)
    chip = plan.topology.chip.name
    least = traffic.by_axis(traffic.flows(plan.settings, chip, order))
    return [
        Traffic(
            axis,
            sum(least.get(axis, {}).values()),
            None if sent is None else sum(sent.get(axis, {}).values()),
            plan.estimate.network.get(axis, 0.0),
        )
        for axis in dict.fromkeys([*least, *(sent or {})])
    ]


# What makes a large value smaller, by the source that asks for it.
_SHRINK = (
    (("losses", "embedding", "logits", "head"), "VOCAB_CHUNKS, MESH_MODEL"),
    (("attention", "softmax", "scores"), "ATTENTION_BLOCK, MESH_MODEL, MESH_CONTEXT"),
    (
        ("dispatch", "sparse", "routing", "rounds", "grouped", "expert"),
        "TRAIN_CAPACITY_FACTOR, SPARSE_REMAT, MESH_EXPERT, EXPERT_TENSOR_PARALLEL",
    ),
    (
        ("optimizer", "adafactor", "muon", "rounding"),
        "MOMENT_DTYPE, FSDP, OFFLOAD_OPTIMIZER",
    ),
    (("parallel", "gather"), "MESH_MODEL: a layer's weights are gathered whole"),
    (("feed_forward",), "MESH_MODEL, REMAT"),
    (("products",), "MESH_MODEL: a layer's weights are gathered whole"),
    (("remat", "transformer", "stack", "block"), "REMAT, MESH_MODEL"),
)


def what_shrinks(source: str, operation: str) -> str:
    """Names the knobs that make a buffer smaller; MICROBATCHES for what is unknown.

    Args:
        source: "moe/model/attention.py:120", or "".
        operation: the last part of the name that jax gave.
    """
    place = f"{source} {operation}".lower()
    for words, found in _SHRINK:
        if any(word in place for word in words):
            is_state = "optimizer" in words
            return found if is_state else f"{found}, MICROBATCHES"
    return "MICROBATCHES, REMAT, FSDP"


# ------------------------------------------------------------------------------ JSON


def to_json(plan: Plan) -> str:
    """Writes a plan, every figure with its unit and its source."""
    counts, held = plan.counts, plan.memory
    result: dict[str, Any] = {
        "configuration": plan.config.where,
        "topology": str(plan.topology),
        "mesh": dataclasses.asdict(plan.settings.mesh),
        "fits": plan.fits,
        "counts": {
            "total": counts.total,
            "active": counts.active,
            "ahead": counts.ahead,
            "tokens": plan.tokens,
            "flops_per_token": {
                "model": counts.train_flops_per_token,
                "executed": plan.executed_flops_per_token,
                "compiled": plan.compiled_flops_per_token,
            },
            "pf_days": rules_of_thumb(plan),
        },
        "memory": {
            "usable_bytes": plan.usable_bytes,
            "predicted_bytes": held.total,
            "predicted_argument_bytes": held.arguments,
            "host_bytes": held.host,
            "categories": held.categories,
            "source": "estimated",
        },
        "transports": {
            use: {"transport": name, "reason": reason, "source": "exact"}
            for use, (name, reason) in plan.transports.items()
        },
        "expected_drops": plan.drops,
        "warnings": [*plan.warnings, *filter(None, [plan.few_slots])],
        "step": {
            "bound_by": plan.estimate.bound_by,
            "parts": [dataclasses.asdict(part) for part in plan.estimate.parts],
            "network_seconds": dict(plan.estimate.network),
            "network_source": plan.estimate.network_source,
        },
        "outcomes": {
            bound: {name: dataclasses.asdict(one) for name, one in figures.items()}
            for bound, figures in plan.outcomes.items()
        },
        "traffic": [
            {**dataclasses.asdict(one), "ratio": one.ratio}
            for one in traffic_by_axis(plan)
        ],
        "imbalance": [_case(case) for case in plan.imbalance],
        "capacities": [_case(case) for case in plan.capacities],
        "compiled": None,
        "search": [_candidate(one) for one in plan.candidates],
    }
    if plan.compiled is not None:
        result["compiled"] = dataclasses.asdict(plan.compiled)
    return json.dumps(_finite(result), indent=1) + "\n"


def _case(case: sensitivity.Case) -> dict[str, Any]:
    return {
        "load": case.load,
        "capacity_factor": case.capacity_factor,
        "dropped": case.dropped,
        "overlapped_seconds": case.estimate.overlapped_seconds,
        "serial_seconds": case.estimate.serial_seconds,
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    return {
        "knobs": dict(one.knobs),
        "told": told(one.knobs),
        "total_bytes": one.plan.total,
        "overlapped_seconds": one.estimate.overlapped_seconds,
        "serial_seconds": one.estimate.serial_seconds,
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
