"""One purpose of sending: how many bytes, how often, over which axes."""

import dataclasses
from collections.abc import Mapping, Sequence

from launch.planning.cost.local import Local
from moe.layers import Block
from partitioning.settings import AXES

EXCHANGE = "all_to_all"
RING = "ring"


@dataclasses.dataclass(frozen=True)
class Flow:
    """One purpose of sending.

    Attributes:
        purpose: what for.
        axes: mesh axes larger than 1 that it goes over; the first moves the whole, each
            other what the ones before it have left.
        whole_bytes: size of all that one collective gathers, scatters or exchanges.
        times: collectives per step; a sum of all counts as two.
        pattern: "ring" for gathers and sums, "all_to_all".
        formula: how `whole_bytes` and `times` come about.
    """

    purpose: str
    axes: tuple[str, ...]
    whole_bytes: int
    times: int
    pattern: str
    formula: str
    sizes: dict[str, int] = dataclasses.field(repr=False)

    @property
    def by_axis(self) -> dict[str, float]:
        """Bytes that one chip sends in a step over each axis.

        Together they send (n-1)/n of the whole.
        """
        found, rest = {}, float(self.whole_bytes)
        for axis in self.axes:
            size = self.sizes[axis]
            found[axis] = self.times * rest * (size - 1) / size
            rest /= size
        return found

    @property
    def sent_bytes(self) -> float:
        """Bytes that one chip sends in a step."""
        return sum(self.by_axis.values())


def at_once(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Orders the axes of one collective over all of them, which nobody is asked about.

    Arithmetic and what was compiled are counted alike: the largest axis moves the
    whole, and over the slow network goes the last rest.
    """
    in_order = sorted(axes, key=AXES.index)
    return tuple(sorted(in_order, key=lambda a: (a == "replica", -sizes[a])))


def flow_of(
    sizes: Local,
    purpose: str,
    axes: Sequence[str],
    whole_bytes: int,
    times: int,
    formula: str,
    pattern: str = RING,
) -> Flow:
    """Makes a flow over those of the axes that are larger than 1; see `Flow`."""
    large = [axis for axis in axes if sizes.sizes[axis] > 1]
    return Flow(
        purpose, tuple(large), whole_bytes, times, pattern, formula, sizes.sizes
    )


def forward_passes(sizes: Local) -> int:
    """Forward passes per step: each microbatch, if there are several, once more."""
    microbatches = sizes.settings.train.microbatches
    return microbatches * (2 if microbatches > 1 else 1)


def repeats(sizes: Local, block: Block, *, kept_by: Sequence[str]) -> int:
    """Forward passes of a layer's part that its remat policy adds, per step."""
    kept = sizes.remat(block) in kept_by
    return 0 if kept else sizes.settings.train.microbatches


def times(
    sizes: Local, block: Block, layers: int, *, kept_by: Sequence[str] = ("none",)
) -> int:
    """Forward, backward, and forward again under the remat policies not named."""
    backward = sizes.settings.train.microbatches
    again = repeats(sizes, block, kept_by=kept_by)
    return layers * (forward_passes(sizes) + backward + again)


def cuts_sequence(sizes: Local) -> bool:
    """Whether the residual stream is cut over `model`."""
    partition = sizes.settings.partition
    return partition.sequence_parallel and sizes.settings.mesh.model > 1


def joins(sizes: Local) -> int:
    """Collectives that leave a product cut over `model`: a scatter, or a whole sum."""
    return 1 if cuts_sequence(sizes) else 2
