"""What attention may have besides, compared with loops on one device, and on eight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model import parameters, view
from moe.model.attention import heads
from moe.model.execution import Execution
from moe.model.view import Stream
from moe.settings import (
    ExecutionSettings,
    HeadsSettings,
    NormSettings,
    PositionSettings,
)
from partitioning import rules
from partitioning.mesh import make_mesh
from partitioning.settings import (
    UNCUT,
    MeshSettings,
    PartitionSettings,
    fitting,
)

B, L, M, N, U, D = 2, 8, 6, 4, 2, 4
BASE = 10.0
CASES = {
    # Norms of each head, with biases; a quarter of scores' usual size, bounded; sinks.
    "head": HeadsSettings(
        N,
        U,
        D,
        output_bias=True,
        qk_norm="head",
        norm=NormSettings("layer", 1e-3),
        positions=PositionSettings("rotary", rotary_base=BASE, fraction=0.5),
        sinks=True,
        cap=0.7,
        score_scale=1.5,
    ),
    # A norm of all heads, whose sums go over devices; a gate.
    "width": HeadsSettings(
        N,
        U,
        D,
        biases=True,
        qk_norm="width",
        norm=NormSettings("rms", 1e-2),
        positions=PositionSettings("rotary", rotary_base=BASE, pairs="neighbours"),
        gated=True,
        window=5,
    ),
    # Lengths are divided out after turning.
    "unit": HeadsSettings(
        N,
        U,
        D,
        qk_norm="unit",
        norm=NormSettings("rms", 1e-1),
        positions=PositionSettings("rotary", rotary_base=BASE),
    ),
}
CASES["alibi"] = HeadsSettings(6, 3, D, positions=PositionSettings("alibi"))
# Pieces of three positions, in which queries grow at the second, fourth, sixth.
CASES["chunks"] = HeadsSettings(N, U, D, chunk=3, growth=0.7, growth_length=2)
# 2^-8/4, and so on to 2^-8; then the first and third of eight heads.
SLOPES = (1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8)
RING = PartitionSettings(context_attention="ring")
WHOLE = PartitionSettings(sequence_parallel=False)
ALONE = MeshSettings()
C2M2 = MeshSettings(data=2, context=2, model=2)
C2M4 = MeshSettings(context=2, model=4)
# How eight devices attend: the case, the mesh, what is cut, tokens of a block. Where
# `model` has four devices, two share a head of keys; in "alibi" its two have one and a
# half each, and so have all.
WAYS = {
    "head": ("head", C2M2, RING, 3),
    "width": ("width", C2M2, PartitionSettings(), 0),
    "unit": ("unit", C2M2, WHOLE, 3),
    "alibi": ("alibi", C2M2, RING, 3),
    "chunks": ("chunks", C2M2, PartitionSettings(), 3),
    "chunks, ring": ("chunks", C2M2, RING, 3),
    "shared": ("width", C2M4, RING, 3),
    "shared, whole": ("head", C2M4, WHOLE, 0),
}


# ------------------------------------------------------------------------- the oracle


def normalised(w, x, norm: NormSettings):
    """Over all numbers of x, which has any shape."""
    if norm.kind == "layer":
        x = x - np.mean(x)
    x = x / math.sqrt(np.mean(x * x) + norm.epsilon)
    return x * w.get("scale", 1) + w.get("bias", 0)


def turned(x_D, position: int, p: PositionSettings):
    size, out = int(D * p.fraction), x_D.copy()
    for d in range(size // 2):
        angle = position * BASE ** (-2 * d / size)
        left, right = d, d + size // 2
        if p.pairs == "neighbours":
            left, right = 2 * d, 2 * d + 1
        cos, sin = math.cos(angle), math.sin(angle)
        out[left] = x_D[left] * cos - x_D[right] * sin
        out[right] = x_D[right] * cos + x_D[left] * sin
    return out


def asked(name: str, w, x_M, position: int, s: HeadsSettings):
    """Queries or keys of one token, [heads, D]."""
    x = np.einsum("m,mnd->nd", x_M, w[name]) + w.get(f"{name}_bias", 0)
    own = w.get(f"{name}_norm")
    if s.qk_norm == "width":
        x = normalised(own, x, s.norm)
    if s.qk_norm == "head":
        x = np.stack([normalised(own, head, s.norm) for head in x])
    if s.positions.kind == "rotary":
        x = np.stack([turned(head, position, s.positions) for head in x])
        if s.qk_norm == "unit":
            x = np.stack([normalised({}, head, s.norm) for head in x])
    if name == "query" and s.growth:
        x = x * (1 + s.growth * math.log(1 + (position + 1) // s.growth_length))
    return x


def in_loops(w, x_BLM, position_BL, segment_BL, s: HeadsSettings):
    """Each token of each head looks at every token that it may see."""
    y_BLM = np.zeros(x_BLM.shape)
    for b in range(B):
        row = list(zip(x_BLM[b], position_BL[b], strict=True))
        query, key = (
            [asked(name, w, x, position, s) for x, position in row]
            for name in ("query", "key")
        )
        value = np.einsum("lm,mud->lud", x_BLM[b], w["value"]) + w.get("value_bias", 0)
        for i in range(L):
            seen = [
                j
                for j in range(i + 1)
                if segment_BL[b, j] == segment_BL[b, i]
                and (not s.window or i - j < s.window)
                and (
                    not s.chunk
                    or len({position_BL[b, k] // s.chunk for k in (i, j)}) == 1
                )
            ]
            mixed = np.zeros((s.num_heads, D))
            for n in range(s.num_heads):
                u = n * s.kv_heads // s.num_heads
                scale = s.score_scale or D**-0.5
                scores = np.array([query[i][n] @ key[j][u] * scale for j in seen])
                if s.cap:
                    scores = s.cap * np.tanh(scores / s.cap)
                if s.positions.kind == "alibi":
                    scores = scores - [SLOPES[n] * (i - j) for j in seen]
                total = np.sum(np.exp(scores))
                total += np.exp(w["sink"][n]) if s.sinks else 0
                for score, j in zip(scores, seen, strict=True):
                    mixed[n] += np.exp(score) / total * value[j, u]
            if s.gated:
                gate = np.einsum("m,mnd->nd", x_BLM[b, i], w["gate"])
                mixed = mixed / (1 + np.exp(-gate))
            y_BLM[b, i] = np.einsum("nd,ndm->m", mixed, w["output"])
    return y_BLM + w.get("output_bias", 0)


# -------------------------------------------------------------------------- the tests


def test_scores_start_as_large_whatever_their_factor_is():
    def deviation(score_scale: float) -> float:
        s = HeadsSettings(N, U, 16, score_scale=score_scale, init_scale=0.3)
        query, key = (heads.specs(s, M)[name] for name in ("query", "key"))
        assert key.stddev == (0.3 / M) ** 0.5
        return query.stddev * s.scale

    # A query of 0.3 variance, times 16^-0.5.
    assert deviation(0.0) == (0.3 / M) ** 0.5 / 4
    for score_scale in (1.0, 0.1):
        assert math.isclose(deviation(score_scale), deviation(0.0))


@functools.cache
def given(name: str):
    """Weights, activations, gradients of the output; positions and segments."""
    draw = np.random.default_rng(0)
    specs = heads.specs(CASES[name], M)

    def drawn(spec: parameters.Spec) -> np.ndarray:
        # Weights of which every one matters, around 1 where they are scales.
        near = 1.0 if spec.value else 0.0
        return (near + 0.7 * draw.normal(size=spec.shape)).astype(np.float32)

    w = jax.tree.map(drawn, specs)
    x_BLM, d_BLM = draw.normal(size=(2, B, L, M)).astype(np.float32)
    segment_BL = np.array([[1] * L, [1] * 3 + [2] * (L - 3)], np.int32)
    position_BL = np.array([range(L), [*range(3), *range(L - 3)]], np.int32)
    return w, x_BLM, d_BLM, position_BL, segment_BL


@functools.cache
def attended(name: str, sizes=ALONE, partition=UNCUT, block=0):
    """Output, and gradients of weights and activations."""
    s, mesh = CASES[name], make_mesh(sizes)
    settings = ExecutionSettings(dtype="float32", attention_block=block)
    partition = fitting(partition, sizes.model, s.kv_heads)
    execution = Execution(settings, mesh, partition)
    grid = execution.grid
    specs = heads.specs(s, M)

    def on_device(w, x_BLM, position_BL, segment_BL):
        stream = Stream(segment_BL, position_BL, segment_BL, None, jnp.arange(B))
        seen = view.of_stream(stream, None, execution)
        return heads.apply(w, x_BLM, seen, None, s, None, 0, execution)[0]

    rows = rules.spec(["batch", "length"])
    stream = rules.spec(["batch", "piece" if grid.cuts_sequence else "length"])
    cut = jax.tree.map(lambda spec: rules.spec(spec.axes, grid.table), specs)
    apply = grid.run(on_device, (cut, stream, rows, rows), stream)

    @jax.jit
    def run(w, x_BLM, d_BLM, *told):
        y_BLM, transposed = jax.vjp(lambda *given: apply(*given, *told), w, x_BLM)
        return y_BLM, transposed(d_BLM)

    with jax.set_mesh(mesh):
        return jax.device_get(run(*given(name)))


@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradients_agree_with_loops(name):
    w, x_BLM, d_BLM, *told = given(name)
    w, x_BLM, d_BLM = jax.tree.map(lambda x: x.astype(np.float64), (w, x_BLM, d_BLM))
    y_BLM, gradients = attended(name)
    expected_BLM = in_loops(w, x_BLM, *told, CASES[name])
    np.testing.assert_allclose(y_BLM, expected_BLM, rtol=1e-4, atol=1e-5)
    # Of each array along a direction of its own, by central differences.
    draw = np.random.default_rng(1)
    leaves, tree = jax.tree.flatten((w, x_BLM))
    for place, (gradient, leaf) in enumerate(
        zip(jax.tree.leaves(gradients), leaves, strict=True)
    ):
        along, ends = draw.normal(size=leaf.shape) * 1e-5, []
        for sign in (1, -1):
            moved = [*leaves[:place], leaf + sign * along, *leaves[place + 1 :]]
            y_BLM = in_loops(*tree.unflatten(moved), *told, CASES[name])
            ends.append(np.sum(d_BLM * y_BLM))
        slope = (ends[0] - ends[1]) / 2
        assert abs(np.sum(gradient * along) - slope) < 1e-3 * abs(slope) + 1e-8, place


@pytest.mark.parametrize("way", WAYS)
def test_eight_devices_attend_as_one(way):
    name, *on_eight = WAYS[way]
    alone, cut = attended(name), attended(name, *on_eight)
    paths = jax.tree_util.tree_leaves_with_path(alone)
    for (path, expected), found in zip(paths, jax.tree.leaves(cut), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, expected, 1e-4, 2e-5, err_msg=where)
        assert np.abs(expected).max() > 1e-3, where
