"""How fast a step could be, what bounds it, and what a run then costs.

A roofline (doi:10.1145/1498765.1498785): each part of the work takes what its
arithmetic or its memory needs, whichever is longer, and each mesh axis what its bytes
need. Between two bounds: all communication hidden behind the work, and none. Every
number says whether it was measured, compiled or estimated.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from launch.config.settings import Settings
from launch.planning.cost import flow, local, traffic, work
from launch.planning.hardware.topologies import Topology, axis_bandwidth, fastest_first

Source = Literal["measured", "compiled", "estimated"]
# Of the peak, what large products reach by themselves. 0.6 lies in the middle of what
# is published for whole steps on TPU v4 (0.46 to 0.57, arXiv:2204.02311) and for single
# products (0.7 and more): a chip's own share is between them.
ATTAINABLE = 0.6
# Power of the building over that of the chips: large data centres (arXiv:2104.10350).
PUE = 1.1
SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number that says where it comes from."""

    value: float
    unit: str
    source: Source = "estimated"


@dataclasses.dataclass(frozen=True)
class PartTime:
    """Seconds of a part of the work, by what could bound it."""

    name: str
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.compute_seconds, self.memory_seconds)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A step of one chip, in seconds.

    Attributes:
        parts: the work.
        peak_seconds: the model's operations alone, at the peak.
        network: seconds that each mesh axis needs.
        network_source: origin of the bytes, "estimated" or "compiled"; bandwidths are
            estimates in any case.
        tokens: number in a step, on all chips.
        model_flops: the model's operations in a step, on all chips: forward and
            backward, nothing twice.
        num_devices: on which it runs.
        peak_flops: operations per second of one device, at its peak.
        steps: number in the whole run.
        watts: power of one device at work.
    """

    parts: tuple[PartTime, ...]
    peak_seconds: float
    network: Mapping[str, float]
    network_source: Source
    tokens: int
    model_flops: float
    num_devices: int
    peak_flops: float
    steps: int
    watts: float

    @property
    def compute_seconds(self) -> float:
        """Arithmetic alone."""
        return sum(part.compute_seconds for part in self.parts)

    @property
    def memory_seconds(self) -> float:
        """Memory alone."""
        return sum(part.memory_seconds for part in self.parts)

    @property
    def device_seconds(self) -> float:
        """Every part bound by the one or the other."""
        return sum(part.seconds for part in self.parts)

    @property
    def overlapped_seconds(self) -> float:
        """If all that is sent is hidden, each axis behind the work and the others."""
        return max(self.device_seconds, *self.network.values(), 0.0)

    @property
    def serial_seconds(self) -> float:
        """If nothing is hidden."""
        return self.device_seconds + sum(self.network.values())

    @property
    def bound_by(self) -> str:
        """What the overlapped step waits for: "compute", "memory", or an axis."""
        slowest = max(self.network, key=lambda a: self.network[a], default="")
        if slowest and self.network[slowest] > self.device_seconds:
            return slowest
        bound = {"compute": 0.0, "memory": 0.0}
        for part in self.parts:
            is_memory = part.memory_seconds > part.compute_seconds
            bound["memory" if is_memory else "compute"] += part.seconds
        return max(bound, key=lambda name: bound[name])

    def seconds(self, bound: Literal["overlapped", "serial"]) -> Figure:
        """Returns the length of a step by one of the bounds."""
        overlapped = bound == "overlapped"
        value = self.overlapped_seconds if overlapped else self.serial_seconds
        return Figure(value, "s")


def estimate(
    settings: Settings,
    topology: Topology,
    *,
    attainable: float = ATTAINABLE,
    load: float = 1.0,
    collectives: Iterable[Any] | None = None,
) -> Estimate:
    """Estimates a step.

    Args:
        settings: configuration of the run; its mesh must fit the topology.
        topology: the chips.
        attainable: fraction of the peak that products reach.
        load: rows of the busiest chip's experts, over the mean.
        collectives: traffic of a compiled step, with `kind`, `axes` and `bytes` that a
            chip sends per step, instead of the flows of `traffic`.
    """
    device = topology.chip.device()
    chip = topology.chip.name
    parts = work.parts(settings, chip, load)
    if collectives is None:
        order = fastest_first(topology, settings.mesh)
        sent = traffic.by_axis(traffic.flows(settings, chip, order))
    else:
        sent = compiled_traffic(settings, collectives)
    # As `moe.accounting` counts them.
    forward = sum(part.model_flops for part in parts)
    model_flops = 3 * forward * settings.mesh.num_devices
    return Estimate(
        parts=tuple(
            PartTime(
                part.name,
                part.flops / (device.peak_flops * attainable),
                part.touched_bytes / device.memory_bandwidth,
            )
            for part in parts
        ),
        peak_seconds=model_flops / (settings.mesh.num_devices * device.peak_flops),
        network=_network_seconds(settings, topology, sent),
        network_source="estimated" if collectives is None else "compiled",
        tokens=settings.train.batch_size * settings.data.tokens_per_row,
        model_flops=model_flops,
        num_devices=settings.mesh.num_devices,
        peak_flops=device.peak_flops,
        steps=settings.train.train_steps,
        watts=device.watts,
    )


def _network_seconds(
    settings: Settings,
    topology: Topology,
    sent: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """Bytes over bandwidth, per axis."""
    rates = {
        flow.RING: axis_bandwidth(topology, settings.mesh, "ring"),
        flow.EXCHANGE: axis_bandwidth(topology, settings.mesh, "all_to_all"),
    }
    return {
        axis: sum(number / rates[pattern][axis] for pattern, number in patterns.items())
        for axis, patterns in sent.items()
    }


def compiled_traffic(
    settings: Settings, collectives: Iterable[Any]
) -> dict[str, dict[str, float]]:
    """A compiler's collectives by axis; those over several at once as in `traffic`."""
    sizes = local.local(settings, "tpu").sizes
    found: dict[str, dict[str, float]] = {}
    for collective in collectives:
        exchange = "all-to-all" in collective.kind
        pattern = flow.EXCHANGE if exchange else flow.RING
        # Only the shares of the axes are taken of this.
        axes = flow.at_once(collective.axes, sizes)
        shares = flow.Flow("", axes, 2**40, 1, pattern, "", sizes)
        for axis, sent in shares.by_axis.items():
            patterns = found.setdefault(axis, {})
            share = collective.bytes * sent / shares.sent_bytes
            patterns[pattern] = patterns.get(pattern, 0.0) + share
    return found


def outcome(
    found: Estimate,
    step: Figure,
    *,
    pue: float = PUE,
    tonnes_per_mwh: float | None = None,
    price_per_chip_hour: float | None = None,
    devices_per_chip: int = 1,
) -> dict[str, Figure]:
    """Says what a step of that length makes of the run; each number has its source.

    Args:
        found: the estimate, for the sizes of the run.
        step: seconds of a step, by a bound of the estimate or as measured.
        pue: power of the building over that of the chips.
        tonnes_per_mwh: carbon intensity of the energy, as CO2 equivalents; no
            emissions are said without it.
        price_per_chip_hour: in any currency; no cost is said without it.
        devices_per_chip: devices that one chip is.
    """
    seconds = step.value * found.steps
    hours = seconds / SECONDS_PER_HOUR
    chip_hours = hours * found.num_devices / devices_per_chip
    # Power is the maker's, and so an estimate even where the time was measured.
    megawatt_hours = hours * found.num_devices * found.watts * pue / 1e6
    peak = found.num_devices * found.peak_flops
    result = {
        "step_seconds": step,
        "tokens_per_second": Figure(found.tokens / step.value, "tokens/s", step.source),
        "model_flops_utilization": Figure(
            found.model_flops / (step.value * peak), "", step.source
        ),
        "days": Figure(seconds / SECONDS_PER_DAY, "days", step.source),
        "chip_hours": Figure(chip_hours, "chip-hours", step.source),
        "energy": Figure(megawatt_hours, "MWh"),
    }
    if tonnes_per_mwh is not None:
        result["emissions"] = Figure(megawatt_hours * tonnes_per_mwh, "tCO2e")
    if price_per_chip_hour is not None:
        cost = chip_hours * price_per_chip_hour
        result["cost"] = Figure(cost, "of the currency", step.source)
    return result
