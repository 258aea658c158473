"""XLA's CPU compiler against NumPy: what it is known to get wrong, and our own layers.

Without the flag of tests/conftest.py, or with another value of it, the first four come
out wrong, some or all. Each expression is compiled alone, forward and backward apart,
since beside others the compiler cuts it in other pieces.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.fast

# Of the largest value. Float32 rounds a sum of hundreds by 1e-6; bfloat16 rounds every
# value between two operations by 2e-3.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}
NEVER = -1e30


class Case(NamedTuple):
    """The same expression in jax and, of float64, in NumPy."""

    ours: Callable[..., jax.Array]
    oracle: Callable[..., np.ndarray]
    shapes: tuple[tuple[int, ...], ...]


def attention(q_BLD, k_BTD, v_BTD):
    score_BLT = q_BLD @ k_BTD.swapaxes(1, 2) / 8
    score_BLT = jnp.where(np.tril(np.ones(score_BLT.shape)) > 0, score_BLT, NEVER)
    return jax.nn.softmax(score_BLT, -1) @ v_BTD


def attention_by_numpy(q_BLD, k_BTD, v_BTD):
    score_BLT = q_BLD @ k_BTD.swapaxes(1, 2) / 8
    score_BLT = np.where(np.tril(np.ones(score_BLT.shape)) > 0, score_BLT, NEVER)
    return softmax(score_BLT) @ v_BTD


def softmax(x):
    weight = np.exp(x - x.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def logsumexp(x):
    return np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


CASES = {
    "product summed with its operand": Case(
        lambda x: jnp.sum((x @ jnp.full_like(x, 0.5)) * x, -1),
        lambda x: np.sum((x @ np.full_like(x, 0.5)) * x, -1),
        ((5, 60, 60),),
    ),
    "product summed with its operand, small": Case(
        lambda x: jnp.sum((x @ jnp.full_like(x, 0.5)) * x, -1),
        lambda x: np.sum((x @ np.full_like(x, 0.5)) * x, -1),
        ((3, 17, 17),),
    ),
    "squares of products of rows": Case(
        jax.vmap(lambda x: jnp.sum((jnp.eye(3, dtype=x.dtype) @ x) ** 2)),
        lambda x: np.sum(x**2, -1),
        ((32_769, 3),),
    ),
    "gated rows, added up by a product with ones": Case(
        lambda x, g: jnp.sum((x * g[..., None]) @ jnp.ones((64, 64), x.dtype), -1),
        lambda x, g: 64 * np.sum(x * g[..., None], -1),
        ((4, 64, 64), (4, 64)),
    ),
    "normalised product": Case(
        lambda x, w: (x @ w) * jax.lax.rsqrt(jnp.mean((x @ w) ** 2, -1, keepdims=True)),
        lambda x, w: (x @ w) / np.sqrt(np.mean((x @ w) ** 2, -1, keepdims=True)),
        ((4, 64, 128), (128, 128)),
    ),
    "probabilities of a router, summed": Case(
        lambda x, w: jnp.mean(jax.nn.softmax(x @ w * 0.1, -1), 1),
        lambda x, w: np.mean(softmax(x @ w * 0.1), 1),
        ((2, 256, 64), (64, 8)),
    ),
    "z of a router": Case(
        lambda x, w: jnp.sum(jax.nn.logsumexp(x @ w * 0.1, -1) ** 2, 1),
        lambda x, w: np.sum(logsumexp(x @ w * 0.1) ** 2, 1),
        ((2, 256, 64), (64, 64)),
    ),
    "attention": Case(
        attention, attention_by_numpy, ((4, 64, 64), (4, 64, 64), (4, 64, 64))
    ),
    "products of experts, summed with their rows": Case(
        lambda x, up, down: jnp.sum((jax.nn.silu(x @ up * 0.1) @ down) * x, -1),
        lambda x, up, down: np.sum(
            ((x @ up * 0.1) * sigmoid(x @ up * 0.1) @ down) * x, -1
        ),
        ((8, 40, 64), (8, 64, 128), (8, 128, 64)),
    ),
    "cross-entropy": Case(
        lambda x, w: jax.nn.logsumexp(x @ w * 0.1, -1) - (x @ w * 0.1)[:, 7],
        lambda x, w: logsumexp(x @ w * 0.1) - (x @ w * 0.1)[:, 7],
        ((512, 64), (64, 259)),
    ),
    "norm of a gradient": Case(
        lambda x, y: jnp.sum(x**2) + jnp.sum((x @ y) ** 2),
        lambda x, y: np.sum(x**2) + np.sum((x @ y) ** 2),
        ((128, 256), (256, 64)),
    ),
}


def draw(case: Case, dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arguments, and the same in float64."""
    rng = np.random.default_rng(0)
    arguments = [rng.normal(size=s).astype(jnp.dtype(dtype)) for s in case.shapes]
    return arguments, [np.asarray(x, np.float64) for x in arguments]


def assert_close(actual, expected, dtype: str) -> None:
    difference = np.max(np.abs(np.asarray(actual, np.float64) - expected))
    assert difference <= TOLERANCES[dtype] * np.max(np.abs(expected))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_an_expression_is_what_numpy_computes(name, dtype):
    case = CASES[name]
    arguments, exact = draw(case, dtype)
    assert_close(jax.jit(case.ours)(*arguments), case.oracle(*exact), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_its_gradient_is_what_differences_of_numpy_are(name, dtype):
    case = CASES[name]
    arguments, exact = draw(case, dtype)
    rng = np.random.default_rng(1)
    shape = jax.eval_shape(case.ours, *arguments).shape
    # Weights of the outputs; what bfloat16 holds is exact in float64.
    d_y = np.asarray(rng.normal(size=shape), jnp.dtype("bfloat16"))

    def objective(*x):
        return jnp.sum(case.ours(*x) * d_y.astype(dtype))

    gradients = jax.jit(jax.grad(objective, argnums=tuple(range(len(exact)))))(
        *arguments
    )
    actual, expected = [], []
    for _ in range(4):
        steps = [rng.normal(size=x.shape) for x in exact]
        there, back = (
            np.sum(
                case.oracle(
                    *(x + h * step for x, step in zip(exact, steps, strict=True))
                )
                * d_y.astype(np.float64)
            )
            for h in (1e-6, -1e-6)
        )
        expected.append((there - back) / 2e-6)
        actual.append(
            sum(
                np.sum(np.asarray(g, np.float64) * step)
                for g, step in zip(gradients, steps, strict=True)
            )
        )
    assert_close(actual, np.array(expected), dtype)
