"""How arrays of other systems become ours, and ours theirs: names, and dims.

A rule stands under the path of one of our arrays. It is the name of theirs and what is
done to its dims, "ND,M -> M,N,D": a letter is a dim; letters side by side are one dim
of theirs that ours keeps as several. "[D|W]" is two blocks of one dim, one after the
other, of which the right side names the one taken; "[1/3]" is the first of three of one
size. Without an arrow both are the same.

Several of theirs may be one of ours: names joined by " + " are parts of a new dim c,
and where a name holds "{E}" there is one array for each expert. These dims stand first
on the left side, E before c.

Letters are those of `moe`, and W width of a head's values, R width of a latent, P
turned numbers of a key, c gate and up.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Rule = tuple[str, str]
Rules = dict[str, Rule]


class Member(NamedTuple):
    """One of their arrays, and the part of one of ours that it is.

    Attributes:
        name: its name, without what stands before the names of a rule.
        dims: the rule of its dims.
        taken: the part, as NumPy indexes it.
    """

    name: str
    dims: str
    taken: tuple[Any, ...]


def members(rule: Rule, shape: tuple[int, ...]) -> Iterator[Member]:
    """Yields those of their arrays that one of ours is made of.

    Args:
        rule: names and dims.
        shape: sizes of our dims.
    """
    names, dims = rule
    left, right = _sides(dims)
    parts = names.split(" + ")
    stacked = ["E"] * ("{E}" in names) + ["c"] * (len(parts) > 1)
    assert left[: len(stacked)] == stacked, rule
    sizes = dict(zip(right, shape, strict=True))
    one = ",".join(left[len(stacked) :]) + " -> "
    one += ",".join(letter for letter in right if letter not in stacked)
    for numbers in itertools.product(*(range(sizes[letter]) for letter in stacked)):
        at: dict[str, Any] = dict(zip(stacked, numbers, strict=True))
        name = parts[at.get("c", 0)].replace("{E}", str(at.get("E")))
        yield Member(name, one, tuple(at.get(x, slice(None)) for x in right))


def read(
    theirs: Mapping[str, np.ndarray],
    prefix: str,
    rule: Rule,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Returns one of our arrays, made of theirs.

    Args:
        theirs: their arrays by name; each is asked for once.
        prefix: what stands before the names of the rule.
        rule: names and dims.
        shape: sizes of our dims, from which those of theirs follow.
    Raises:
        KeyError: there is no array of that name.
        ValueError: its shape is not what the rule says.
    """
    made: np.ndarray | None = None
    for member in members(rule, shape):
        array = theirs[prefix + member.name]
        sizes = zip(shape, member.taken, strict=True)
        of_part = tuple(size for size, taken in sizes if isinstance(taken, slice))
        try:
            part = arranged(array, member.dims, of_part)
        except ValueError as error:
            raise ValueError(
                f"{prefix}{member.name} of shape {array.shape} is no {member.dims!r} "
                f"of {of_part}"
            ) from error
        if part.shape == shape:  # all of it, and not copied
            return part
        if made is None:
            made = np.empty(shape, array.dtype)
        made[member.taken] = part
    assert made is not None, rule
    return made


def arranged(array: np.ndarray, dims: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of theirs with its dims as the right side of a rule has them."""
    rooms, taken, letters = _split(array.shape, dims, shape)
    order = _sides(dims)[1]
    return array.reshape(rooms)[taken].transpose([letters.index(x) for x in order])


def put(array: np.ndarray, into: np.ndarray, dims: str) -> None:
    """Writes an array of ours into theirs: `arranged`, the other way round.

    Args:
        array: ours.
        into: theirs, contiguous; of two blocks in it one is written.
        dims: those of a rule.
    """
    rooms, taken, letters = _split(into.shape, dims, array.shape)
    order = _sides(dims)[1]
    view = into.reshape(rooms)
    view[taken] = array.transpose([order.index(letter) for letter in letters])


def shape_of(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the shape of an array of theirs, from the sizes of all its letters."""
    return tuple(
        math.prod(
            int(number)
            if number
            else sizes[letter]
            if letter
            else sizes[first] + sizes[second]
            for _, number, first, second, letter in _found(dim)
        )
        for dim in _sides(dims)[0]
    )


def sizes_of(dims: str, shape: tuple[int, ...]) -> dict[str, int]:
    """Returns the sizes of the letters of our dims."""
    return dict(zip(_sides(dims)[1], shape, strict=True))


def _sides(dims: str) -> tuple[list[str], list[str]]:
    left, _, right = dims.partition(" -> ")
    return left.split(","), (right or left).split(",")


def _split(
    theirs: tuple[int, ...], dims: str, ours: tuple[int, ...]
) -> tuple[list[int], tuple[slice | int, ...], list[str]]:
    """Takes a shape of theirs apart: sizes, what of them is ours, and our letters."""
    left, order = _sides(dims)
    sizes = dict(zip(order, ours, strict=True))
    parts = [
        part
        for size, dim in zip(theirs, left, strict=True)
        for part in _parts(dim, size, sizes)
    ]
    taken = tuple(
        slice(start, start + sizes[letter]) if letter else start
        for letter, _, start in parts
    )
    letters = [letter for letter, _, _ in parts if letter]
    return [room for _, room, _ in parts], taken, letters


def _found(dim: str) -> list[tuple[str, str, str, str, str]]:
    """The parts of a dim of theirs.

    Returns:
        Which of how many blocks; the letters of both of two; or one alone, at the end.
    """
    return re.findall(r"\[(\d)/(\d)\]|\[(\w)\|(\w)\]|(\w)", dim)


def _parts(dim: str, size: int, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Takes one dim of theirs apart.

    Returns:
        Of each part our letter, its size there, and where ours begins in it. A part of
        blocks of one size has no letter, and their number for its size.
    """
    found = _found(dim)
    room = size // math.prod(
        int(number) if number else sizes[letter]
        for _, number, _, _, letter in found
        if number or letter
    )
    parts = []
    for block, number, first, second, letter in found:
        if number:
            parts.append(("", int(number), int(block) - 1))
        elif letter:
            parts.append((letter, sizes[letter], 0))
        elif first in sizes:
            parts.append((first, room, 0))
        else:
            parts.append((second, room, room - sizes[second]))
    fits = all(sizes[letter] <= there for letter, there, _ in parts if letter)
    if not fits or math.prod(there for _, there, _ in parts) != size:
        raise ValueError(f"a dim of {size} is no {dim}")
    return parts
