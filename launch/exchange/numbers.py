"""Tensors of a model as numbers, whatever form the files keep them in.

FP8 with a scale for each block, as DeepSeek-V3 has it: NAME beside NAME_scale_inv.
MXFP4, as gpt-oss has it: NAME_blocks and NAME_scales.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from launch.exchange.quantised import from_fp8_blocks, from_mxfp4
from launch.exchange.tensors import Tensor

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_USUAL_BLOCK = (128, 128)


def numbers_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: np.dtype
) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a model by name, each read when it is asked for.

    Args:
        tensors: what the files hold.
        config: config.json.
        dtype: type of those that are kept in fewer bits.
    """
    said = config.get("quantization_config")
    size = said.get("weight_block_size") if isinstance(said, dict) else None
    rows, columns = size if size and len(size) == 2 else _USUAL_BLOCK
    return _Numbers(tensors, dtype, (rows, columns))


class _Numbers(Mapping[str, np.ndarray]):
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
