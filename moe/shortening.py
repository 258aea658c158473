"""A model of fewer layers with the same pattern. Standard library only."""

import dataclasses
import math

from moe import architecture
from moe.settings import ModelSettings


def shortened(model: ModelSettings) -> ModelSettings:
    """Returns the same pattern in few layers: two at the bottom, two short periods."""
    short = {name: _shortened(side) for name, side in architecture.sides(model).items()}
    experts = tuple(n for side in short.values() for n in side.experts_per_layer)
    *other, last = short.values()
    encoder = other[0] if other else last
    return dataclasses.replace(
        last,
        shape=model.shape,
        experts_per_layer=experts,
        num_encoder_layers=encoder.num_layers,
        encoder_moe_every=encoder.moe_every,
    )


def _shortened(side: ModelSettings) -> ModelSettings:
    cycles = _each_once(
        side.attention_windows, side.attention_chunks, side.position_layers
    )
    side = dataclasses.replace(
        side,
        attention_windows=cycles[0],
        attention_chunks=cycles[1],
        position_layers=cycles[2],
    )
    cycle, twice = max(*map(len, cycles), 1), side.layer_sharing == "all"
    kinds = max(cycle, 2)
    if twice:  # so that they still repeat
        kinds = 2 * math.lcm(cycle, min(side.moe_every, 3) or 1)
    if not side.moe_every:
        return dataclasses.replace(side, num_layers=min(side.num_layers, kinds))
    first = min(side.first_dense_layers, 2)
    every = min(side.moe_every, 3)  # longer periods repeat dense layers
    periods = (side.num_layers - side.first_dense_layers) // side.moe_every
    if side.experts_per_layer:
        kinds = 2
    below = 0 if twice else first
    periods = max(min(periods, max(-(-(kinds - below) // every), 2)), 1)
    each = _extremes(side.experts_per_layer, periods)
    if each and twice:
        each, periods = tuple(sorted(each * 2, key=each.index)), 2 * len(each)
    return dataclasses.replace(
        side,
        first_dense_layers=first,
        moe_every=every,
        num_layers=first + periods * every,
        first_hash_layers=(
            periods
            if side.first_hash_layers == len(architecture.sparse_layers(side))
            else min(side.first_hash_layers, 1)
        ),
        experts_per_layer=each,
    )


def _each_once(*cycles: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Patterns in which what stands beside one another does so once; () stays."""
    length = math.lcm(*(len(cycle) or 1 for cycle in cycles))
    beside = (
        tuple(cycle[n % len(cycle)] if cycle else 0 for cycle in cycles)
        for n in range(length)
    )
    once = list(zip(*dict.fromkeys(beside), strict=True))
    return [found if given else () for given, found in zip(cycles, once, strict=True)]


def _extremes(each: tuple[int, ...], number: int) -> tuple[int, ...]:
    """The least and the most in their order, or of one the most."""
    if not each or number == 1:
        return (max(each),) if each else ()
    return tuple(sorted((min(each), max(each)), key=each.index))
