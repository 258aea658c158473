"""Muon: the update of a matrix is its momentum, made nearly orthogonal.

Moonlight's (arXiv:2502.16982, section 2), which Kimi K2 has too, after Jordan's. Every
matrix stands alone: of each layer, each expert, and each half of a gated pair. Heads
are one dimension with what is in them, so that a projection of attention is [M, N·D].
Optax's own folds layers and experts into one dimension, which a mesh could not cut.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from moe.model.parameters import Spec
from moe.settings import OptimizerSettings
from partitioning import rules
from partitioning.grid import Grid

# Axes of tables, output projections and routers, which Adam moves, as it does all that
# is no matrix.
OF_ADAM = frozenset(("vocab", "routed"))
# The polynomial of an iteration raises small singular values fast, and leaves all of
# them between about 0.7 and 1.2 (Jordan's; arXiv:2502.16982, eq. 3).
COEFFICIENTS = 3.4445, -4.7750, 2.0315
_BATCH_ELEMENTS = 2**22  # numbers of small matrices that are iterated at once
_LEAST_NORM = 1e-8


class MuonState(NamedTuple):
    """A running mean of the gradients of the matrices that are made orthogonal."""

    momentum: optax.Updates


def is_made_orthogonal(spec: Spec) -> bool:
    """Whether Muon moves a parameter, and not Adam.

    A matrix of one column or row is a vector: there is nothing to make orthogonal.
    """
    least = min(
        math.prod(spec.shape[dim] for dim in dims)
        for dims in (spec.inputs, spec.outputs)
    )
    return spec.is_matrix and least > 1 and OF_ADAM.isdisjoint(spec.axes)


def scale_by_muon(
    settings: OptimizerSettings, specs: Any, grid: Grid | None = None
) -> optax.GradientTransformation:
    """Returns Muon's directions of matrices, and Adam's of everything else.

    Args:
        settings: decays, iterations, and the size of an update.
        specs: what the parameters are.
        grid: the mesh that momentum is cut over; None where nothing is cut, or where
            the compiler may decide.
    """
    muons = jax.tree.map(is_made_orthogonal, specs)
    mine = jax.tree.map(
        lambda spec, ours: spec if ours else optax.MaskedNode(), specs, muons
    )
    beta = settings.muon_beta

    def init(params: optax.Params) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: MuonState, params: Any = None
    ) -> tuple[optax.Updates, MuonState]:
        del params
        momentum = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g, state.momentum, updates
        )
        # Nesterov's: the momentum as the next step will see it.
        ahead = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, momentum, updates)
        directions = jax.tree.map(
            lambda x, spec: _direction(x, spec, settings, grid), ahead, mine
        )
        return directions, MuonState(momentum)

    return optax.partition(
        {
            "muon": optax.GradientTransformation(init, update),
            "adam": optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        },
        jax.tree.map(lambda ours: "muon" if ours else "adam", muons),
    )


def factor(inputs: int, outputs: int, rms: float) -> float:
    """Returns what a matrix that was made orthogonal is multiplied by.

    Such an m × n matrix has a root mean square of 1/√max(m, n) (arXiv:2502.16982,
    lemma 1). Undone, all matrices have updates of one size, Adam's is 0.2 to 0.4 of the
    learning rate (section 2.2). With `rms` 0 it is Jordan's √max(1, outputs/inputs).
    """
    if rms:
        return rms * math.sqrt(max(inputs, outputs))
    return math.sqrt(max(1.0, outputs / inputs))


def newton_schulz(x_IO: jax.Array, steps: int) -> jax.Array:
    """Brings the singular values of a matrix near 1 (arXiv:2502.16982, eq. 2)."""
    a, b, c = COEFFICIENTS
    tall = x_IO.shape[0] > x_IO.shape[1]
    x = x_IO.T if tall else x_IO
    x = x / (jnp.linalg.norm(x) + _LEAST_NORM)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def cuts(spec: Spec, table: rules.Rules) -> list[tuple[int, tuple[str, ...]]]:
    """Lists the dimensions of a matrix that its momentum is cut along, and over what.

    Dimensions are counted among those of one matrix, inputs first.
    """
    found = []
    for place, dim in enumerate(spec.inputs + spec.outputs):
        axis = spec.axes[dim]
        if axis is not None and table[rules.MOMENTS.get(axis, axis)]:
            found.append((place, tuple(table[rules.MOMENTS.get(axis, axis)])))
    return found


def _direction(
    x: jax.Array, spec: Spec, settings: OptimizerSettings, grid: Grid | None
) -> jax.Array:
    """Makes each matrix of an array orthogonal, on the devices that hold a piece of it.

    These exchange pieces for whole matrices, a share of them each, and exchange them
    back: nothing is computed twice, but by devices that hold the same.
    """
    inputs = math.prod(spec.shape[dim] for dim in spec.inputs)
    outputs = math.prod(spec.shape[dim] for dim in spec.outputs)
    scale = factor(inputs, outputs, settings.muon_rms)

    def one(matrix_IO: jax.Array) -> jax.Array:
        return scale * newton_schulz(matrix_IO, settings.muon_steps)

    def on_device(piece: jax.Array) -> jax.Array:
        order = spec.stacked + spec.inputs + spec.outputs
        piece = jnp.transpose(piece, order)
        leading = piece.shape[: len(spec.stacked)]
        number = math.prod(leading)
        cut = [] if grid is None else _larger(cuts(spec, grid.table), grid)
        shares = math.prod(grid.size(*axes) for _, axes in cut) if grid else 1
        mine = -(-number // shares)
        x = piece.reshape(number, *piece.shape[len(spec.stacked) :])
        x = _padded(x, mine * shares)
        for place, axes in cut:
            x = lax.all_to_all(x, axes, 0, place + 1, tiled=True)
        y = _each(one, x.reshape(mine, inputs, outputs)).reshape(x.shape)
        for place, axes in reversed(cut):
            y = lax.all_to_all(y, axes, place + 1, 0, tiled=True)
        y = y[:number].reshape(piece.shape)
        return jnp.transpose(y, sorted(range(len(order)), key=order.__getitem__))

    if grid is None:
        return on_device(x)
    where = rules.spec([rules.MOMENTS.get(a or "", a) for a in spec.axes], grid.table)
    return grid.run(on_device, in_specs=(where,), out_specs=where)(x)


def _larger(
    found: Sequence[tuple[int, tuple[str, ...]]], grid: Grid
) -> list[tuple[int, tuple[str, ...]]]:
    """Leaves out the axes of one device."""
    large = [(n, tuple(a for a in axes if grid.size(a) > 1)) for n, axes in found]
    return [(place, axes) for place, axes in large if axes]


def _each(function: Any, x_nIO: jax.Array) -> jax.Array:
    """Applies a function to every matrix, to few at a time: it needs memory."""
    number, *size = x_nIO.shape
    most = max(_BATCH_ELEMENTS // math.prod(size), 1)
    batches = -(-number // most)
    if batches == 1:
        return jax.vmap(function)(x_nIO)
    batch = -(-number // batches)
    x = _padded(x_nIO, batches * batch).reshape(batches, batch, *size)
    return lax.map(jax.vmap(function), x).reshape(-1, *size)[:number]


def _padded(x: jax.Array, number: int) -> jax.Array:
    """Adds matrices of zeros, which stay so."""
    missing = number - x.shape[0]
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
