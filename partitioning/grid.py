"""The mesh as code that runs on one of its devices sees it: collectives by axis.

For use inside `shard_map`. On axes of size 1 no collective is compiled, so the same
code runs on one device without any mesh.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from partitioning import rules
from partitioning.links import fastest_first
from partitioning.settings import AXES, UNCUT, PartitionSettings


@dataclasses.dataclass(frozen=True)
class Grid:
    """A mesh and how work is cut over it; static under `jit`.

    Attributes:
        mesh: all six axes.
        partition: what is cut beside the batch and the experts.
    """

    mesh: Mesh
    partition: PartitionSettings = UNCUT

    @property
    def table(self) -> rules.Rules:
        """From logical axes to mesh axes, as they lie on this mesh's devices."""
        return rules.table(self.partition, fastest_first(self.mesh))

    def size(self, *axes: str) -> int:
        """Returns the number of devices along the axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def index(self, *axes: str) -> jax.Array | int:
        """Returns this device's place along the axes, the last of them fastest."""
        place: jax.Array | int = 0
        for axis in self._large(axes):
            place = place * self.size(axis) + lax.axis_index(axis)
        return place

    def gather(self, x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
        """Joins the devices' pieces of a dimension.

        Axis by axis, the last first: over several at once, TPUs add up arrays that are
        zero but for a piece, which moves twice as much and is slower. The first axis
        of several, over which pieces are outermost, moves nearly all bytes.
        """
        for axis in reversed(self._large(axes)):
            x = lax.all_gather(x, axis, axis=dim, tiled=True)
        return x

    def scatter_sum(self, x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
        """Adds up over the devices, and leaves each its piece of a dimension.

        The dimension of pieces is explicit, and what is beside it is one dimension:
        TPUs would add up everything on every device for some shapes and layouts.
        """
        for axis in self._large(axes):
            n = self.size(axis)
            before, after = x.shape[:dim], x.shape[dim + 1 :]
            rows, columns = math.prod(before), math.prod(after)
            length = x.shape[dim] // n
            lead = () if rows == 1 else (rows,)
            trail = () if columns == 1 else (columns,)
            pieces = x.reshape(*lead, n, length, *trail)
            piece = lax.psum_scatter(pieces, axis, scatter_dimension=len(lead))
            x = piece.reshape(*before, length, *after)
        return x

    def sum(self, tree: Any, axes: Sequence[str]) -> Any:
        """Adds up over the devices."""
        large = self._large(axes)
        return lax.psum(tree, large) if large else tree

    def max(self, x: jax.Array, axes: Sequence[str] = AXES) -> jax.Array:
        """Takes the largest over the devices; without a gradient."""
        large = self._large(axes)
        return lax.pmax(lax.stop_gradient(x), large) if large else lax.stop_gradient(x)

    def piece(self, x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
        """Cuts out this device's piece of a dimension that each of them has whole."""
        if not self._large(axes):
            return x
        length = x.shape[dim] // self.size(*axes)
        return lax.dynamic_slice_in_dim(x, self.index(*axes) * length, length, dim)

    # Between products that are cut over `model`, activations are pieces of the
    # sequence, or the same on every device of that axis.

    @property
    def cuts_sequence(self) -> bool:
        """Whether activations between such products are pieces of the sequence."""
        return self.partition.sequence_parallel and self.size("model") > 1

    def enter(self, x_BLM: jax.Array) -> jax.Array:
        """Prepares activations for a product whose weights are cut over `model`."""
        return self.gather(x_BLM, ["model"], 1) if self.cuts_sequence else x_BLM

    def leave(self, y_BLM: jax.Array) -> jax.Array:
        """Adds up the shares of such a product's output."""
        if self.cuts_sequence:
            return self.scatter_sum(y_BLM, ["model"], 1)
        return self.sum(y_BLM, ["model"])

    def residual(self, x_BL: jax.Array) -> jax.Array:
        """Cuts what every device of `model` has as the residual stream is cut."""
        return self.piece(x_BL, ["model"], 1) if self.cuts_sequence else x_BL

    def run(
        self, function: Callable, in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Makes a function of one device's pieces one of whole arrays.

        Its transpose adds up the gradient of an argument over every axis that its spec
        does not name, once. So an expert's gradient is summed here over `replica`, and
        over `data` and `context` unless it is fully sharded: then where it was
        gathered. Over `expert` it is complete as it comes, since all rows came to the
        expert, and over `model` it is cut with the expert, or summed here.

        On one device there is nothing to cut: XLA would still copy gradients in its
        reductions.
        """
        if self.mesh.size == 1:
            return function
        # Kernels and loops of dynamic length have no types of varying axes. Without
        # them every transpose is exact, as long as outputs that are declared equal on
        # several devices are.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=jax.tree.map(
                self._naming_all, in_specs, is_leaf=lambda s: isinstance(s, P)
            ),
            out_specs=out_specs,
            check_vma=False,
        )

    def _naming_all(self, spec: P) -> P:
        """Names axes of size 1, which cut nothing; gradients are summed over others.

        Else the transpose of `shard_map` sums over axes of one device too.
        """
        if not len(spec):
            return spec
        cut = {axis for entry in spec for axis in _axes(entry)}
        idle = [axis for axis in AXES if self.size(axis) == 1 and axis not in cut]
        return P((*_axes(spec[0]), *idle), *spec[1:])

    def _large(self, axes: Sequence[str]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)


def _axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one dimension of a spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
