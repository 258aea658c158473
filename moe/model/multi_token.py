"""Predicts tokens after the next, in training alone (arXiv:2412.19437, section 2.2).

Module k, from 1, reads what the one before it made of token t (the first, the model's
own output) and the embedding of token t + k. A layer like the last makes of them what
the model's own output projection predicts token t + k + 1 by (eq. 21 to 23).

Sequences may be cut over devices, so tokens are shifted where the batch is whole. An
embedding that knows positions has those of token t.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe.layers import Layers, Stack
from moe.model import embedding, norms, stack
from moe.model.block import Counted
from moe.model.execution import Execution
from moe.model.parameters import matrix
from moe.model.products import gather_weights, product
from moe.model.view import View

Batch = dict[str, jax.Array]


def specs(ahead: Stack) -> dict[str, Any]:
    """Describes what each module has beside its layer: three norms, and a product."""
    M, norm = ahead.width, ahead.norm
    assert norm is not None
    one: dict[str, Any] = {
        "stream_norm": norms.specs(norm, M),
        "token_norm": norms.specs(norm, M),
        "join": matrix((2 * M, M), ("embed", "norm"), (0,), (1,)),
        "norm": norms.specs(norm, M),
    }
    return {"modules": [one for _ in ahead.segments]}


def features(batch: Batch, ahead: Stack) -> Batch:
    """Makes each module's features of whole rows, beside those of the decoder.

    Of module k they are `ahead_k_input_tokens`, t + k; `ahead_k_target_tokens`, the one
    after; `ahead_k_segment_ids`, 0 where that is not of the same segment; and
    `ahead_k_loss_weights`, 0 also where the next token itself is not learnt: what
    precedes it may see what follows.
    """
    target_BL, weight_BL = (
        batch[f"decoder_{name}"] for name in ("target_tokens", "loss_weights")
    )
    segment_BL, found = batch["decoder_segment_ids"], Batch()
    for k in range(1, len(ahead.segments) + 1):
        same_BL = segment_BL == _from_ahead(segment_BL, k)
        learnt_BL = (weight_BL > 0) & same_BL
        found |= {
            f"ahead_{k}_input_tokens": _from_ahead(target_BL, k - 1),
            f"ahead_{k}_target_tokens": _from_ahead(target_BL, k),
            f"ahead_{k}_segment_ids": jnp.where(same_BL, segment_BL, 0),
            f"ahead_{k}_loss_weights": _from_ahead(weight_BL, k) * learnt_BL,
        }
    return found


def _from_ahead(x_BL: jax.Array, places: int) -> jax.Array:
    """Brings to each place what is so many places after it; 0 beyond the end."""
    return jnp.pad(x_BL[:, places:], ((0, 0), (0, places)))


def hidden(
    params: Any,
    x_BLM: jax.Array,
    batch: Batch,
    view: View,
    key: jax.Array,
    layers: Layers,
    execution: Execution,
) -> tuple[list[jax.Array], tuple[Counted, ...]]:
    """Computes the activations that each module's logits are made of.

    Args:
        params: this device's pieces.
        x_BLM: the model's own output, normalised, the same on all of `model`.
        batch: this device's cut of what `features` makes.
        view: who the decoder's tokens are.
        key: PRNG key of the step.
        layers: the modules' layers, and the embedding.
        execution: how it is computed.
    Returns:
        x_BLM of each module, as the model's own; and what their sublayers counted, as
        `transformer.hidden` returns it.
    """
    ahead, own, grid = layers.ahead, params["ahead"], execution.grid
    assert ahead is not None
    assert ahead.norm is not None
    outputs: list[jax.Array] = []
    counted: tuple[Counted, ...] = ()
    described = specs(ahead)["modules"]
    x_BLM = grid.residual(x_BLM)
    text = dataclasses.replace(view, image_BN=None)  # patches are in the stream
    for k, segment in enumerate(ahead.segments, 1):
        w = gather_weights(own["modules"][k - 1], described[k - 1], execution)
        id_BL = batch[f"ahead_{k}_input_tokens"]
        given = text, layers.embedding, execution
        token_BLM = embedding.embed(params, id_BL, *given)
        joined = (
            norms.normalise(w["stream_norm"], x_BLM, ahead.norm),
            norms.normalise(w["token_norm"], token_BLM, ahead.norm),
        )
        x_BLM = product(jnp.concatenate(joined, axis=-1), w["join"])
        cuts = [] if execution.tokens_replicated else ["model"]
        mask_BL = batch[f"ahead_{k}_segment_ids"] > 0
        routed = dataclasses.replace(
            view.routed,
            mask_BL=grid.piece(mask_BL, cuts, 1),
            id_BL=grid.piece(id_BL, cuts, 1),
        )
        x_BLM, _, more = stack.run(
            ahead._replace(segments=(segment,)),
            {"layers": [own["layers"][k - 1]]},
            x_BLM,
            dataclasses.replace(view, routed=routed),
            None,
            key,
            execution,
        )
        counted += more
        outputs.append(grid.enter(norms.normalise(w["norm"], x_BLM, ahead.norm)))
    return outputs, counted
