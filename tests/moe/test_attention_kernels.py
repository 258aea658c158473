"""Kernels of libraries, interpreted, against all scores held at once; which is taken.

The oracle itself is compared with loops in `test_mixing_values.py`.
"""

import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model import remat
from moe.model.attention import kernel, kernel_method, whole
from moe.model.attention.mask import Who
from moe.model.attention.scoring import Scoring
from moe.settings import ExecutionSettings, HeadsSettings, PositionSettings
from moe.testing.jaxprs import equations

B, L, N, U, D = 2, 256, 4, 2, 16  # two blocks of splash
# Window, bound, whether there are sinks, and prefixes.
CASES = {
    "all": (0, 0.0, False, False),
    "window": (40, 0.0, False, False),
    "beyond a block": (200, 0.0, False, False),
    "cap and sinks": (40, 2.0, True, False),
    "narrow values": (0, 0.0, False, False),
    "prefixes": (0, 0.0, False, True),
    "prefixes and window": (40, 0.0, False, True),
}
TAKEN = {
    "splash_interpreted": (
        *("all", "window", "beyond a block", "cap and sinks"),
        "narrow values",
    ),
    "cudnn_interpreted": (
        *("all", "window", "beyond a block", "prefixes"),
        "prefixes and window",
    ),
}


@functools.cache
def given(seed: int = 0):
    """Arrays, gradient of the output, sinks; segments of 100 and 93, then padding."""
    draw = np.random.default_rng(seed)
    heads = (N, U, U, N)
    arrays = [draw.normal(size=(B, L, n, D)).astype(np.float32) for n in heads]
    place = np.arange(L, dtype=np.int32)
    segment = np.stack([np.where(place < 100, 1, 2), np.full(L, 1)])
    segment *= place < np.array([[193], [L]])
    return *arrays, draw.normal(size=N).astype(np.float32), segment.astype(np.int32)


@functools.cache
def attended(method: str | None, case: str):
    """Output, and gradients of queries, keys, values and sinks."""
    window, cap, has_sinks, has_prefix = CASES[case]
    query, key, value, d_mixed, sink, segment = given()
    if case == "narrow values":  # as in latent attention
        value, d_mixed = (x[..., : D // 2] for x in (value, d_mixed))
    place_L = jnp.arange(L, dtype=jnp.int32)
    prefix = np.int32(place_L % 100 < 30) * np.ones((B, 1), np.int32)
    who = Who(place_L, segment, prefix if has_prefix else None)

    @jax.jit
    def run(query, key, value, sink):
        def attend(query, key, value, sink):
            scoring = Scoring(0.3, window, cap, sink_N=sink if has_sinks else None)
            arguments = query, key, value, who, who, scoring
            if method is None:
                return whole.attend(*arguments)
            return kernel.attend(*arguments, method=method)

        mixed, transposed = jax.vjp(attend, query, key, value, sink)
        return mixed, *transposed(jnp.asarray(d_mixed))

    return jax.device_get(run(query, key, value, sink))


@pytest.mark.parametrize(
    ("method", "case"), [(m, case) for m, cases in TAKEN.items() for case in cases]
)
def test_kernels_agree_with_all_scores_in_outputs_and_gradients(method, case):
    names = ("mixed", "query", "key", "value", "sink")
    pairs = zip(names, attended(method, case), attended(None, case), strict=True)
    for name, ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=name)
    assert np.any(attended(None, case)[4]) == CASES[case][2]


def picked(**changes):
    told = {
        "platform": "gpu",
        "device_kind": "NVIDIA H200",
        "dtype": "bfloat16",
        "length": 4096,
        "width": 128,
        "value_width": 128,
    }
    return kernel_method.pick(**told | changes)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "method", "reason"),
    [
        ({"platform": "cpu"}, None, "TPU and GPU"),
        ({}, "cudnn", "jax.nn.dot_product_attention"),
        ({"device_kind": "a100-40g"}, "cudnn", ""),
        ({"device_kind": "Tesla V100-SXM2-16GB"}, None, "Ampere and later"),
        ({"device_kind": "AMD Instinct MI300X"}, None, "Ampere and later"),
        ({"dtype": "float32"}, None, "bfloat16 and float16"),
        ({"width": 256, "value_width": 256}, None, "up to 128"),
        ({"value_width": 64}, None, "keys as wide as values; these are 128 and 64"),
        ({"length": 16384}, None, "too large for 16384 tokens"),
        ({"length": 4095}, None, "even number"),
        ({"sink": True}, None, "sinks"),
        ({"cap": True}, None, "bound"),
        ({"prefix": True}, "cudnn", ""),
        ({"bias": True}, None, "bias by distance"),
        ({"whole": False}, None, "cut over devices"),
        ({"platform": "tpu"}, "splash", "splash"),
        ({"platform": "tpu", "dtype": "float32", "length": 65536}, "splash", ""),
        ({"platform": "tpu", "length": 4000}, None, "multiples of 128 tokens"),
        ({"platform": "tpu", "prefix": True}, None, "no prefixes"),
        ({"platform": "tpu", "sink": True, "cap": True}, "splash", ""),
        ({"platform": "tpu", "bias": True}, None, "bias by distance"),
        ({"platform": "tpu", "whole": False}, None, "cut over devices"),
    ],
)
def test_which_kernel_is_taken_and_why_none(changes, method, reason):
    found, why = picked(**changes)
    assert found == method
    assert reason in why


@pytest.mark.fast
def test_a_kind_of_layer_and_the_setting_decide():
    heads = HeadsSettings(num_heads=2, kv_heads=2, head_dim=64)
    told = "tpu", "TPU v4"
    more = {"length": 512, "whole": True, "prefix": False}
    auto, off = ExecutionSettings(), ExecutionSettings(attention_kernel="off")
    assert kernel_method.of_heads(heads, auto, *told, **more)[0] == "splash"
    assert kernel_method.of_heads(heads, off, *told, **more)[0] is None
    relative = HeadsSettings(
        num_heads=2,
        kv_heads=2,
        head_dim=64,
        positions=PositionSettings("distance", buckets=8, max_distance=16),
    )
    assert kernel_method.of_heads(relative, auto, *told, **more)[0] is None
    alibi = dataclasses.replace(relative, positions=PositionSettings("alibi"))
    assert kernel_method.of_heads(alibi, auto, *told, **more)[0] is None
    bounded = HeadsSettings(num_heads=2, kv_heads=2, head_dim=64, sinks=True, cap=5.0)
    assert kernel_method.of_heads(bounded, auto, *told, **more)[0] == "splash"
    for changed, why in (({"cap": 0.0}, "sinks"), ({"sinks": False}, "bound")):
        one = dataclasses.replace(bounded, **changed)
        told = "gpu", "NVIDIA H200"
        assert why in kernel_method.of_heads(one, auto, *told, **more)[1]


def pretend_cudnn(monkeypatch):
    """The library asks the machine whether it has cuDNN, even to compile elsewhere."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda capability: True)


@pytest.mark.fast
@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_cudnn_lowers_and_minimal_does_not_attend_twice(policy, monkeypatch):
    pretend_cudnn(monkeypatch)
    shape = jax.ShapeDtypeStruct((B, L, N, D), jnp.bfloat16)
    segment = jax.ShapeDtypeStruct((B, L), jnp.int32)

    def loss(x_BLND, segment_BL):
        who = Who(jnp.arange(L, dtype=jnp.int32), segment_BL)

        def layer(x_BLND, scale):
            arguments = x_BLND * scale, x_BLND, x_BLND, who, who, Scoring(0.3, 40)
            return kernel.attend(*arguments, method="cudnn"), None

        scales = jnp.ones(3, jnp.bfloat16)
        scanned = remat.rematerialised(layer, policy)
        return jnp.sum(jax.lax.scan(scanned, x_BLND, scales)[0] ** 2)

    traced = jax.jit(jax.grad(loss)).trace(shape, segment)
    names = Counter(each.primitive.name for each in equations(traced.jaxpr))
    assert names["dot_product_attention_bwd_wrapper"] == 1
    assert names["dot_product_attention_fwd_wrapper"] == 1 + (policy == "full")
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == {"CAUSAL"}
    assert set(re.findall(r"sliding_window_length\\22: (\d+)", text)) == {"40"}
