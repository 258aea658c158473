"""What products on GPU cost and compile to, shown without one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from moe.model.feed_forward import grouped_gpu
from moe.model.feed_forward.grouped import grouped_feed_forward
from moe.model.feed_forward.grouped_gpu import Division
from moe.testing.jaxprs import equations

X, Y = 64, 96
# Rows of a device, and its experts' rows.
LOADS = {
    "even": (4096, [512] * 8),
    "uneven": (4096, [513, 512, 700, 311, 0, 1024, 36, 1000]),
    "all rows to one": (4096, [0, 0, 4096, 0, 0, 0, 0, 0]),
    "one more than the rectangle": (4096, [513] * 7 + [505]),
    "one more, and room": (4100, [513] * 7 + [0]),
    "no rows": (4096, [0] * 8),
    "one expert": (1000, [1000]),
    "fewer rows than experts": (5, [0, 2, 0, 0, 0, 1, 0, 2]),
    "as many as experts": (8, [0, 8, 0, 0, 0, 0, 0, 0]),
}


def products(method):
    """Forward, gradient of the rows, gradient of the matrices and of the biases."""

    def loss(matrix_eXY, bias_eY, rows_RX, size_e):
        y_RY = grouped_gpu.product(rows_RX, matrix_eXY, size_e, method)
        return jnp.sum(grouped_gpu.add_bias(y_RY, bias_eY, size_e) ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def shapes_of(R, e, dtype="float32", dims=(X, Y)):
    shape = jax.ShapeDtypeStruct
    return (
        shape((e, *dims), jnp.float32),
        shape((e, dims[1]), jnp.float32),
        shape((R, dims[0]), dtype),
        shape((e,), jnp.int32),
    )


def flops(equation):
    """Operations of a product in a jaxpr; 0 for anything else."""
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    outputs = math.prod(equation.outvars[0].aval.shape)
    return 2 * outputs * math.prod(left[i] for i in contracted)


@pytest.mark.fast
@pytest.mark.parametrize("load", LOADS)
def test_the_batched_product_multiplies_at_most_twice_the_rows(load):
    R, sizes = LOADS[load]
    cut = Division.of(R, jnp.array(sizes))
    rounds = int(cut.each_block(lambda block, n: n + 1, jnp.int32(0)))
    rows = len(sizes) * cut.height + rounds * cut.block_rows
    assert sum(sizes) <= rows <= 2 * R
    # Forward and two gradients, and a column of ones for the biases' gradient.
    traced = jax.make_jaxpr(products("batched"))(*shapes_of(R, len(sizes)))
    loops = [one for one in equations(traced) if one.primitive.name == "while"]
    once = sum(
        flops(one) for loop in loops for one in equations(loop.params["body_jaxpr"])
    )
    total = sum(map(flops, equations(traced))) + (rounds - 1) * once
    assert total == rows * (3 * 2 * X * Y + 2 * Y)


@pytest.mark.fast
def test_blocks_cover_the_rows_beyond_the_rectangle_once(monkeypatch):
    monkeypatch.setattr(grouped_gpu, "BLOCK_ROWS", 3)
    R, E = 50, 6

    @jax.jit
    def times_seen(size_E):
        def count(block, seen_RE):
            row_b = block.start + jnp.arange(len(block.own_b1))
            own_bE = block.own_b1 & (jnp.arange(E) == block.expert)
            return seen_RE.at[row_b].add(own_bE)

        return Division.of(R, size_E).each_block(count, jnp.zeros((R, E), int))

    rng = np.random.default_rng(0)
    for _ in range(50):
        size_E = rng.multinomial(rng.integers(0, R + 1), rng.dirichlet(np.full(E, 0.3)))
        wanted_RE, row = np.zeros((R, E), int), 0
        for e, size in enumerate(size_E):
            wanted_RE[row + R // E : row + size, e] = 1
            row += size
        np.testing.assert_array_equal(times_seen(size_E), wanted_RE)


@pytest.mark.fast
@pytest.mark.parametrize("method", ["batched", "hopper_interpreted"])
def test_no_row_is_scattered(method):
    traced = jax.make_jaxpr(products(method))(*shapes_of(64, 4))
    names = {one.primitive.name for one in equations(traced)}
    assert "gather" in names
    assert not [name for name in names if "scatter" in name]


@pytest.mark.fast
def test_the_batched_product_holds_no_more_than_all_weights_or_all_rows():
    R, e = 4096, 8
    traced = jax.make_jaxpr(products("batched"))(*shapes_of(R, e))
    outputs = [v.aval for one in equations(traced) for v in one.outvars]
    floats = [a.size for a in outputs if jnp.issubdtype(a.dtype, jnp.floating)]
    assert max(floats) == max(R * max(X, Y), e * X * Y)


def test_fewer_rows_than_experts_and_room_to_spare():
    rng = np.random.default_rng(0)
    R, size_e = 5, jnp.array([0, 2, 0, 0, 0, 1, 0])
    matrix_eXY, rows_RX = rng.normal(size=(7, 4, 3)), rng.normal(size=(R, 4))
    rows_RX[3:] = 0
    weight_RY = rng.normal(size=(R, 3))
    weight_RY[3:] = 0

    def loss(matrix_eXY, rows_RX):
        y_RY = grouped_gpu.product(rows_RX, matrix_eXY, size_e, "batched")
        return jnp.sum(y_RY * weight_RY), y_RY

    gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, y_RY), (d_matrix, d_rows) = gradients(
        matrix_eXY.astype(np.float32), rows_RX.astype(np.float32)
    )
    d_wanted = np.zeros(matrix_eXY.shape)
    for row, e in enumerate([1, 1, 5]):
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        near(y_RY[row], rows_RX[row] @ matrix_eXY[e])
        near(d_rows[row], weight_RY[row] @ matrix_eXY[e].T)
        d_wanted[e] += np.outer(rows_RX[row], weight_RY[row])
    near(d_matrix, d_wanted)


@pytest.mark.parametrize(
    ("method", "dtype"), [("hopper", "bfloat16"), ("batched", "float32")]
)
def test_the_layer_and_its_gradients_lower_for_cuda(method, dtype):
    R, e, M, F = 200, 3, 128, 256

    def loss(w, rows_RM, size_e):
        y_RM = grouped_feed_forward(w, rows_RM, size_e, "swiglu", method=method)
        return jnp.sum(y_RM.astype(jnp.float32))

    shape = jax.ShapeDtypeStruct
    w = {
        "up": shape((e, M, 2, F), jnp.float32),
        "up_bias": shape((e, 2, F), jnp.float32),
        "down": shape((e, F, M), jnp.float32),
    }
    program = jax.export.export(
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )(w, shape((R, M), dtype), shape((e,), jnp.int32))
    text = program.mlir_module()
    assert [one.dtype for one in program.out_avals] == [jnp.float32] * 4 + [dtype]
    kernels = re.findall(r"custom_call @(mosaic\w*)", text)
    # Up and down, forward and for the gradient of the rows.
    assert len(kernels) == (4 if method == "hopper" else 0)
    assert "chlo.ragged_dot" not in text


# jax 0.10 cannot interpret a transposed operand.
TRANSPOSED = [False] + [True] * hasattr(mosaic_gpu, "force_gpu_interpret_mode")


@pytest.mark.slow
@pytest.mark.parametrize("transposed", TRANSPOSED)
def test_the_kernel_multiplies_groups_of_any_size(transposed):
    from jax._src.pallas.mosaic_gpu.interpret.params import force_gpu_interpret_mode

    rng = np.random.default_rng(0)
    R, size_e = 150, np.array([0, 37, 0, 91, 0], np.int32)  # 128 of 150 are written
    rows_RX = jnp.asarray(rng.normal(size=(R, 128)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(5, 128, 128)), jnp.bfloat16)
    with force_gpu_interpret_mode():
        y_RY = grouped_gpu.hopper(rows_RX, matrix, size_e, transposed=transposed)
    assert y_RY.shape == (R, 128)
    assert y_RY.dtype == jnp.bfloat16
    row = 0
    for e, size in enumerate(size_e):
        for _ in range(size):
            own_XY = np.float64(matrix[e])
            wanted_Y = np.float64(rows_RX[row]) @ (own_XY.T if transposed else own_XY)
            # 8 bits: half a unit in the last place of values up to about 50.
            np.testing.assert_allclose(np.float64(y_RY[row]), wanted_Y, 2**-8, 0.02)
            row += 1
