"""Weights of few bits, against loops over their bits."""

import re

import ml_dtypes
import numpy as np
import pytest

from launch.exchange.header import TensorsError
from launch.exchange.quantised import from_fp8_blocks, from_mxfp4

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_fp8_blocks_are_each_element_times_the_scale_of_its_block(dtype):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 9, 7), scale=90).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.001, 3, (2, 3, 3)).astype(np.float32)
    found = from_fp8_blocks(weight, scale, dtype, name="w", block=(4, 3))
    wanted = np.zeros(weight.shape, dtype)
    for e, i, j in np.ndindex(weight.shape):
        product = np.float32(weight[e, i, j]) * scale[e, i // 4, j // 3]
        wanted[e, i, j] = product
    assert found.dtype == dtype
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.fast
def test_blocks_of_fp8_are_128_by_128_unless_told_otherwise():
    # Rows 576 as those of DeepSeek-V3's kv_a_proj_with_mqa: the fifth block is a half.
    weight = np.ones((576, 200), ml_dtypes.float8_e4m3fn)
    scale = np.arange(10, dtype=np.float32).reshape(5, 2)
    found = from_fp8_blocks(weight, scale, F32, name="w")
    assert found[127, 127] == 0
    assert found[127, 128] == 1
    assert found[128, 127] == 2
    assert found[575, 199] == 9
    for bad in (scale.T, scale[:4], scale[None], scale[0]):
        why = re.escape(
            f"tensor 'w' of shape (576, 200) has scales of shape {bad.shape}"
        )
        with pytest.raises(TensorsError, match=why):
            from_fp8_blocks(weight, bad, F32, name="w")
    with pytest.raises(TensorsError, match="want a matrix"):
        from_fp8_blocks(weight[0], scale[0], F32, name="w")


def e2m1(code: int) -> float:
    """Four bits as the specification of OCP defines them: sign, exponent, fraction."""
    sign, exponent, fraction = code >> 3, code >> 1 & 3, code & 1
    size = (1 + fraction / 2) * 2.0 ** (exponent - 1) if exponent else fraction / 2
    return -size if sign else size


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_mxfp4_is_each_half_byte_times_the_scale_of_its_block(dtype, monkeypatch):
    monkeypatch.setattr("launch.exchange.quantised._BLOCKS_AT_ONCE", 4)
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (2, 3, 5, 16), np.uint8)
    scales = rng.integers(100, 150, (2, 3, 5), np.uint8)
    scales[0, 0, :3] = 0, 1, 252
    found = from_mxfp4(blocks, scales, dtype, name="w")
    wanted = np.zeros((2, 3, 160), dtype)
    for e, row, group, byte in np.ndindex(blocks.shape):
        for half in range(2):
            code = int(blocks[e, row, group, byte]) >> 4 * half & 15
            value = e2m1(code) * 2.0 ** (int(scales[e, row, group]) - 127)
            wanted[e, row, 32 * group + 2 * byte + half] = value
            assert float(wanted.dtype.type(value)) == value  # exact in either type
    assert found.dtype == dtype
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.fast
def test_a_byte_of_mxfp4_by_hand():
    # 0x2A: its lower half 1010 is −1, its upper 0010 is 1; 129 − 127 = 2, so times 4.
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, 0] = 0x2A
    found = from_mxfp4(blocks, np.full((1, 1), 129, np.uint8), F32, name="w")
    assert found.shape == (1, 32)
    assert found[0, :3].tolist() == [-4.0, 4.0, 0.0]
    with pytest.raises(TensorsError, match=r"tensor 'w' has blocks uint8 \(1, 1, 16\)"):
        from_mxfp4(blocks, np.zeros((1, 2), np.uint8), F32, name="w")
    with pytest.raises(TensorsError, match="tensor 'w' has a scale of 255"):
        from_mxfp4(blocks, np.full((1, 1), 255, np.uint8), F32, name="w")
