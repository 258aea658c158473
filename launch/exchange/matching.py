"""Which of their arrays are which of ours: all of both, or an error with all others."""

import collections
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax

from launch.exchange.family import ExchangeError
from launch.exchange.rules import Member, Rule, Rules, members, shape_of, sizes_of
from moe.layers import Layers
from moe.model import inventory

_MOST_LINES = 40


class Ours(NamedTuple):
    """One of our arrays, or one layer of one that holds several.

    Attributes:
        path: path in the tree of parameters.
        layer: place in the first dim of it; None if it is of no layer.
        stack: "encoder" or "decoder"; "" if it is of no layer.
        rule: path of its rules; one of a stack alone has the stack before it, and one
            of arrays of so many dims alone " of " and their number behind it.
        prefix: what stands before their names.
        shape: shape without the dim of layers.
        dtype: type that it is kept in whatever a run's is; "" is that of the run.
    """

    path: str
    layer: int | None
    stack: str
    rule: str
    prefix: str
    shape: tuple[int, ...]
    dtype: str

    def rule_in(self, rules: Rules) -> Rule | None:
        """Returns what rules say of it."""
        dims = f" of {len(self.shape)}"
        paths = (f"{self.stack}/{self.rule}", self.rule)
        found = (rules.get(path + end) for path in paths for end in (dims, ""))
        return next(filter(None, found), None)


def ours_of(layers: Layers, names: Mapping[str, str]) -> Iterator[Ours]:
    """Yields all parameters, each layer of an array by itself.

    Args:
        layers: what the model is.
        names: what those of a layer begin with, as `Family.layers` has it.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(inventory.specs(layers))
    for keys, spec in found:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stack, _, within = path.partition("/layers/")
        if not within:
            yield Ours(path, None, "", path, "", spec.shape, spec.dtype)
            continue
        segment, block, rule = within.split("/", 2)
        segments = layers.stacks[stack].segments
        for place, number in enumerate(segments[int(segment)].numbers(int(block))):
            prefix = names[stack].format(number)
            yield Ours(path, place, stack, rule, prefix, spec.shape[1:], spec.dtype)


def matched(
    ours: Sequence[Ours],
    readings: Sequence[Rules],
    names: Collection[str],
    ignored: str,
    where: str,
) -> tuple[list[Rule], list[str]]:
    """Finds by which rule each of our arrays is made, and what is left out.

    Args:
        ours: all of them.
        readings: sets of rules, of which the first is taken whose arrays are there.
        names: their arrays.
        ignored: pattern of names that need not be read.
        where: what has those arrays, for an error.
    Returns:
        A rule for each; and a line for each kind of array that is not read, as
        `ignored` allows.
    Raises:
        ExchangeError: one cannot be made, or one of theirs would not be used; the
            message lists all.
    """
    found: list[Rule] = []
    missing: list[str] = []
    used: set[str] = set()
    for each in ours:
        wanted = [
            (rule, [each.prefix + one.name for one in members(rule, each.shape)])
            for rules in readings
            if (rule := each.rule_in(rules))
        ]
        if not wanted:
            missing.append(
                f"{each.prefix}{each.rule}, of which no rule says what it is"
            )
            continue
        # Where none is there whole, it is the first of which a part is.
        rule, theirs = min(wanted, key=lambda one: _lack(one[1], names))
        found.append(rule)
        missing += [name for name in theirs if name not in names]
        used.update(theirs)
    left = [name for name in names if name not in used]
    unused = [name for name in left if not re.fullmatch(ignored, name)]
    lines = [f"missing: {line}" for line in _together(missing)]
    lines += [f"not used: {line}" for line in _together(unused)]
    if lines:
        more = len(lines) - _MOST_LINES
        lines = lines[:_MOST_LINES] + [f"and {more:,} more kinds"] * (more > 0)
        raise ExchangeError(
            f"{where} does not hold the model that its config.json describes; with N "
            "for numbers:\n  " + "\n  ".join(lines)
        )
    return found, _together(left)


def their_shape(pieces: Sequence[tuple[Ours, Member]]) -> tuple[int, ...]:
    """Returns the shape of one of their arrays.

    Args:
        pieces: all of ours that it is a part of, or that are parts of it.
    """
    sizes: dict[str, int] = {}
    for ours, member in pieces:
        taken = zip(ours.shape, member.taken, strict=True)
        shape = tuple(size for size, part in taken if isinstance(part, slice))
        sizes |= sizes_of(member.dims, shape)
    return shape_of(pieces[0][1].dims, sizes)


def _lack(wanted: Sequence[str], names: Collection[str]) -> int:
    """Orders sets of arrays: those that are there, those of which a part is, others."""
    there = sum(name in names for name in wanted)
    return 0 if there == len(wanted) else 1 if there else 2


def _together(names: Sequence[str]) -> list[str]:
    """Lists names that differ in numbers alone as one, with how many there are."""
    kinds: dict[str, list[list[str]]] = collections.defaultdict(list)
    for name in names:
        kinds[re.sub(r"(?<=[._])\d+(?=\.)", "N", name)].append(name.split("."))
    lines = []
    for each in kinds.values():
        parts = [
            at[0] if len(set(at)) == 1 else re.sub(r"\d+$", "N", at[0])
            for at in zip(*each, strict=True)
        ]
        number = f" ({len(each):,} of them)" if len(each) > 1 else ""
        lines.append(f"{'.'.join(parts)}{number}")
    return lines
