"""What a compiled program sends, multiplies and holds, read from its HLO text.

XLA's own cost analysis counts the body of a loop once; here loops count as often as
they run. Works on programs for TPU, GPU and CPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from launch.planning.compiler.groups import axes, groups_text, members
from launch.planning.compiler.hlo_text import Array, Instruction, Module, arrays

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Equal collectives of one step, taken together.

    Attributes:
        kind: as HLO names it; "send" is one to another slice.
        axes: the mesh axes within which it moves data; () for what is no set of axes.
        bytes: what one device sends to others per step, by ring or exchange.
        count: how often it runs per step.
        in_loop: whether in a loop.
        source: the line that asked for it, "moe/dispatch/exchange.py:28".
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    count: int
    in_loop: bool
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large value: its bytes with padding, its shape, and where it comes from."""

    bytes: int
    shape: str
    source: str
    operation: str


def collectives(module: Module, sizes: Mapping[str, int]) -> list[Collective]:
    """Lists what a step sends, the most bytes first.

    Bytes by the usual formulas for n members: gather (n − 1)/n of what comes out,
    reduce-scatter of what goes in, all-reduce twice that, exchange (n − 1)/n, permute
    once. A ragged exchange is counted as if its buffer were full.

    Args:
        module: the compiled program of one device.
        sizes: devices along each of the mesh's axes, in its order.
    """
    totals: dict[tuple, list[float]] = {}
    groups = functools.cache(lambda text: members(text, math.prod(sizes.values())))
    for instruction, times, in_loop in module.runs():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS or _is_later_stage(instruction, module):
            continue
        kind, sent, within = _measured(instruction, kind, groups, sizes)
        if sent == 0:
            continue
        key = (kind, within, in_loop, module.source(instruction))
        total = totals.setdefault(key, [0.0, 0])
        total[0] += sent * times
        total[1] += times
    found = [
        Collective(kind, within, total[0], int(total[1]), in_loop, source)
        for (kind, within, in_loop, source), total in totals.items()
    ]
    return sorted(found, key=lambda one: (-one.bytes, one.kind, one.axes))


def _is_later_stage(instruction: Instruction, module: Module) -> bool:
    """Whether a TPU has begun this collective in an earlier fusion.

    One that overlaps with products is written once in the fusion that starts it, in
    every fusion beside which it goes on, and in the one that waits for it.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    siblings = module.computations[instruction.computation].values()
    return not any("AsyncCollectiveStart" in one.attributes for one in siblings)


def _measured(
    instruction: Instruction,
    kind: str,
    read: Callable[[str], np.ndarray],
    sizes: Mapping[str, int],
) -> tuple[str, float, tuple[str, ...]]:
    """Returns kind, bytes one device sends each time, and axes."""
    outputs = _outputs(instruction, kind)
    size = sum(array.bytes for array in outputs)
    if kind == "send":
        return kind, size, ("replica",)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.attributes):
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])]
        groups = np.array(numbers).reshape(-1, 2)
        return kind, size, axes(groups[groups[:, 0] != groups[:, 1]], sizes)
    groups = read(groups_text(instruction.attributes))
    number = groups.shape[1]
    if kind == "all-reduce" and "all-reduce-scatter" in instruction.computation:
        # A TPU's reduce-scatter is a fusion of all-reduce and slice.
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        size *= number
    factor = 2 if kind == "all-reduce" else 1
    return kind, factor * size * (number - 1) / number, axes(groups, sizes)


def _outputs(instruction: Instruction, kind: str) -> Sequence[Array]:
    """What comes out, also of the first half of an asynchronous pair."""
    found = arrays(instruction.shape)
    if kind == "send":
        return found[:1]
    if instruction.opcode.endswith("-start"):
        if kind == "collective-permute":
            return found[1:2]
        if kind in ("all-gather", "reduce-scatter"):
            return found[len(found) // 2 :]  # inputs, then outputs
    return found


# ---------------------------------------------------------------------- arithmetic


def product_flops(module: Module) -> float:
    """Counts operations of matrix products and convolutions in one step.

    Multiply and add count as two. Products in kernels of their own (`ragged_dot` and
    splash attention on a TPU) are not seen.
    """
    total = 0.0
    for instruction, times, _ in module.runs():
        if instruction.opcode not in ("dot", "convolution"):
            continue
        siblings = module.computations[instruction.computation]
        operands = [
            arrays(siblings[name].shape)[0] for name in instruction.operands[:2]
        ]
        count = _dot if instruction.opcode == "dot" else _convolution
        total += times * count(instruction, operands)
    return total


def _dot(instruction: Instruction, operands: Sequence[Array]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    depth = math.prod(operands[0].sizes[dim] for dim in dims)
    return 2.0 * depth * math.prod(arrays(instruction.shape)[0].sizes)


def _convolution(instruction: Instruction, operands: Sequence[Array]) -> float:
    """TPU writes products as convolutions, whose padding is not work."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    left, right, out = (
        {label: place for place, label in enumerate(part)} for part in labels.groups()
    )
    result = arrays(instruction.shape)[0].sizes
    flops = 2.0 * result[out["b"]] * result[out["f"]] * operands[1].sizes[right["i"]]
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", _window(instruction.attributes)))
    for place in range(len(left) - 2):
        flops *= _taps(
            operands[0].sizes[left[str(place)]],
            operands[1].sizes[right[str(place)]],
            result[out[str(place)]],
            tuple(
                window[key].split("x")[place] if key in window else default
                for key, default in (
                    ("stride", "1"),
                    ("pad", "0_0"),
                    ("lhs_dilate", "1"),
                    ("rhs_dilate", "1"),
                )
            ),
        )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return flops / (int(groups[1]) if groups else 1)


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


@functools.lru_cache(maxsize=4096)
def _taps(width: int, kernel: int, out: int, how: tuple[str, ...]) -> int:
    """How many pairs of output and kernel places of one dimension meet an input."""
    stride, low = int(how[0]), int(how[1].split("_")[0])
    spread, apart = int(how[2]), int(how[3])
    place = np.arange(out)[:, None] * stride - low + np.arange(kernel)[None] * apart
    inside = (place >= 0) & (place <= (width - 1) * spread) & (place % spread == 0)
    return int(inside.sum())


# -------------------------------------------------------------------------- buffers

_NO_BUFFER = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
        *("while", "conditional", "call", "optimization-barrier", "async-done"),
        *("copy-done", "all-gather-done", "all-reduce-done"),
    }
)


# Where a program has not been optimised yet: what will hardly be fused away.
_HELD = frozenset(
    {
        *("dot", "convolution", "dynamic-update-slice", "gather", "scatter", "sort"),
        *("custom-call", *_KINDS),
    }
)


def largest_buffers(
    module: Module, number: int = 12, *, optimised: bool = True
) -> list[Buffer]:
    """Lists the largest values that the program computes, by size and source.

    What is computed inside a fusion takes no memory; what lies in the core's own
    memory takes none of the chip's. Not all of these are alive at the same time.

    Args:
        module: the program.
        number: how many to list, each shape and source line once.
        optimised: whether it is compiled; else only products, updates and what is
            exchanged count, as most of the rest would be fused.
    """
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for name, instructions in module.computations.items():
        if "fused_computation" in name or name.startswith("fusion"):
            continue
        for instruction in instructions.values():
            opcode = instruction.opcode
            if opcode in _NO_BUFFER if optimised else opcode not in _HELD:
                continue
            for array in arrays(instruction.shape):
                if array.in_main_memory:
                    key = (str(array), module.source(instruction))
                    one = (array.padded_bytes, _operation(instruction))
                    found[key] = max(found.get(key, (0, "")), one)
    largest = sorted(found.items(), key=lambda item: -item[1][0])[:number]
    return [
        Buffer(size, shape, source, operation)
        for (shape, source), (size, operation) in largest
    ]


def _operation(instruction: Instruction) -> str:
    """The last part of the name that jax gave, else HLO's."""
    named = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return named[1].rpartition("/")[2] if named else instruction.opcode
