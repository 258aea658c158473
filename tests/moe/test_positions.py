"""Rotary angles and T5's relative positions, compared with tables and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model.attention.positions import (
    bias_of,
    bucket_of,
    rates,
    rotate,
    slopes,
    table_spec,
)
from moe.model.parameters import draw
from moe.settings import PositionSettings

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
    settings = PositionSettings("distance", buckets=32, max_distance=128)
    bucket = bucket_of(np.arange(-3, 300), settings)
    for distance in range(-3, 300):
        expected = sum(edge <= distance for edge in EDGES) - 1
        assert bucket[distance + 3] == max(expected, 0), distance


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 16), (7, 20), (64, 1024), (2, 3)]
)
def test_buckets_agree_with_a_loop(num_buckets, max_distance):
    distances = range(-2, 2 * max_distance)
    settings = PositionSettings(
        "distance", buckets=num_buckets, max_distance=max_distance
    )
    bucket = bucket_of(np.array(distances), settings)
    expected = [bucket_in_words(d, num_buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(bucket, expected)
    assert set(expected) == set(range(num_buckets))


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (6, 9)])
def test_two_sided_buckets_are_half_for_each_side(num_buckets, max_distance):
    distances = range(-2 * max_distance, 2 * max_distance)
    settings = PositionSettings("distance", "", num_buckets, max_distance, True)
    half = num_buckets // 2
    for distance in distances:
        expected = bucket_in_words(abs(distance), half, max_distance)
        expected += half if distance < 0 else 0  # a key that follows its query
        assert bucket_of(np.array(distance), settings) == expected
    # As T5X numbers them: its distances are the key's place less the query's.
    assert bucket_of(np.array([1, 0, -1]), settings).tolist() == [1, 0, half + 1]


@pytest.mark.parametrize(
    ("first_query", "first_key", "L", "T"),
    [(0, 0, 7, 7), (6, 0, 3, 9), (2, 5, 4, 5), (9, 0, 1, 10), (0, 9, 1, 1)],
)
def test_bias_and_its_gradient_agree_with_loops_and_nothing_scatters(
    first_query, first_key, L, T
):
    draw = np.random.default_rng(0)
    N, settings = 3, PositionSettings("distance", buckets=8, max_distance=16)
    table = draw.normal(size=(8, N)).astype(np.float32)
    query_L, key_T = first_query + np.arange(L), first_key + np.arange(T)
    d_NLT = draw.normal(size=(N, L, T)).astype(np.float32)
    reach = max(first_query + L, first_key + T)  # no farther than it must

    def both(table, query_L, key_T, d_NLT):
        bias_NLT, transposed = jax.vjp(
            lambda table: bias_of(table, reach, settings).of(query_L, key_T), table
        )
        return bias_NLT, *transposed(d_NLT)

    bias_NLT, d_table = jax.jit(both)(table, query_L, key_T, d_NLT)
    expected = np.zeros((N, L, T))
    d_expected = np.zeros(table.shape)
    for n, i, j in np.ndindex(N, L, T):
        bucket = bucket_in_words(query_L[i] - key_T[j], 8, 16)
        expected[n, i, j] = table[bucket, n]
        d_expected[bucket, n] += d_NLT[n, i, j]
    np.testing.assert_allclose(bias_NLT, expected, rtol=1e-6)
    np.testing.assert_allclose(d_table, d_expected, rtol=1e-5, atol=1e-5)
    jaxpr = str(jax.make_jaxpr(both)(table, query_L, key_T, d_NLT))
    assert "scatter" not in jaxpr
    assert " gather" not in jaxpr


def test_the_table_is_drawn_with_variance_1_over_the_mean_of_buckets_and_heads():
    spec = table_spec(PositionSettings("distance"), 512, 1.0)
    table = draw({"table": spec}, jax.random.key(0), "float32")["table"]
    assert table.shape == (32, 512)
    # 16,384 draws: four standard errors are 2.2 %.
    mean = (32 + 512) / 2
    np.testing.assert_allclose(jnp.std(table), mean**-0.5, rtol=0.022)
    assert spec.axes == (None, "heads")


def test_slopes_of_alibi_as_its_paper_has_them():
    # Section 3: for 8 heads 1/2, 1/4, ..., 1/256; for 16 those of 2^-0.5, 2^-1, ...
    np.testing.assert_allclose(slopes(8), 0.5 ** np.arange(1, 9))
    np.testing.assert_allclose(slopes(16), 0.5 ** (np.arange(1, 17) / 2), rtol=1e-6)
    # 12 heads: of 8, then the first, third, fifth and seventh of 16.
    between = 0.5 ** np.array([0.5, 1.5, 2.5, 3.5])
    np.testing.assert_allclose(slopes(12), [*slopes(8), *between], rtol=1e-6)
    assert slopes(1) == [1 / 256]


def rate_in_words(d: int, D: int, p: PositionSettings) -> float:
    """Angle per position of one pair, as the papers state it."""
    rate = p.rotary_base ** (-2 * d / D)
    if p.scaling == "none":
        return rate
    if p.scaling == "linear":
        return rate / p.factor
    if p.scaling == "by_parts":
        turns = p.original_length * rate / (2 * math.pi)
        if turns >= p.fast_turns:
            return rate
        if turns <= p.slow_turns:
            return rate / p.factor
        kept = (turns - p.slow_turns) / (p.fast_turns - p.slow_turns)
        return kept * rate + (1 - kept) * rate / p.factor

    def pair_that_turns(times: float) -> float:  # solve base^(-2d/D) L / 2π = times
        solved = math.log(p.original_length / (times * 2 * math.pi))
        return D * solved / (2 * math.log(p.rotary_base))

    first, last = pair_that_turns(p.fast_turns), pair_that_turns(p.slow_turns)
    if p.truncate:
        first, last = math.floor(first), math.ceil(last)
    scaled = min(max((d - first) / (last - first), 0), 1)
    return (1 - scaled) * rate + scaled * rate / p.factor


PARTS = {"factor": 4.0, "original_length": 128, "fast_turns": 8.0}
ROTARY = {
    "plain": {},
    "a half": {"fraction": 0.5},
    "neighbours": {"pairs": "neighbours"},
    "neighbours of a quarter": {"pairs": "neighbours", "fraction": 0.25},
    "linear": {"scaling": "linear", "factor": 3.0},
    "by parts": {"scaling": "by_parts", **PARTS},
    "yarn": {"scaling": "yarn", **PARTS},
    "yarn, not truncated": {"scaling": "yarn", **PARTS, "truncate": False}
    | {"attention_factor": 1.25, "fraction": 0.5},
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotation_agrees_with_complex_numbers_and_sees_only_differences(name):
    draw = np.random.default_rng(0)
    B, L, N, width, base = 2, 6, 3, 16, 100.0
    positions = PositionSettings("rotary", rotary_base=base, **ROTARY[name])
    D = int(width * positions.fraction)
    x_BLND = draw.normal(size=(B, L, N, width)).astype(np.float32)
    position_BL = draw.integers(0, 50, (B, L))
    turned_BLND = np.asarray(rotate(x_BLND, position_BL, positions))
    factor = 1.0
    if positions.scaling == "yarn":
        factor = positions.attention_factor or 0.1 * math.log(4) + 1
    for b, i, n, d in np.ndindex(B, L, N, D // 2):
        left, right = d, d + D // 2
        if positions.pairs == "neighbours":
            left, right = 2 * d, 2 * d + 1
        whole = complex(x_BLND[b, i, n, left], x_BLND[b, i, n, right])
        angle = position_BL[b, i] * rate_in_words(d, D, positions)
        whole *= factor * complex(math.cos(angle), math.sin(angle))
        found = complex(turned_BLND[b, i, n, left], turned_BLND[b, i, n, right])
        assert abs(found - whole) < 2e-5, (d, found, whole)
    np.testing.assert_array_equal(turned_BLND[..., D:], x_BLND[..., D:])
    later_BLND = np.asarray(rotate(x_BLND, position_BL + 11, positions))
    product, later = (
        np.einsum("BLND,BTND->BNLT", x, x) for x in (turned_BLND, later_BLND)
    )
    np.testing.assert_allclose(product, later, atol=1e-4)


def test_yarn_of_a_published_model_as_worked_out_by_hand():
    """64 numbers, base 150,000, 32 times 4,096 tokens, not truncated (gpt-oss).

    Pairs that turn 32 times and once: 32 ln(4096 / 64π) / ln 150000 = 32 · 3.01419 /
    11.91839 = 8.0930, and 32 · 6.47993 / 11.91839 = 17.3981. Pair 8 is below both, 18
    above; of pair 12 (12 - 8.0930) / 9.3051 = 0.41988 is scaled, so that what is left
    is 1 - 0.41988 · 31/32 = 0.59324. The factor is 1 + 0.1 ln 32 = 1.34657.
    """
    positions = PositionSettings(
        "rotary",
        rotary_base=150_000.0,
        scaling="yarn",
        factor=32.0,
        original_length=4096,
        truncate=False,
    )
    rate_d, factor = rates(64, positions)
    share_d = rate_d * 150_000.0 ** (np.arange(32) / 32)
    np.testing.assert_allclose(share_d[:9], 1, rtol=1e-5)
    np.testing.assert_allclose(share_d[12], 0.59324, rtol=1e-4)
    np.testing.assert_allclose(share_d[18:], 1 / 32, rtol=1e-5)
    assert abs(factor - 1.34657) < 1e-5
