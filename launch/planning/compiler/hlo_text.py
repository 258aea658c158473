"""Reads compiled HLO text: instructions, shapes, how often each one runs, and whose."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4"), 1),
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_BREAK = re.compile(r'\n(?="|\}\})')  # within what a kernel of Pallas says of itself
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":?\s*\{\\?"n\\?":\\?"(\d+)')


class Array:
    """One array in a shape: element type, sizes, and what they take."""

    def __init__(self, dtype: str, sizes: tuple[int, ...], layout: str) -> None:
        self.dtype = dtype
        self.sizes = sizes
        self.layout = layout

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return math.prod(self.sizes) * BYTES.get(self.dtype, 0)

    @property
    def padded_bytes(self) -> int:
        """With the padding of a TPU's tiles: T(8,128) rounds the two minor sizes up."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.bytes
        sizes = [self.sizes[int(dim)] for dim in order.split(",")]  # minor first
        for place, unit in enumerate(reversed(tile[1].split(","))):
            if place < len(sizes):
                sizes[place] = -(-sizes[place] // int(unit)) * int(unit)
        return math.prod(sizes) * BYTES.get(self.dtype, 0)

    @property
    def in_main_memory(self) -> bool:
        """Not in the core's own memory, S(1), nor on the host, S(5)."""
        return not re.search(r"S\([1-9]\)", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


def arrays(shape: str) -> list[Array]:
    """Lists the arrays of a shape, those of a tuple one after the other."""
    return [
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout)
        for dtype, sizes, layout in _ARRAY.findall(shape)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    computation: str
    is_root: bool


class Module:
    """A parsed program.

    Attributes:
        computations: their instructions by name, in order.
        entry: the name of the one that runs first.
        unknown_loops: names of loops whose number of trips could not be read; they are
            counted once.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        self._tables = _Frames(text)
        current: dict[str, Instruction] = {}
        name = ""
        for line in _BREAK.sub(" ", text).splitlines():
            if head := _HEAD.match(line):
                name = head[2]
                current = self.computations[name] = {}
                self.entry = name if head[1] else self.entry
            elif name and (found := _instruction(line, name)):
                current[found.name] = found
            elif line.startswith("}"):
                # A part that was lost would count as nothing.
                assert any(each.is_root for each in current.values()), name
                name = ""

    def source(self, instruction: Instruction) -> str:
        """Says where it comes from, "moe/model/attention.py:12", or "" if unknown."""
        return self._tables.source(instruction.attributes)

    def runs(self) -> Iterator[tuple[Instruction, int, bool]]:
        """Yields every instruction with how often a step runs it, and if in a loop.

        All branches of a condition are yielded, so what they hold is an upper bound.
        """
        yield from self._runs_of(self.entry, 1, in_loop=False)

    def _runs_of(
        self, name: str, times: int, *, in_loop: bool
    ) -> Iterator[tuple[Instruction, int, bool]]:
        for instruction in self.computations.get(name, {}).values():
            yield instruction, times, in_loop
            if instruction.opcode == "while":
                trips = self.trips(instruction)
                if trips is None:
                    self.unknown_loops.add(instruction.name)
                body = re.search(r"body=%?([\w.\-]+)", instruction.attributes)
                assert body is not None, instruction
                yield from self._runs_of(body[1], times * (trips or 1), in_loop=True)
                continue
            for called in _called(instruction):
                yield from self._runs_of(called, times, in_loop=in_loop)

    def trips(self, loop: Instruction) -> int | None:
        """Reads how often a loop runs: noted by XLA, or from its condition.

        Scans count from 0 to a constant; TPU's programs carry no note of it.
        """
        if noted := _TRIPS.search(loop.attributes):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        assert condition is not None, loop
        lines = {line.name: line for line in self._with_fusions(condition[1])}
        compares = [line for line in lines.values() if line.opcode == "compare"]
        limits = {
            int(line.operands[0])
            for line in lines.values()
            if line.opcode == "constant" and re.fullmatch(r"[su]\d+\[\].*", line.shape)
        }
        if len(compares) != 1 or len(limits) != 1:
            return None
        counter = lines.get(compares[0].operands[0])
        counts = counter and counter.opcode in ("get-tuple-element", "parameter")
        limit = limits.pop()
        if not counts or "direction=LT" not in compares[0].attributes or limit < 1:
            return None
        return limit

    def _with_fusions(self, name: str) -> Iterator[Instruction]:
        for instruction in self.computations.get(name, {}).values():
            yield instruction
            for called in _called(instruction):
                yield from self._with_fusions(called)


def _called(instruction: Instruction) -> list[str]:
    """Computations that run as part of an instruction that moves control."""
    # A reducer runs per element, and asynchronous ones run where they start.
    if instruction.opcode not in ("fusion", "call", "conditional", "async-start"):
        return []
    found = _CALLED.findall(instruction.attributes)
    if branches := _BRANCHES.search(instruction.attributes):
        found += [name.strip().lstrip("%") for name in branches[1].split(",")]
    return found


def _instruction(line: str, computation: str) -> Instruction | None:
    found = _LINE.match(_COMMENT.sub("", line))
    if found is None:
        return None
    root, name, rest = found.groups()
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    open_ = opcode.end() - 1
    close = open_ + _closing(rest[open_:])
    inside = rest[open_ + 1 : close - 1]
    operands = tuple(
        part.strip().rpartition(" ")[2].lstrip("%") for part in _split(inside)
    )
    return Instruction(
        name=name,
        shape=rest[:end],
        opcode=opcode[1],
        operands=operands or ("",),
        attributes=rest[close:],
        computation=computation,
        is_root=bool(root),
    )


def _closing(text: str) -> int:
    """The place behind the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if text else []


class _Frames:
    """The tables of files and call stacks at the head of a program."""

    def __init__(self, text: str) -> None:
        self._files = {
            number: rest.strip('"') for number, rest in _table(text, "FileNames")
        }
        self._locations = _numbers(text, "FileLocations")
        self._frames = _numbers(text, "StackFrames")

    def source(self, attributes: str) -> str:
        """The innermost frame of our own code, else the innermost."""
        if direct := re.search(r'source_file="([^"]*)" source_line=(\d+)', attributes):
            return f"{_relative(direct[1])}:{direct[2]}"
        frame = re.search(r"stack_frame_id=(\d+)", attributes)
        return self._of_frame(int(frame[1])) if frame else ""

    @functools.cache  # noqa: B019 (lives as long as the text it reads)
    def _of_frame(self, frame: int) -> str:
        innermost = ""
        while frame in self._frames:
            place = self._locations[self._frames[frame]["file_location_id"]]
            name = self._files.get(place["file_name_id"], "")
            source = f"{_relative(name)}:{place['line']}"
            if re.match(r"(moe|partitioning|launch|tasks)/", source):
                return source
            innermost = innermost or source
            # Parents are numbered from 1 for "none".
            frame = self._frames[frame]["parent_frame_id"] - 1
        return innermost


def _table(text: str, title: str) -> list[tuple[int, str]]:
    start = text.find(f"\n{title}\n")
    if start < 0:
        return []
    start += len(title) + 2
    lines = text[start : text.find("\n\n", start)].splitlines()
    pairs = (line.partition(" ") for line in lines)
    return [(int(number), rest) for number, _, rest in pairs if number.isdigit()]


def _numbers(text: str, title: str) -> Mapping[int, dict[str, int]]:
    return {
        number: {key: int(n) for key, n in re.findall(r"(\w+)=(\d+)", rest)}
        for number, rest in _table(text, title)
    }


def _relative(path: str) -> str:
    """A file's name from its package on: no folder of this machine."""
    _, found, inside = path.rpartition("/site-packages/")
    if found:
        return inside
    ours = re.search(r"/((?:moe|partitioning|launch|tasks|tests)/.*)$", path)
    return ours[1] if ours else path.rpartition("/")[2]
