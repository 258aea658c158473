"""Layers as data: stacks of segments of blocks of sublayers.

`moe/architecture.py` makes them of the flat words that a user writes. Everything else
asks them: the forward pass, accounting, planning, shrinking. Standard library only.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moe.settings import (
    EmbeddingSettings,
    NormSettings,
    PositionSettings,
    RouterSettings,
    SparseSettings,
)


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """One step of the residual stream: x + f(norm(x)).

    Attributes:
        name: name among the weights of its block.
        kind: key of `moe.model.block.KINDS`, a file each.
        settings: record of that kind.
        norm: normalisation of what it reads.
    """

    name: str
    kind: str
    settings: Any
    norm: NormSettings


Block = tuple[Sublayer, ...]


def of_kind(block: Block, kind: str) -> list[Any]:
    """Returns the records of a layer's sublayers of one kind."""
    return [each.settings for each in block if each.kind == kind]


class Segment(NamedTuple):
    """Blocks that repeat, and are compiled once.

    Attributes:
        blocks: blocks of one period.
        repeats: periods.
        first: number of the first layer in its stack.
    """

    blocks: tuple[Block, ...]
    repeats: int
    first: int

    def numbers(self, block: int) -> range:
        """Returns the numbers of the layers that are this block of a period."""
        size = len(self.blocks)
        return range(self.first + block, self.first + size * self.repeats, size)


class Stack(NamedTuple):
    """Layers from the bottom up, with a norm on top.

    Attributes:
        segments: what they are.
        width: M.
        norm: normalisation of the output.
        shared_positions: the bias by distance that layers share; None without.
        dropout: probability of zeroing what a sublayer adds.
    """

    segments: tuple[Segment, ...]
    width: int
    norm: NormSettings
    shared_positions: PositionSettings | None = None
    dropout: float = 0.0

    @property
    def layers(self) -> list[Block]:
        """The blocks in their order."""
        return [
            block
            for segment in self.segments
            for _ in range(segment.repeats)
            for block in segment.blocks
        ]

    @property
    def kinds_of_layers(self) -> dict[Block, int]:
        """How many layers there are of each that differs, the lowest first."""
        return dict(collections.Counter(self.layers))

    def settings(self, kind: str) -> list[Any]:
        """Returns the records of all sublayers of one kind, from the bottom up."""
        return [s for block in self.layers for s in of_kind(block, kind)]

    def sparse(self) -> Iterator["Place"]:
        """Yields the sparse sublayers of each segment, repeats of one as one."""
        for s, segment in enumerate(self.segments):
            for b, block in enumerate(segment.blocks):
                for each in block:
                    if each.kind == "sparse":
                        yield Place(s, b, each, segment.numbers(b))

    @property
    def sparse_order(self) -> tuple[int, ...]:
        """Place of each sparse layer, from the bottom up, among those of `sparse()`."""
        numbers = [n for place in self.sparse() for n in place.numbers]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        return tuple(order) if order != list(range(len(order))) else ()


class Place(NamedTuple):
    """Where the arrays of a sublayer are, and of which layers they are.

    Attributes:
        segment: place of the segment in its stack.
        block: place of the block in its period.
        sublayer: what it is.
        numbers: layers whose arrays are stacked there.
    """

    segment: int
    block: int
    sublayer: Sublayer
    numbers: range


class Layers(NamedTuple):
    """All that decides a model's function; a checkpoint's identity.

    Attributes:
        embedding: input and output.
        decoder: its layers.
    """

    embedding: EmbeddingSettings
    decoder: Stack


def with_routers(
    layers: Layers, change: Callable[[RouterSettings], RouterSettings]
) -> Layers:
    """Returns the layers with every router's settings changed."""

    def changed(each: Sublayer) -> Sublayer:
        if not isinstance(each.settings, SparseSettings):
            return each
        router = change(each.settings.router)
        settings = dataclasses.replace(each.settings, router=router)
        return dataclasses.replace(each, settings=settings)

    segments = tuple(
        segment._replace(
            blocks=tuple(tuple(map(changed, block)) for block in segment.blocks)
        )
        for segment in layers.decoder.segments
    )
    return layers._replace(decoder=layers.decoder._replace(segments=segments))
