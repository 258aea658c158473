"""How a model is computed, whatever it is: no part of a checkpoint's identity.

Read before jax is imported: standard library only. `configs/base.gin` fills the record;
nothing else does.
"""

import dataclasses
from typing import Literal

Remat = Literal["none", "minimal", "full"]


@dataclasses.dataclass(frozen=True)
class ExecutionSettings:
    """Types, memory and transport: results differ by rounding alone.

    Attributes:
        dtype: type of activations, and of parameters where they meet them.
        param_dtype: type of the parameters that are kept; see
            `OptimizerSettings.rounding`.
        reduce_dtype: type in which gradients of fully sharded parameters are summed
            over devices.
        remat: what the backward pass keeps: "none" recomputes nothing, "minimal"
            keeps matrix products and everything that travelled, "full" keeps only
            the layers' inputs and so repeats the exchanges.
        sparse_remat: the same of layers with experts, where it differs.
        scan_layers: compile one period and loop over it; else compile each, which
            takes longer and spares copies of stacked weights.
        attention_block: tokens from which on sequences are attended block by block, of
            this size, so that no L × L array is ever whole; 0 never does.
        attention_kernel: "auto" attends by a library's kernel where one does the same;
            "off" never does.
        vocab_chunks: pieces of the vocabulary that logits are computed in, to save
            memory.
        transport: how tokens travel: one of the files in `moe/dispatch`, or "auto".
        row_budget: where nothing drops, rows that the experts of a device have room
            for, over an even share. A step that needs more is repeated in rounds.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "minimal"
    sparse_remat: Literal["same", "none", "minimal", "full"] = "same"
    scan_layers: bool = True
    attention_block: int = 1024
    attention_kernel: Literal["auto", "off"] = "auto"
    vocab_chunks: int = 1
    transport: Literal["auto", "all_to_all", "einsum", "ring", "ragged"] = "auto"
    row_budget: float = 1.5

    def remat_of(self, *, sparse: bool) -> str:
        """Returns the policy of a layer, with experts or without."""
        own = sparse and self.sparse_remat != "same"
        return self.sparse_remat if own else self.remat
