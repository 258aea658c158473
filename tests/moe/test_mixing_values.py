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

from moe.model.attention import blocks, whole
from moe.model.attention.blocks import Ring
from moe.model.attention.mask import Who
from moe.model.attention.positions import bias_of
from moe.model.attention.scoring import Scoring
from moe.settings import PositionSettings

# X, the width of values, is another than D, that of queries and keys.
B, L, N, U, D, X, DEVICES = 2, 24, 4, 2, 4, 6, 4
POSITIONS = PositionSettings("distance", buckets=6, max_distance=12)
CAP, WINDOW = 2.0, 8
REACH = 40  # of rows, and what pads the last block
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
    sink: np.ndarray | None
    who: Who
    d_mixed: np.ndarray


def who_of(rows) -> Who:
    """Segments, then padding, which is of segment 0."""
    segment, prefix = np.zeros((2, B, L), np.int32)
    for b, (lengths, prefixes) in enumerate(rows):
        start = 0
        for number, (length, first) in enumerate(zip(lengths, prefixes, strict=True)):
            here = slice(start, start + length)
            segment[b, here] = number + 1
            prefix[b, start : start + first] = 1
            start += length
    return Who(np.arange(L, dtype=np.int32), segment, prefix)


def case_of(rows: str, shared: bool) -> Case:
    """With `shared` there are prefixes, a bias, sinks and a window, and keys shared."""
    draw = np.random.default_rng(len(rows))

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    who, heads = who_of(ROWS[rows]), U if shared else N
    return Case(
        query=normal(B, L, N, D),
        key=normal(B, L, heads, D),
        value=normal(B, L, heads, X),
        table=normal(POSITIONS.buckets, N) if shared else None,
        sink=normal(N) if shared else None,
        who=who if shared else dataclasses.replace(who, prefix_BL=None),
        d_mixed=normal(B, L, N, X),
    )


def bucket_of(distance: int) -> int:
    """One of 6 up to distance 12: 0, 1, 2, 3–4, 5–7, and beyond; 3·4^(1/3) is 4.8."""
    return sum(distance >= edge for edge in (1, 2, 3, 5, 8))


def sees(queries: Who, keys: Who, b: int, i: int, j: int, window: int) -> bool:
    if window and not -window < queries.place_L[i] - keys.place_L[j] < window:
        return False
    before = queries.place_L[i] >= keys.place_L[j]
    if queries.prefix_BL is not None:
        before |= bool(queries.prefix_BL[b, i] and keys.prefix_BL[b, j])
    return bool(before and queries.segment_BL[b, i] == keys.segment_BL[b, j])


def in_loops(query, key, value, table, sink, queries: Who, keys: Who) -> np.ndarray:
    """Each query of each head looks at every key that it may see, in float64.

    With a table, which has sinks beside it, scores are capped and there is a window.
    """
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    shared_by = query.shape[2] // key.shape[2]
    mixed = np.zeros((*query.shape[:3], value.shape[3]))
    for b, i in np.ndindex(query.shape[:2]):
        window = 0 if table is None else WINDOW
        seen = [j for j in range(key.shape[1]) if sees(queries, keys, b, i, j, window)]
        apart = [queries.place_L[i] - keys.place_L[j] for j in seen]
        for n in range(query.shape[2]):
            u = n // shared_by
            scores = [query[b, i, n] @ key[b, j, u] / math.sqrt(D) for j in seen]
            of_sink = 0.0
            if table is not None:
                scores = CAP * np.tanh(np.array(scores) / CAP)
                scores += table[[bucket_of(distance) for distance in apart], n]
                of_sink = np.exp(sink[n])
            weights = np.exp(scores) / (np.sum(np.exp(scores)) + of_sink)
            for weight, j in zip(weights, seen, strict=True):
                mixed[b, i, n] += weight * value[b, j, u]
    return mixed


def by(way: str, query, key, value, table, sink, who: tuple[Who, Who]) -> jax.Array:
    scoring = Scoring(D**-0.5)
    if table is not None:
        bias = bias_of(table, REACH, POSITIONS)
        scoring = Scoring(D**-0.5, WINDOW, CAP, bias, sink)
    if way == "whole":
        return whole.attend(query, key, value, *who, scoring)
    if way == "blocked":  # 24 is not a multiple of 5
        return blocks.attend(query, key, value, *who, scoring, block=5)
    ring = Ring("context", DEVICES)  # each has 6, in blocks of 4
    return blocks.attend(query, key, value, *who, scoring, block=4, ring=ring)


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
    """Output and gradients of query, key, value, the table of the bias, and sinks."""

    def run(query, key, value, table, sink, who, d_mixed):
        mixed, transposed = jax.vjp(
            lambda *given: by(way, *given, who), query, key, value, table, sink
        )
        *d_given, d_table, d_sink = transposed(d_mixed)
        if way == "ring":
            d_table, d_sink = jax.tree.map(
                lambda d: jax.lax.psum(d, "context"), (d_table, d_sink)
            )
        return mixed, *d_given, d_table, d_sink

    if way == "ring":
        cut, same = PartitionSpec(None, "context"), PartitionSpec()
        who = Who(PartitionSpec("context"), cut, cut)
        run = on_devices(
            run,
            (cut, cut, cut, same, same, (who, who), cut),
            (*[cut] * 4, same, same),
        )
    return jax.jit(run)


def run(way: str, case: Case, queries: Who | None = None):
    """Results of a case, or of one in which others ask."""
    who = queries or case.who, case.who
    given = case.query, case.key, case.value, case.table, case.sink
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
    given += [case.table, case.sink] if shared else []

    def loops(*given):
        table, sink = given[3:] if shared else (None, None)
        return in_loops(*given[:3], table, sink, case.who, case.who)

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
        ("mixed", "query", "key", "value", "table", "sink"),
        result,
        expected,
        strict=True,
    ):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("way", ["whole", "blocked"])
def test_new_tokens_attend_to_a_memory_whose_unused_room_is_of_segment_0(way):
    case = case_of("causal", True)
    keys = dataclasses.replace(case.who, prefix_BL=None)
    keys.segment_BL[:, 9:] = 0
    keys.segment_BL[1, :2] = 0  # padding on the left
    queries = Who(keys.place_L[6:9], keys.segment_BL[:, 6:9])
    given = case.query[:, 6:9], case.key, case.value, case.table, case.sink
    mixed = jax.jit(functools.partial(by, way))(*given, (queries, keys))
    np.testing.assert_allclose(mixed, in_loops(*given, queries, keys), atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients(way):
    case = case_of("causal", True)
    segment = case.who.segment_BL + (case.who.place_L < 9)  # of others than all keys
    queries = dataclasses.replace(case.who, segment_BL=segment)
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
        for ours, theirs in zip(result[:-1], exact[:-1], strict=True):
            scale = np.abs(theirs).max()  # a unit in the last place is 2^-8 of a value
            assert np.abs(ours.astype(np.float32) - theirs).max() < scale * 2.0**-7
        # What sinks get is a sum over 48 queries of numbers of either sign below 1.
        assert np.abs(result[-1] - exact[-1]).max() < 48**0.5 * 2.0**-8


# ------------------------------------------------------------- of the compiled program

LONG, BLOCK = 64, 8


@functools.cache
def program(way: str, backward: bool) -> str:
    """HLO for 64 tokens, one sequence and as many heads of keys as of queries."""
    held = jax.ShapeDtypeStruct((1, LONG, N, D), jnp.float32)
    place = jax.ShapeDtypeStruct((LONG,), jnp.int32)
    flags = jax.ShapeDtypeStruct((1, LONG), jnp.int32)

    def forward(query, key, value, who):
        given = query, key, value, who, who, Scoring(D**-0.5)
        if way == "whole":
            return whole.attend(*given)
        if way == "blocked":
            return blocks.attend(*given, block=BLOCK)
        return blocks.attend(*given, block=BLOCK, ring=Ring("context", DEVICES))

    def both(query, key, value, who):
        mixed, transposed = jax.vjp(
            lambda *given: forward(*given, who), query, key, value
        )
        return transposed(mixed)

    function = both if backward else forward
    if way == "ring":
        cut = PartitionSpec(None, "context")
        cut_who = Who(PartitionSpec("context"), cut, cut)
        function = on_devices(function, (cut, cut, cut, cut_who), cut)
    who = Who(place, flags, flags)
    return jax.jit(function).lower(held, held, held, who).compile().as_text()


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
    place_L = jnp.arange(LONG, dtype=jnp.int32)
    all_alike = Who(place_L, jnp.ones((1, LONG), jnp.int32))

    def layer(x_BLND, scale):
        given = x_BLND * scale, x_BLND, x_BLND, all_alike, all_alike
        return x_BLND + blocks.attend(*given, Scoring(D**-0.5), block=BLOCK), None

    def loss(scales, x_BLND):
        return jnp.sum(jax.lax.scan(layer, x_BLND, scales)[0] ** 2)

    shape = jnp.zeros((1, LONG, N, D))
    text = jax.jit(jax.grad(loss)).lower(jnp.ones(3), shape).compile().as_text()
    assert largest(text) < LONG * LONG


@pytest.mark.parametrize("way", WAYS)
def test_tokens_beyond_a_window_change_nothing(way):
    """Blocks that lie beyond it whole are not computed: NaN there would spread."""
    case = case_of("causal", True)
    case.value[:, : 24 - 3 * WINDOW // 2 - 5] = np.nan
    case.who.prefix_BL[:] = 0
    mixed, *_ = run(way, case)
    if way != "whole":
        assert np.isfinite(mixed[:, -1]).all()
    assert not np.isfinite(mixed[:, 0]).any()
