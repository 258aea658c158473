"""Attention over prefixes, compared with loops over queries and keys."""

import jax
import numpy as np
import pytest

from moe.model import view
from moe.model.attention import heads
from moe.model.execution import Execution
from moe.model.view import Stream
from moe.settings import ExecutionSettings, HeadsSettings, PositionSettings
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

pytestmark = pytest.mark.fast

B, L, M, N, D = 4, 12, 8, 2, 4
BASE = 100.0
SETTINGS = HeadsSettings(
    num_heads=N,
    kv_heads=N,
    head_dim=D,
    positions=PositionSettings("rotary", rotary_base=BASE),
)


def rotated(x_D: np.ndarray, position: int) -> np.ndarray:
    half = D // 2
    turned = np.zeros(D)
    for d in range(half):
        angle = position * BASE ** (-d / half)
        left, right = x_D[d], x_D[d + half]
        turned[d] = left * np.cos(angle) - right * np.sin(angle)
        turned[d + half] = right * np.cos(angle) + left * np.sin(angle)
    return turned


def attention_in_loops(w, x_LM, position_L, segment_L, prefix_L) -> np.ndarray:
    """One row; each query looks at every key that it may see."""
    y_LM = np.zeros((L, M))
    for n in range(N):
        query, key, value = (x_LM @ w[name][:, n] for name in ("query", "key", "value"))
        for i in range(L):
            seen = [
                j
                for j in range(L)
                if segment_L[i] == segment_L[j]
                and (j <= i or (prefix_L[i] and prefix_L[j]))
            ]
            scores = [
                rotated(query[i], position_L[i])
                @ rotated(key[j], position_L[j])
                / D**0.5
                for j in seen
            ]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            mixed_D = sum(p * value[j] for p, j in zip(weights, seen, strict=True))
            y_LM[i] += mixed_D @ w["output"][n]
    return y_LM


def random_row(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments, then padding; their positions; and flags wherever they may be."""
    segment_L, position_L = np.zeros((2, L), np.int32)
    start = 0
    for segment in (1, 2, 3):
        stop = min(start + rng.integers(2, 6), L)
        segment_L[start:stop] = segment
        position_L[start:stop] = np.arange(stop - start)
        start = stop
    return position_L, segment_L, rng.integers(0, 2, L)


@jax.jit
def run(matrices, x_BLM, position_BL, segment_BL, prefix_BL=None):
    execution = Execution(ExecutionSettings(), make_mesh(MeshSettings()))
    stream = Stream(segment_BL, position_BL, segment_BL, prefix_BL, np.arange(B))
    seen = view.of_stream(stream, None, execution)
    return heads.apply(matrices, x_BLM, seen, None, SETTINGS, None, 0, execution)[0]


def test_a_prefix_sees_itself_whole_and_nothing_else_changes():
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("query", "key", "value"), (M, N, D)) | {"output": (N, D, M)}
    w = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    for _ in range(3):
        x_BLM = rng.normal(size=(B, L, M)).astype(np.float32)
        position_BL, segment_BL, prefix_BL = np.stack(
            [random_row(rng) for _ in range(B)], axis=1
        )
        told = x_BLM, position_BL, segment_BL
        for prefix in (prefix_BL, 0 * prefix_BL):
            expected_BLM = np.stack(
                [attention_in_loops(w, *row) for row in zip(*told, prefix, strict=True)]
            )
            actual_BLM = run(w, *told, prefix)
            # Outputs are of order 10; float32 against float64.
            np.testing.assert_allclose(actual_BLM, expected_BLM, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(run(w, *told), actual_BLM)  # none: causal
        assert np.any(run(w, *told, prefix_BL) != actual_BLM)
