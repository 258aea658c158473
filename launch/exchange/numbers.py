"""Tensors of a model as numbers, whatever form the files keep them in.

FP8 with a scale for each block, as DeepSeek-V3 has it: NAME beside NAME_scale_inv.
MXFP4, as gpt-oss has it: NAME_blocks and NAME_scales.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from launch.exchange.family import ExchangeError
from launch.exchange.header import shown
from launch.exchange.quantised import from_fp8_blocks, from_mxfp4
from launch.exchange.tensors import Tensor

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_USUAL_BLOCK = (128, 128)


def numbers_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: np.dtype
) -> "Numbers":
    """Returns the arrays of a model by name, each read when it is asked for.

    Args:
        tensors: what the files hold.
        config: config.json.
        dtype: type of those that are kept in fewer bits.
    Raises:
        ExchangeError: config.json gives blocks of FP8 no size, or a tensor is there in
            two forms.
    """
    said = config.get("quantization_config")
    size = said.get("weight_block_size") if isinstance(said, dict) else None
    block = tuple(size) if isinstance(size, list) else _USUAL_BLOCK
    twice = [
        name.removesuffix(_BLOCKS)
        for name in tensors
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) in tensors
    ]
    if twice:
        raise ExchangeError(f"{twice[0]} is there as it is, and as blocks")
    if len(block) != 2 or not all(type(one) is int and one > 0 for one in block):
        raise ExchangeError(f"config.json has weight_block_size = {shown(size)}")
    return Numbers(tensors, dtype, (block[0], block[1]))


class Numbers(Mapping[str, np.ndarray]):
    """Arrays by name, each read when it is asked for.

    Args:
        tensors: what the files hold.
        dtype: type of those that are kept in fewer bits.
        block: rows and columns that share a scale of FP8.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: np.dtype, block: tuple[int, int]
    ) -> None:
        self._tensors, self._dtype, self._block = tensors, dtype, block
        self._names = dict.fromkeys(map(self._name, tensors))

    def __getitem__(self, name: str) -> np.ndarray:
        if f"{name}{_BLOCKS}" in self._tensors:
            blocks = self._tensors[f"{name}{_BLOCKS}"].read()
            scales = self._tensors[f"{name}{_SCALES}"].read()
            rows = from_mxfp4(blocks, scales, self._dtype, name=name)
            return rows.swapaxes(-1, -2)
        array = self._tensors[name].read()
        if f"{name}{_SCALE}" not in self._tensors:
            return array
        scale = self._tensors[f"{name}{_SCALE}"].read()
        return from_fp8_blocks(array, scale, self._dtype, name=name, block=self._block)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of an array, which is not read for it."""
        if f"{name}{_BLOCKS}" in self._tensors:
            scales = self._tensors[f"{name}{_SCALES}"].form.shape
            blocks = self._tensors[f"{name}{_BLOCKS}"].form.shape
            if len(scales) < 2 or blocks != (*scales, 16):
                raise ExchangeError(
                    f"{name}{_BLOCKS} of shape {blocks} does not have 16 bytes for "
                    f"each of its scales, of shape {scales}"
                )
            *stacked, rows, groups = scales
            return (*stacked, groups * 32, rows)
        return self._tensors[name].form.shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def _name(self, name: str) -> str:
        """The name of the numbers that a tensor is, or is a part of."""
        for one, other in ((_SCALE, ""), (_BLOCKS, _SCALES), (_SCALES, _BLOCKS)):
            whole = name.removesuffix(one)
            if whole != name and f"{whole}{other}" in self._tensors:
                return whole
        return name
