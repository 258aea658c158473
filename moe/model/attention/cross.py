"""Attention of a decoder's tokens to the encoder's output (arXiv:1706.03762, 3.2.3).

A token sees all of its own segment on the other side, wherever it stands.
"""

import jax

from moe.model.attention import heads
from moe.model.attention.attend import LargestLogits, Memory, Weights, attend
from moe.model.execution import Execution
from moe.model.view import View
from moe.settings import HeadsSettings

specs = heads.specs
memory = heads.memory  # of a token of the encoder
with_logits_times = heads.with_logits_times


def apply(
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: Memory | None,
    s: HeadsSettings,
    key: jax.Array | None,
    number: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, Memory | None, LargestLogits | None]:
    """Attends to the view's source; what is remembered of it never changes."""
    del key, number
    w = w if memory else heads.own_keys(w, s, execution.grid)
    given = w, x_BLM, view, memory, s, execution
    return attend(heads.kind(execution.grid), *given, source=view.source)
