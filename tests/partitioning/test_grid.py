"""Collectives by axis: values, exact gradients, order, and none without need."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from partitioning.grid import Grid
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings, PartitionSettings

# Of sizes that differ, and one of size 1 between them.
MESH = MeshSettings(data=2, expert=1, model=4)
CUTS = [
    (("model",), 4),
    (("model", "data"), 8),  # another order than the mesh's
    (("data", "expert", "model"), 8),
]
N, M = 16, 3
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all")


@functools.cache
def grid_of(settings: MeshSettings = MESH, **partition) -> Grid:
    return Grid(make_mesh(settings), PartitionSettings(**partition))


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def on_devices(grid: Grid, cut: tuple[str, ...]):
    """What is tested, as functions of whole arrays: x[N, M], and one y[N, M] a rank."""
    one_each, pieces = P(cut), P(None, cut)

    def run(function, in_specs, out_specs):
        return grid.run(function, in_specs=in_specs, out_specs=out_specs)

    return {
        "gather": run(
            lambda x, w: w * grid.gather(x, cut, 1), (pieces, one_each), one_each
        ),
        "scatter_sum": run(
            lambda y, _: grid.scatter_sum(y, cut, 1), (one_each, P()), pieces
        ),
        "sum": run(
            lambda y, w: w * grid.sum({"y": y}, cut)["y"], (one_each,) * 2, one_each
        ),
        "piece": run(lambda x, w: grid.piece(x, cut, 1) * w, (P(), pieces), pieces),
        "max": run(lambda y, w: w * grid.max(y, cut), (one_each,) * 2, one_each),
    }


# The same by one device, of x[1, N, M] or y[R, N, M], and w.
ON_ONE = {
    "gather": lambda x, w: w * x,
    "scatter_sum": lambda y, _: jnp.sum(y, axis=0, keepdims=True),
    "sum": lambda y, w: w * jnp.sum(y, axis=0, keepdims=True),
    "piece": lambda x, w: x * w,
    "max": lambda y, w: w * jax.lax.stop_gradient(jnp.max(y, axis=0, keepdims=True)),
}


def with_gradients(functions, ranks: int):
    """Results, and gradients of a weighted sum of them by both arguments."""
    x, y, w = drawn(1, N, M), drawn(ranks, N, M) + 1, drawn(ranks, N, M) + 2
    given = {
        "gather": (x, w),
        "scatter_sum": (y, w),
        "sum": (y, w),
        "piece": (x, w[:1]),
        "max": (y, w),
    }

    @jax.jit
    def run(given):
        found = {}
        for name, function in functions.items():
            result, backward = jax.vjp(function, *given[name])
            weight = jnp.cos(jnp.arange(result.size, dtype=jnp.float32))
            found[name] = result, backward(weight.reshape(result.shape))
        return found

    return jax.device_get(run(given))


@pytest.mark.parametrize(("cut", "ranks"), CUTS)
def test_collectives_and_their_gradients_are_those_of_whole_arrays(cut, ranks):
    grid = grid_of()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        with_gradients(on_devices(grid, cut), ranks),
        with_gradients(ON_ONE, ranks),
    )


@pytest.mark.fast
@pytest.mark.parametrize(("cut", "ranks"), CUTS)
def test_a_place_counts_the_last_axis_fastest_as_pieces_do(cut, ranks):
    grid = grid_of()
    place_R = grid.run(
        lambda: jnp.asarray(grid.index(*cut))[None], in_specs=(), out_specs=P(cut)
    )()
    np.testing.assert_array_equal(place_R, np.arange(ranks))
    assert grid.size(*cut) == ranks


@pytest.mark.fast
def test_nothing_is_compiled_on_axes_of_size_one():
    grid = grid_of(MeshSettings(data=8), fsdp="data")
    functions = on_devices(grid, ("context", "model"))
    text = (
        jax.jit(lambda x: [function(x, x) for function in functions.values()])
        .lower(drawn(1, N, M))
        .compile()
        .as_text()
    )
    assert not re.search("|".join(COLLECTIVES), text)
    assert grid.index("context", "model") == 0
    assert grid.max(drawn(2), ["model"]).shape == (2,)


@pytest.mark.fast
def test_one_device_runs_the_function_itself():
    def function(x):
        return x

    assert grid_of(MeshSettings()).run(function, P(), P()) is function


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_two_products_cut_over_model_equal_two_whole_ones(sequence_parallel):
    B, L, F = 2, 8, 12
    grid = grid_of(sequence_parallel=sequence_parallel)
    x_BLM, up_MF, down_FM = drawn(B, L, M), drawn(M, F), drawn(F, M, 1)[..., 0]

    def on_device(x_BLM, up_MF, down_FM):
        hidden_BLF = jnp.sin(grid.enter(x_BLM) @ up_MF)
        return x_BLM + grid.leave(hidden_BLF @ down_FM)

    stream = P("data", "model" if sequence_parallel else None)
    on_grid = grid.run(
        on_device,
        in_specs=(stream, P(None, "model"), P("model")),
        out_specs=stream,
    )

    def whole(x_BLM, up_MF, down_FM):
        return x_BLM + jnp.sin(x_BLM @ up_MF) @ down_FM

    def with_gradients(function):
        def objective(*arguments):
            y_BLM = function(*arguments)
            return jnp.sum(jnp.cos(y_BLM)), y_BLM

        run = jax.jit(jax.grad(objective, argnums=(0, 1, 2), has_aux=True))
        return jax.device_get(run(x_BLM, up_MF, down_FM))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        with_gradients(on_grid),
        with_gradients(whole),
    )
    assert grid.cuts_sequence == sequence_parallel


@pytest.mark.fast
def test_the_residual_stream_is_cut_only_where_the_sequence_is():
    x_BL = drawn(2, 8)

    def shape_of(grid: Grid) -> tuple[int, ...]:
        whole = grid.run(lambda: grid.residual(jnp.asarray(x_BL)), (), P(None, "model"))
        return jax.eval_shape(whole).shape

    # Side by side over 4 devices: pieces make one whole, copies make four.
    assert shape_of(grid_of()) == (2, 8)
    assert shape_of(grid_of(sequence_parallel=False)) == (2, 32)
    assert not grid_of(MeshSettings(data=8)).cuts_sequence
