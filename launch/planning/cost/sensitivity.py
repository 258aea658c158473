"""How an estimate moves with what nobody knows beforehand: imbalance and capacity."""

import dataclasses
from collections.abc import Sequence

from launch.config.settings import Settings
from launch.planning.cost.estimate import ATTAINABLE, Estimate, estimate
from launch.planning.hardware.topologies import Topology
from moe.routing.capacity import capacity, mean_choices
from moe.settings import SparseSettings

LOADS = (1.0, 1.2, 1.5, 2.0)
CAPACITY_FACTORS = (1.0, 1.25, 2.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One answer to "what if".

    Attributes:
        load: rows that choose the busiest chip's experts, over the mean.
        capacity_factor: value of TRAIN_CAPACITY_FACTOR; 0 drops nothing.
        dropped: fraction of the busiest chip's choices that find no slot if they are
            spread evenly over its experts and groups; a lower bound.
        estimate: the step.
    """

    load: float
    capacity_factor: float
    dropped: float
    estimate: Estimate


def imbalance(
    settings: Settings,
    topology: Topology,
    loads: Sequence[float] = LOADS,
    *,
    attainable: float = ATTAINABLE,
) -> tuple[Case, ...]:
    """Estimates a step for loads of the busiest chip; the others wait for it.

    Slots of fixed capacity cost the same however full they are: there an uneven load
    is paid in dropped choices. Without capacity it is paid in time.
    """
    return tuple(
        _case(settings, topology, load, attainable=attainable) for load in loads
    )


def capacities(
    settings: Settings,
    topology: Topology,
    factors: Sequence[float] = CAPACITY_FACTORS,
    *,
    load: float = 1.0,
    attainable: float = ATTAINABLE,
) -> tuple[Case, ...]:
    """Estimates a step for capacity factors, all else equal."""
    cases = []
    for factor in factors:
        router = dataclasses.replace(settings.router, capacity_factor=factor)
        changed = dataclasses.replace(settings, router=router)
        cases.append(_case(changed, topology, load, attainable=attainable))
    return tuple(cases)


def _case(
    settings: Settings, topology: Topology, load: float, *, attainable: float
) -> Case:
    return Case(
        load=load,
        capacity_factor=settings.router.capacity_factor,
        dropped=_dropped(settings, load),
        estimate=estimate(settings, topology, load=load, attainable=attainable),
    )


def _dropped(settings: Settings, load: float) -> float:
    """1 - slots / choices of an expert and group, where choices are more.

    The layer that drops most counts.
    """

    def dropped(s: SparseSettings) -> float:
        router, E = s.router, s.num_experts
        slots = capacity(router, E, train=True)
        if slots == router.group_size or router.family == "expert_choice":
            return 0.0
        wanted = float(mean_choices(router, E)) * router.group_size / E * load
        return max(0.0, 1 - slots / wanted)

    layers = set(settings.layers.settings("sparse"))
    return max(map(dropped, layers), default=0.0)
