"""Weights of few bits and their scales, as numbers."""

import numpy as np

from launch.exchange.header import TensorsError, shown

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, by its three lower bits
_BIAS = 127  # of a scale of MXFP4, which is the exponent of a power of two
_NOT_A_NUMBER = 255
_BLOCK_BYTES, _BLOCK_VALUES = 16, 32
_BLOCKS_AT_ONCE = 1 << 12  # 512 kB of float32, which stay in a core's cache


def from_fp8_blocks(
    weight: np.ndarray,
    scale_inv: np.ndarray,
    dtype: np.dtype,
    *,
    name: str,
    block: tuple[int, int] = (128, 128),
) -> np.ndarray:
    """Returns a matrix whose blocks each have a scale (DeepSeek-V3, arXiv:2412.19437).

    In its files beside `weight` stands `weight_scale_inv`: despite its name what
    `weight` is multiplied by. Products are float32, and rounded once.

    Args:
        weight: float8_e4m3fn [..., m, n].
        scale_inv: [..., ⌈m / 128⌉, ⌈n / 128⌉]; the last blocks of a row or column may
            be narrower than the others.
        dtype: what is returned, such as float32 or bfloat16.
        name: the weight, for an error.
        block: rows and columns that share a scale (`weight_block_size`).
    Returns:
        [..., m, n].
    Raises:
        TensorsError: the scales are not those of such a matrix.
    """
    rows, columns = block
    *stacked, m, n = weight.shape if weight.ndim >= 2 else (0, 0)
    wanted = (*stacked, -(-m // rows), -(-n // columns))
    if weight.ndim < 2 or scale_inv.shape != wanted:
        raise TensorsError(
            f"tensor {shown(name)} of shape {weight.shape} has scales of shape "
            f"{scale_inv.shape}, and blocks of {rows} × {columns} want "
            f"{wanted if weight.ndim >= 2 else 'a matrix'}"
        )
    result = np.empty(weight.shape, dtype)
    scale = scale_inv.astype(np.float32)
    for number in range(wanted[-2]):
        band = slice(number * rows, (number + 1) * rows)
        by = np.repeat(scale[..., number : number + 1, :], columns, axis=-1)[..., :n]
        result[..., band, :] = weight[..., band, :].astype(np.float32) * by
    return result


def from_mxfp4(
    blocks: np.ndarray, scales: np.ndarray, dtype: np.dtype, *, name: str
) -> np.ndarray:
    """Returns rows of numbers of four bits, 32 of which share a power of two.

    MXFP4 as gpt-oss has it (arXiv:2508.10925; OCP Microscaling Formats 1.0): two
    numbers to a byte, the lower half first; a number is a sign and an e2m1 magnitude.
    Exact in bfloat16.

    In the files of gpt-oss an expert's matrix is [E, outputs, 32 · G] once unpacked:
    the numbers of a block are of inputs. transformers keeps and writes it unpacked as
    [E, inputs, outputs], the transpose of what is returned here.

    Args:
        blocks: uint8 [..., G, 16], `*_blocks` of the files.
        scales: uint8 [..., G], `*_scales`: exponents of two, plus 127.
        dtype: what is returned, such as float32 or bfloat16.
        name: the weight, for an error.
    Returns:
        [..., 32 · G].
    Raises:
        TensorsError: the scales are not those of such blocks, or one is 255, which
            stands for no number.
    """
    if (
        blocks.dtype != np.uint8
        or scales.dtype != np.uint8
        or blocks.ndim < 2
        or blocks.shape != (*scales.shape, _BLOCK_BYTES)
    ):
        raise TensorsError(
            f"tensor {shown(name)} has blocks {blocks.dtype} {blocks.shape} and scales "
            f"{scales.dtype} {scales.shape}: MXFP4 has uint8 [..., G, {_BLOCK_BYTES}] "
            "and uint8 [..., G]"
        )
    if (scales == _NOT_A_NUMBER).any():
        raise TensorsError(
            f"tensor {shown(name)} has a scale of 255, which is no number"
        )
    packed, scale = blocks.reshape(-1, _BLOCK_BYTES), scales.reshape(-1, 1)
    pair_of_byte = _pair_of_byte()
    power = np.ldexp(np.float32(1), np.arange(_NOT_A_NUMBER) - _BIAS)
    result = np.empty((len(packed), _BLOCK_VALUES), dtype)
    for start in range(0, len(packed), _BLOCKS_AT_ONCE):
        part = slice(start, start + _BLOCKS_AT_ONCE)
        values = pair_of_byte[packed[part]].view(np.float32)
        result[part] = values * power[scale[part]]
    return result.reshape(*blocks.shape[:-2], blocks.shape[-2] * _BLOCK_VALUES)


def _pair_of_byte() -> np.ndarray:
    """The two numbers of every byte, float32, as one of eight bytes: [256]."""
    value = np.array([*_FP4, *(-one for one in _FP4)], np.float32)
    byte = np.arange(256)
    pair = np.stack([value[byte & 15], value[byte >> 4]], axis=-1)
    return pair.view(np.uint64)[:, 0]
