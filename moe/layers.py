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
        shared: whether all periods have the same parameters, but for those that are
            one for each layer.
    """

    blocks: tuple[Block, ...]
    repeats: int
    first: int
    shared: bool = False

    @property
    def uses(self) -> int:
        """How often a token meets each array of parameters in a pass."""
        return self.repeats if self.shared else 1

    def numbers(self, block: int) -> range:
        """Returns the numbers of the layers that are this block of a period."""
        size = len(self.blocks)
        return range(self.first + block, self.first + size * self.repeats, size)


class Stack(NamedTuple):
    """Layers from the bottom up.

    Attributes:
        segments: what they are.
        width: M.
        norm: normalisation of the output; None where the last layer has done it.
        shared_positions: the bias by distance that layers share; None without.
        dropout: probability of zeroing what a sublayer adds.
        residual_scale: factor of what a sublayer adds.
    """

    segments: tuple[Segment, ...]
    width: int
    norm: NormSettings | None
    shared_positions: PositionSettings | None = None
    dropout: float = 0.0
    residual_scale: float = 1.0

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


class Place(NamedTuple):
    """Where the arrays of a sublayer are, and of which layers they are.

    Attributes:
        stack: name of the stack.
        segment: place of the segment in its stack.
        block: place of the block in its period.
        sublayer: what it is.
        numbers: layers whose arrays are stacked there.
    """

    stack: str
    segment: int
    block: int
    sublayer: Sublayer
    numbers: range


class Layers(NamedTuple):
    """All that decides a model's function; a checkpoint's identity.

    Attributes:
        embedding: input and output.
        encoder: layers in which tokens see all others; None without.
        decoder: layers in which they see those before them, and the encoder's output
            if there is one; None without.
        ahead: layers that predict tokens after the next, in training alone: a segment
            for each token (`moe/model/multi_token.py`); None without.
    """

    embedding: EmbeddingSettings
    encoder: Stack | None
    decoder: Stack | None
    ahead: Stack | None = None

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks there are, in the order of computing; the last one is scored."""
        both = {"encoder": self.encoder, "decoder": self.decoder}
        return {name: stack for name, stack in both.items() if stack is not None}

    @property
    def scored(self) -> str:
        """Name of the stack whose output is scored."""
        return list(self.stacks)[-1]

    def settings(self, kind: str) -> list[Any]:
        """Returns the records of all sublayers of one kind, from the bottom up."""
        return [s for stack in self.stacks.values() for s in stack.settings(kind)]

    def sparse(self) -> Iterator[Place]:
        """Yields the sparse sublayers of each segment, repeats of one as one."""
        return (each for each in self._sparse() if each.stack != "ahead")

    def sparse_ahead(self) -> Iterator[Place]:
        """Yields those of the layers that predict tokens after the next."""
        return (each for each in self._sparse() if each.stack == "ahead")

    def _sparse(self) -> Iterator[Place]:
        return (each for each in self.places() if each.sublayer.kind == "sparse")

    def places(self) -> Iterator[Place]:
        """Yields all sublayers of each segment, those of `ahead` at the end."""
        ahead = {} if self.ahead is None else {"ahead": self.ahead}
        for name, stack in (self.stacks | ahead).items():
            for s, segment in enumerate(stack.segments):
                for b, block in enumerate(segment.blocks):
                    for each in block:
                        yield Place(name, s, b, each, segment.numbers(b))

    @property
    def sparse_order(self) -> tuple[int, ...]:
        """Place of each sparse layer, from the bottom up, among those of `sparse()`."""
        names = list(self.stacks)
        layers = [
            (names.index(place.stack), n)
            for place in self.sparse()
            for n in place.numbers
        ]
        order = sorted(range(len(layers)), key=layers.__getitem__)
        return tuple(order) if order != list(range(len(order))) else ()

    @property
    def hashed(self) -> tuple[bool, ...]:
        """Of each sparse layer, from the bottom up, whether a table chooses."""
        found = [
            place.sublayer.settings.router.family == "hashed"
            for place in self.sparse()
            for _ in place.numbers
        ]
        return tuple(found[place] for place in self.sparse_order or range(len(found)))


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

    def of_stack(stack: Stack) -> Stack:
        segments = tuple(
            segment._replace(
                blocks=tuple(tuple(map(changed, block)) for block in segment.blocks)
            )
            for segment in stack.segments
        )
        return stack._replace(segments=segments)

    found = {name: of_stack(stack) for name, stack in layers.stacks.items()}
    ahead = None if layers.ahead is None else of_stack(layers.ahead)
    return Layers(layers.embedding, found.get("encoder"), found.get("decoder"), ahead)
