"""Logits of attention that stay bounded: weights shrink where they grew too large.

QK-Clip of Kimi K2 (arXiv:2507.20534, section 2.1, algorithm 1).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Layers, Place
from moe.model.attention.attend import LargestLogits
from moe.model.block import KINDS


def attentions(layers: Layers) -> Iterator[Place]:
    """Yields the sublayers that measure their logits, in the order of their sums."""
    for place in layers.places():
        if hasattr(KINDS[place.sublayer.kind], "with_logits_times"):
            yield place


def clip(
    params: Any, largest: Sequence[LargestLogits], layers: Layers, limit: float
) -> Any:
    """Brings the logits of each head whose largest was above a limit down to it.

    All logits of the head are multiplied by limit / largest, by what its queries and
    keys are made with. Where layers share that, the largest of all of them counts.

    Args:
        params: parameters after the optimizer's update, or a copy of them; None in
            place of those that are frozen.
        largest: largest logits of each head over the whole batch, led by layers, of
            each sublayer in the order of `attentions`.
        layers: what the layers are.
        limit: τ, above 0.
    """
    params = jax.tree.map(lambda array: array, params)  # dicts of its own
    for place, most in zip(attentions(layers), largest, strict=True):
        blocks = params[place.stack]["layers"][place.segment]
        weights = blocks[place.block][place.sublayer.name]
        most_PN = most.logit_N
        stack = layers.ahead if place.stack == "ahead" else layers.stacks[place.stack]
        assert stack is not None
        if stack.segments[place.segment].shared:
            most_PN = jnp.max(most_PN, axis=0, keepdims=True)
        factor_PN = limit / jnp.maximum(most_PN, limit)
        weights |= KINDS[place.sublayer.kind].with_logits_times(
            weights, factor_PN, place.sublayer.settings
        )
    return params


def metrics(largest: Sequence[LargestLogits], limit: float) -> dict[str, jax.Array]:
    """Returns the largest logit of all heads, and how many of them were clipped."""
    most = jnp.concatenate([each.logit_N.reshape(-1) for each in largest])
    return {
        "attention/max_logit": jnp.max(most),
        "attention/clipped_heads": jnp.sum(most > limit),
    }
