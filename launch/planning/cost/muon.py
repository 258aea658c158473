"""What Muon computes and sends, of each array whose matrices it makes orthogonal."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from launch.config.settings import Settings
from launch.planning.cost.local import FLOAT32
from moe.model import inventory
from moe.model.parameters import Spec
from moe.training.muon import cuts, is_made_orthogonal
from moe.training.trained import trained_of
from partitioning import rules
from partitioning.settings import AXES, FASTEST_FIRST


@dataclasses.dataclass(frozen=True)
class Share:
    """One chip's share of an array of matrices.

    Attributes:
        number: matrices that it makes orthogonal.
        inputs: rows of each.
        outputs: columns of each.
        exchanged_over: axes that matrices are cut over, of each dimension that is.
        pieces_bytes: bytes of its pieces, padded, which each exchange moves.
    """

    number: int
    inputs: int
    outputs: int
    exchanged_over: tuple[tuple[str, ...], ...]
    pieces_bytes: int

    def flops(self, steps: int) -> int:
        """Operations of so many iterations.

        With m ≤ n each has X Xᵀ, its square, and one product more: 4·m²·n + 2·m³.
        """
        m, n = sorted((self.inputs, self.outputs))
        return self.number * steps * (4 * m * m * n + 2 * m**3)


def shares(
    settings: Settings, fastest_first: Sequence[str] = FASTEST_FIRST
) -> list[Share]:
    """Lists what a chip does for each array; nothing for another optimizer.

    Args:
        settings: configuration of the run.
        fastest_first: the mesh axes by bandwidth, as in `local.weights`.
    """
    if settings.optimizer.name != "muon":
        return []
    sizes = {axis: getattr(settings.mesh, axis) for axis in AXES}
    table = rules.table(settings.partition, fastest_first)
    specs = trained_of(inventory.specs(settings.layers), settings.optimizer)
    found = []
    for spec in filter(is_made_orthogonal, jax.tree.leaves(specs)):
        inputs, outputs = (_size(spec, dims) for dims in (spec.inputs, spec.outputs))
        axes = [
            tuple(axis for axis in over if sizes[axis] > 1)
            for _, over in cuts(spec, table)
        ]
        devices = math.prod(sizes[axis] for over in axes for axis in over)
        held = math.prod(
            -(-spec.shape[dim] // math.prod(sizes[a] for a in table[axis]))
            for dim in spec.stacked
            for axis in [spec.axes[dim] or "pair"]  # whole, as None is
        )
        number = -(-held // devices)
        found.append(
            Share(
                *(number, inputs, outputs),
                exchanged_over=tuple(over for over in axes if over),
                pieces_bytes=number * inputs * outputs * FLOAT32,
            )
        )
    return found


def _size(spec: Spec, dims: tuple[int, ...]) -> int:
    return math.prod(spec.shape[dim] for dim in dims)
