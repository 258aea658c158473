"""Rotary angles and T5's relative positions, compared with tables and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.parameters import logical_axes
from moe.model.positions import RelativeBias, relative_bias, relative_bucket, rotate
from moe.settings import ModelSettings

pytestmark = pytest.mark.fast

# The least distance of each of T5's 32 buckets, 128 being the greatest distance: 0 to
# 16 by themselves, then ⌈16 · 8^(j/16)⌉, for 8^(1/16) = 1.13879.
EDGES = [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def bucket_in_words(distance: int, num_buckets: int, max_distance: int) -> int:
    """The formula as T5 states it, in double precision."""
    exact = num_buckets // 2
    if distance < exact:
        return max(distance, 0)
    share = math.log(distance / exact) / math.log(max_distance / exact)
    # 1e-12: a distance on an edge belongs to the bucket that begins there.
    return min(exact + int(share * (num_buckets - exact) + 1e-12), num_buckets - 1)


def test_buckets_of_t5_as_worked_out_by_hand():
    assert len(EDGES) == 32
    bucket = np.asarray(relative_bucket(jnp.arange(-3, 300), 32, 128))
    for distance in range(-3, 300):
        expected = sum(edge <= distance for edge in EDGES) - 1
        assert bucket[distance + 3] == max(expected, 0), distance


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 16), (7, 20), (64, 1024), (2, 3)]
)
def test_buckets_agree_with_a_loop(num_buckets, max_distance):
    distances = range(-2, 2 * max_distance)
    bucket = relative_bucket(jnp.array(distances), num_buckets, max_distance)
    expected = [bucket_in_words(d, num_buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(bucket, expected)
    assert set(expected) == set(range(num_buckets))


def test_bias_and_its_gradient_agree_with_loops_and_nothing_scatters():
    draw = np.random.default_rng(0)
    B, L, T, N = 2, 5, 7, 3
    table = draw.normal(size=(8, N)).astype(np.float32)
    query_BL, key_BT = draw.integers(0, 40, (B, L)), draw.integers(0, 40, (B, T))
    d_BNLT = draw.normal(size=(B, N, L, T)).astype(np.float32)

    def both(table, d_BNLT):
        bias_BNLT, transposed = jax.vjp(
            lambda table: relative_bias(table, query_BL, key_BT, 16), table
        )
        return bias_BNLT, *transposed(d_BNLT)

    bias_BNLT, d_table = jax.jit(both)(table, d_BNLT)
    expected = np.zeros((B, N, L, T))
    d_expected = np.zeros(table.shape)
    for b, n, i, j in np.ndindex(B, N, L, T):
        bucket = bucket_in_words(query_BL[b, i] - key_BT[b, j], 8, 16)
        expected[b, n, i, j] = table[bucket, n]
        d_expected[bucket, n] += d_BNLT[b, n, i, j]
    np.testing.assert_allclose(bias_BNLT, expected, rtol=1e-6)
    np.testing.assert_allclose(d_table, d_expected, rtol=1e-5, atol=1e-5)
    assert "scatter" not in str(jax.make_jaxpr(both)(table, d_BNLT))


def test_the_table_is_drawn_with_variance_1_over_the_mean_of_buckets_and_heads():
    settings = ModelSettings(
        vocab_size=8, num_layers=1, model_dim=8, num_heads=512, head_dim=2, mlp_dim=2
    )
    weights = RelativeBias(jax.random.key(0), settings)
    assert weights.table.shape == (32, 512)
    # 16,384 draws: four standard errors are 2.2 %.
    mean = (32 + 512) / 2
    np.testing.assert_allclose(jnp.std(weights.table[...]), mean**-0.5, rtol=0.022)
    assert logical_axes(weights) == {"table": (None, "heads")}


def test_rotation_agrees_with_complex_numbers_and_sees_only_differences():
    draw = np.random.default_rng(0)
    B, L, N, D, base = 2, 6, 3, 8, 100.0
    x_BLND = draw.normal(size=(B, L, N, D)).astype(np.float32)
    position_BL = draw.integers(0, 50, (B, L))
    turned_BLND = np.asarray(rotate(x_BLND, position_BL, base))
    for b, i, n, d in np.ndindex(B, L, N, D // 2):
        whole = complex(x_BLND[b, i, n, d], x_BLND[b, i, n, d + D // 2])
        angle = position_BL[b, i] * base ** (-2 * d / D)
        whole *= complex(math.cos(angle), math.sin(angle))
        found = complex(turned_BLND[b, i, n, d], turned_BLND[b, i, n, d + D // 2])
        assert abs(found - whole) < 1e-5
    later_BLND = np.asarray(rotate(x_BLND, position_BL + 11, base))
    product, later = (
        np.einsum("BLND,BTND->BNLT", x, x) for x in (turned_BLND, later_BLND)
    )
    np.testing.assert_allclose(product, later, atol=1e-4)
