"""Attention whole, in blocks and round a ring, compared with loops over queries."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moe.model.attention_scores import (
    Bias,
    Seen,
    attend_blocked,
    attend_ring,
    attend_whole,
)

B, L, N, U, D, DEVICES = 2, 24, 4, 2, 4, 4
BUCKETS, MAX_DISTANCE = 6, 12
WAYS = ("whole", "blocked", "ring")
# Segments and lengths of prefixes of each segment, row by row.
ROWS = {
    "causal": [([24], [0]), ([24], [0])],
    "packed": [([9, 11], [0, 0]), ([1, 2, 21], [0, 0, 0])],
    "prefixes": [([20], [17]), ([7, 12], [7, 3])],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What goes into attention, and the gradient of what comes out."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    table: np.ndarray | None
    seen: Seen
    d_mixed: np.ndarray


def seen_of(rows) -> Seen:
    """Segments, then padding, which is of segment 0."""
    place, position, segment, prefix = np.zeros((4, B, L), np.int32)
    place[:] = np.arange(L)
    for b, (lengths, prefixes) in enumerate(rows):
        start = 0
        for number, (length, first) in enumerate(zip(lengths, prefixes, strict=True)):
            here = slice(start, start + length)
            segment[b, here] = number + 1
            position[b, here] = np.arange(length)
            prefix[b, start : start + first] = 1
            start += length
        position[b, start:] = np.arange(L - start)
    return Seen(place, position, segment, prefix)


def case_of(rows: str, shared: bool) -> Case:
    """With `shared`, heads share keys, there are prefixes, and there is a bias."""
    draw = np.random.default_rng(len(rows))

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    seen = seen_of(ROWS[rows])
    held = (B, L, U if shared else N, D)
    return Case(
        query=normal(B, L, N, D),
        key=normal(*held),
        value=normal(*held),
        table=normal(BUCKETS, N) if shared else None,
        seen=seen if shared else dataclasses.replace(seen, prefix_BL=None),
        d_mixed=normal(B, L, N, D),
    )


def bucket_of(distance: int) -> int:
    """Of 6 buckets to distance 12: 0, 1, 2, 3–4, 5–7, and beyond; 3·4^(1/3) is 4.8."""
    return sum(distance >= edge for edge in (1, 2, 3, 5, 8))


def sees(queries: Seen, keys: Seen, b: int, i: int, j: int) -> bool:
    before = queries.place_BL[b, i] >= keys.place_BL[b, j]
    if queries.prefix_BL is not None:
        before |= bool(queries.prefix_BL[b, i] and keys.prefix_BL[b, j])
    return bool(before and queries.segment_BL[b, i] == keys.segment_BL[b, j])


def in_loops(query, key, value, table, queries: Seen, keys: Seen) -> np.ndarray:
    """Each query of each head looks at every key that it may see, in float64."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    shared_by = query.shape[2] // key.shape[2]
    mixed = np.zeros(query.shape)
    for b, i in np.ndindex(query.shape[:2]):
        seen = [j for j in range(key.shape[1]) if sees(queries, keys, b, i, j)]
        apart = [queries.position_BL[b, i] - keys.position_BL[b, j] for j in seen]
        for n in range(query.shape[2]):
            u = n // shared_by
            scores = [query[b, i, n] @ key[b, j, u] / math.sqrt(D) for j in seen]
            if table is not None:
                scores += table[[bucket_of(distance) for distance in apart], n]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            for weight, j in zip(weights, seen, strict=True):
                mixed[b, i, n] += weight * value[b, j, u]
    return mixed


def by(way: str, query, key, value, table, who: tuple[Seen, Seen]) -> jax.Array:
    bias = None if table is None else Bias(table, MAX_DISTANCE)
    if way == "whole":
        return attend_whole(query, key, value, *who, bias)
    if way == "blocked":  # 24 is not a multiple of 5
        return attend_blocked(query, key, value, *who, bias, block=5)
    ring = {"axis": "context", "axis_size": DEVICES}  # each has 6, in blocks of 4
    return attend_ring(query, key, value, *who, bias, **ring, block=4)


def on_devices(function, in_specs, out_specs):
    """Cuts dimension 1 over the ring."""
    mesh = jax.make_mesh(
        (DEVICES,), ("context",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


@functools.cache
def compiled(way: str):
    """Output and gradients of query, key, value and the table of the bias."""

    def run(query, key, value, table, who, d_mixed):
        mixed, transposed = jax.vjp(
            lambda *given: by(way, *given, who), query, key, value, table
        )
        *d_given, d_table = transposed(d_mixed)
        if way == "ring":
            d_table = jax.tree.map(lambda d: jax.lax.psum(d, "context"), d_table)
        return mixed, *d_given, d_table

    if way == "ring":
        cut, whole = PartitionSpec(None, "context"), PartitionSpec()
        run = on_devices(run, (cut, cut, cut, whole, cut, cut), (*[cut] * 4, whole))
    return jax.jit(run)


def run(way: str, case: Case, queries: Seen | None = None):
    """Of a case, or of one in which others ask."""
    who = queries or case.seen, case.seen
    given = case.query, case.key, case.value, case.table
    return jax.device_get(compiled(way)(*given, who, case.d_mixed))


@functools.cache
def found(way: str, rows: str, shared: bool):
    return run(way, case_of(rows, shared))


EVERYTHING = [
    pytest.param(rows, shared, id=f"{rows}, shared heads and bias" if shared else rows)
    for rows in ROWS
    for shared in (False, True)
    if shared or rows != "prefixes"
]


@pytest.mark.parametrize(("rows", "shared"), EVERYTHING)
def test_whole_attention_and_its_gradient_agree_with_loops(rows, shared):
    case = case_of(rows, shared)
    given = [case.query, case.key, case.value]
    given += [case.table] if shared else []

    def loops(*given):
        table = given[3] if shared else None
        return in_loops(*given[:3], table, case.seen, case.seen)

    mixed, *gradients = found("whole", rows, shared)
    np.testing.assert_allclose(mixed, loops(*given), atol=2e-6)
    # Along a direction in all inputs at once, by central differences in float64.
    draw = np.random.default_rng(1)
    along = [draw.normal(size=x.shape) * 1e-5 for x in given]
    up, down = (
        np.sum(
            case.d_mixed
            * loops(*(x + s * d for x, d in zip(given, along, strict=True)))
        )
        for s in (1, -1)
    )
    slope = sum(np.sum(g * d) for g, d in zip(gradients, along, strict=False))
    np.testing.assert_allclose(slope, (up - down) / 2, rtol=1e-4)


@pytest.mark.parametrize("way", ["blocked", "ring"])
@pytest.mark.parametrize(("rows", "shared"), EVERYTHING)
def test_blocks_and_ring_agree_with_whole_in_outputs_and_gradients(way, rows, shared):
    expected = found("whole", rows, shared)
    result = found(way, rows, shared)
    for name, ours, theirs in zip(
        ("mixed", "query", "key", "value", "table"), result, expected, strict=True
    ):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, atol=5e-6, err_msg=name)


def test_new_tokens_attend_to_a_cache_whose_unused_slots_are_of_segment_0():
    case = case_of("causal", True)
    keys = dataclasses.replace(case.seen, prefix_BL=None)
    keys.segment_BL[:, 9:] = 0
    keys.segment_BL[1, :2] = 0  # padding on the left
    queries = jax.tree.map(lambda x: x[:, 6:9], keys)
    bias = Bias(case.table, MAX_DISTANCE)
    query = case.query[:, 6:9]
    mixed = jax.jit(attend_whole)(query, case.key, case.value, queries, keys, bias)
    loops = in_loops(query, case.key, case.value, case.table, queries, keys)
    np.testing.assert_allclose(mixed, loops, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients(way):
    case = case_of("causal", True)
    segment = case.seen.segment_BL + (case.seen.place_BL < 9)  # of others than all keys
    queries = dataclasses.replace(case.seen, segment_BL=segment)
    mixed, *gradients = run(way, case, queries)
    assert (mixed[:, :9] == 0).all()
    assert (mixed[:, 9:] != 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:, :9] == 0).all()


def test_blocks_that_nothing_sees_are_not_computed():
    # A weight of 0 times NaN would be NaN.
    case = case_of("causal", False)
    case.value[:, 20:] = np.nan
    for way in WAYS:
        mixed, d_query, *_ = run(way, case)
        before = np.isfinite(mixed[:, :18]).all() and np.isfinite(d_query[:, :18]).all()
        assert before == (way != "whole"), way
        assert np.isnan(mixed[:, 20:]).all()


def test_bfloat16_differs_by_its_rounding():
    case = case_of("packed", True)
    names = ("query", "key", "value", "d_mixed")
    low = {name: jnp.asarray(getattr(case, name), jnp.bfloat16) for name in names}
    high = {name: np.asarray(x, np.float32) for name, x in low.items()}
    exact = run("whole", dataclasses.replace(case, **high))
    for way in ("whole", "blocked"):
        result = run(way, dataclasses.replace(case, **low))
        for ours, theirs in zip(result, exact, strict=True):
            scale = np.abs(theirs).max()  # a unit in the last place is 2^-8 of a value
            assert np.abs(ours.astype(np.float32) - theirs).max() < scale * 2.0**-7


# ------------------------------------------------------------- of the compiled program

LONG, BLOCK = 64, 8


@functools.cache
def program(way: str, backward: bool) -> str:
    """HLO for 64 tokens, one sequence and as many heads of keys as of queries."""
    held = jax.ShapeDtypeStruct((1, LONG, N, D), jnp.float32)
    who = jax.ShapeDtypeStruct((1, LONG), jnp.int32)

    def forward(query, key, value, seen):
        given = query, key, value, seen, seen
        if way == "whole":
            return attend_whole(*given)
        if way == "blocked":
            return attend_blocked(*given, block=BLOCK)
        return attend_ring(*given, axis="context", axis_size=DEVICES, block=BLOCK)

    def both(query, key, value, seen):
        mixed, transposed = jax.vjp(
            lambda *given: forward(*given, seen), query, key, value
        )
        return transposed(mixed)

    function = both if backward else forward
    if way == "ring":
        cut = PartitionSpec(None, "context")
        function = on_devices(function, cut, cut)
    seen = Seen(who, who, who, who)
    return jax.jit(function).lower(held, held, held, seen).compile().as_text()


def largest(text: str) -> int:
    """Elements of the largest array in a program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|u32|pred|s8|s64)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("backward", [False, True])
def test_neither_blocks_nor_ring_hold_an_array_of_all_queries_by_all_keys(backward):
    # The least such array is the mask: 64 · 64 = 4,096. What is held is 64 · 4 · 4.
    assert largest(program("whole", backward)) == N * LONG * LONG
    assert largest(program("blocked", backward)) == LONG * N * D
    # On each of four devices: never the keys of all.
    assert largest(program("ring", backward)) == LONG * N * D // DEVICES


def collectives(text: str) -> dict[str, int]:
    kinds = (
        "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|"
        "collective-broadcast"
    )
    names = re.findall(rf" ({kinds})(?:-start)?\(", text)
    return {name: names.count(name) for name in names}


def test_the_ring_only_passes_on_to_the_next():
    # Forward one loop passes on keys, values and who they are. Backward they are passed
    # on once before the loop and in it (6), with the gradients of keys and values (2),
    # which then go home (2).
    assert collectives(program("ring", False)) == {"collective-permute": 3}
    assert collectives(program("ring", True)) == {"collective-permute": 3 + 10}
    assert collectives(program("blocked", True)) == {}
    pairs = re.findall(r"source_target_pairs=({{.*?}})", program("ring", True))
    assert pairs == ["{{0,1},{1,2},{2,3},{3,0}}"] * 13
    assert " scatter(" not in program("ring", True)


def test_scanned_layers_that_see_alike_hold_no_mask_of_all_blocks():
    place_BL = jnp.broadcast_to(jnp.arange(LONG, dtype=jnp.int32), (1, LONG))
    all_alike = Seen(place_BL, place_BL, jnp.ones_like(place_BL))

    def layer(x_BLND, scale):
        y_BLND = attend_blocked(
            x_BLND * scale, x_BLND, x_BLND, all_alike, all_alike, block=BLOCK
        )
        return x_BLND + y_BLND, None

    def loss(scales, x_BLND):
        return jnp.sum(jax.lax.scan(layer, x_BLND, scales)[0] ** 2)

    shape = jnp.zeros((1, LONG, N, D))
    text = jax.jit(jax.grad(loss)).lower(jnp.ones(3), shape).compile().as_text()
    assert largest(text) < LONG * LONG
