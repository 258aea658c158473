"""How mesh axes lie on a torus, and what that leaves of its links."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple


class Cut(NamedTuple):
    """The part of one dimension that an axis takes.

    Attributes:
        size: places along the part.
        stride: places of the dimension from one to the next.
        whole: places of the whole dimension.
        closed: whether the dimension's ends are joined.
    """

    size: int
    stride: int
    whole: int
    closed: bool


def lay_out(
    sizes: Mapping[str, int], shape: Sequence[int], closed: Sequence[bool]
) -> dict[str, tuple[Cut, ...]]:
    """Gives every axis larger than 1 whole dimensions, or parts of them.

    Follows `jax.experimental.mesh_utils` where no dimension must be cut: the last axis
    chooses first, and takes as many dimensions as can multiply to its size. Where one
    must be cut, it takes the parts that leave it the most links; jax's choice may be
    another of the same kind.

    Args:
        sizes: lengths of the axes, in the mesh's order; they multiply to the shape's
            product.
        shape: lengths of the torus's dimensions.
        closed: per dimension, whether it is a ring.
    """
    left = dict(enumerate(shape))
    found = {}
    for axis, size in reversed(list(sizes.items())):
        if size == 1:
            continue
        chosen = _whole(size, left)
        if chosen is None:
            return _cut(sizes, shape, closed)
        found[axis] = tuple(
            Cut(left.pop(place), 1, shape[place], closed[place]) for place in chosen
        )
    return found


def _whole(size: int, left: Mapping[int, int]) -> tuple[int, ...] | None:
    for number in range(len(left), 0, -1):
        for places in itertools.combinations(left, number):
            if math.prod(left[place] for place in places) == size:
                return places
    return None


def _cut(
    sizes: Mapping[str, int], shape: Sequence[int], closed: Sequence[bool]
) -> dict[str, tuple[Cut, ...]]:
    """Cuts dimensions; what an earlier choice took of one lies inside what is left."""
    taken = [1] * len(shape)
    found = {}
    for axis, size in reversed(list(sizes.items())):
        if size == 1:
            continue
        room = [whole // used for whole, used in zip(shape, taken, strict=True)]
        candidates = [
            (_parts(parts, taken, shape, closed), parts)
            for parts in _factorisations(size, room)
            if _rest_fits(sizes, axis, room, parts)
        ]
        assert candidates, f"{dict(sizes)} does not multiply to {tuple(shape)}"
        found[axis], parts = max(candidates, key=lambda candidate: ring(candidate[0]))
        taken = [used * part for used, part in zip(taken, parts, strict=True)]
    return found


def _parts(
    parts: Sequence[int],
    taken: Sequence[int],
    shape: Sequence[int],
    closed: Sequence[bool],
) -> tuple[Cut, ...]:
    return tuple(
        Cut(part, taken[place], shape[place], closed[place])
        for place, part in enumerate(parts)
        if part > 1
    )


def _rest_fits(
    sizes: Mapping[str, int], axis: str, room: Sequence[int], parts: Sequence[int]
) -> bool:
    """Whether the axes that choose later multiply to what is left."""
    names = list(sizes)
    earlier = math.prod(sizes[name] for name in names[: names.index(axis)])
    left = math.prod(r // p for r, p in zip(room, parts, strict=True))
    return earlier == left


def _factorisations(size: int, room: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields every way to write `size` as a product of divisors of `room`."""
    if not room:
        if size == 1:
            yield ()
        return
    first, *others = room
    for part in range(1, first + 1):
        if first % part == 0 and size % part == 0:
            for rest in _factorisations(size // part, others):
                yield (part, *rest)


def ring(cuts: Sequence[Cut]) -> float:
    """Returns the links, one way, that gathers and sums over these parts can use.

    A closed dimension: both links of a chip. An open one, or the inner part of a cut
    one, is a line, whose ends receive everything over one link. The outer part of a
    cut dimension is closed if that is, but its neighbours are `stride` links apart, and
    as many rings share them.
    """
    links = 0.0
    for cut in cuts:
        reaches_around = cut.closed and cut.size * cut.stride == cut.whole
        links += (2 if reaches_around and cut.size > 2 else 1) / cut.stride
    return links


def spread(cuts: Sequence[Cut]) -> float:
    """Returns the links, one way, that an exchange of all with all can use.

    Over n places of a ring half of all bytes cross a cut of two links each way, over a
    line of one: a chip sends (n − 1)/n of its bytes in the time n/8, or n/4, of them
    take on one link. Dimensions work at the same time; the longest is last.
    """
    number = math.prod(cut.size for cut in cuts)
    slowest = 0.0
    for cut in cuts:
        reaches_around = cut.closed and cut.size * cut.stride == cut.whole
        time = cut.size * cut.stride / (8 if reaches_around and cut.size > 2 else 4)
        slowest = max(slowest, time)
    return (number - 1) / number / slowest
