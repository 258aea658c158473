"""The model, and a sparse layer by itself, as functions of whole arrays on any mesh.

In training all of it is inside one `shard_map`; what compares results wants them whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe.model import head, parameters, sparse, transformer
from moe.model.execution import Execution
from moe.model.products import gather_weights
from moe.model.transformer import Batch, Model
from moe.model.view import Routed
from moe.routing.assignment import RouterSums
from moe.settings import SparseSettings
from partitioning import rules


def forward(
    model: Model,
    params: Any,
    batch: Batch,
    row_B: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[RouterSums, ...]]:
    """Computes logits of every position, and what the routers saw.

    Args:
        model: the static description.
        params: parameters, as `inventory.draw` returns them.
        batch: features as in `transformer.hidden`.
        row_B: int32, global row number of each sequence.
        key: PRNG key of the step; None outside training.
    Returns:
        logits_BLV in float32, and of each sparse sublayer sums [layers, G, ...].
    """
    sparse = [place.sublayer.settings for place in model.layers.sparse()]

    def on_device(params: Any, batch: Batch, row_B: Any, key: Any) -> Any:
        x_BLM, counted = transformer.hidden(model, params, batch, row_B, key)
        sums = [each for each in counted if isinstance(each, RouterSums)]
        output = head.projection(params, model.layers.embedding)
        # Groups of the same rows are neighbours.
        by_block = []
        for s, each in zip(sparse, sums, strict=True):
            blocks = len(row_B) // s.router.group_rows
            each = dataclasses.replace(each, needed_1EH=None)  # of no group
            by_block.append(
                jax.tree.map(
                    lambda x, n=blocks: x.reshape(x.shape[0], n, -1, *x.shape[2:]), each
                )
            )
        return head.logits_of(output, x_BLM, model.execution), tuple(by_block)

    by_row, piece = rules.spec(["batch"]), rules.spec([None, "batch", "piece"])
    logits_BLV, sums = model.grid.run(
        on_device,
        in_specs=(
            model.partition_specs,
            transformer.batch_spec(batch),
            by_row,
            PartitionSpec(),
        ),
        out_specs=(rules.spec(["batch", "length", "vocab"]), piece),
    )(params, batch, row_B, key)
    return logits_BLV, jax.tree.map(
        lambda s: s.reshape(s.shape[0], -1, *s.shape[3:]), sums
    )


def layer(
    w: Any,
    x_BLM: jax.Array,
    routed: Routed,
    key: jax.Array | None,
    number: jax.Array | int,
    s: SparseSettings,
    execution: Execution,
) -> tuple[jax.Array, RouterSums]:
    """Sends every token through the experts that its router picks.

    Args:
        w: weights, as `sparse.specs` describes.
        x_BLM: activations, normalised.
        routed: their mask, rows and ids.
        key: PRNG key of this layer and step; None outside training.
        number: the layer's number, for hash routing.
        s: record of the layer.
        execution: transport, row budget and mesh.
    Returns:
        y_BLM, zero for dropped tokens but for what a shared expert adds, and the
        router's sums per group.
    """
    specs = sparse.specs(s, x_BLM.shape[-1])
    piece, by_row = rules.spec(["batch", "piece"]), rules.spec(["batch"])

    def on_device(w: Any, x_BLM: jax.Array, routed: Routed, key: Any, n: Any) -> Any:
        w = gather_weights(w, specs, execution)
        y_BLM, sums = sparse.sparse_layer(w, x_BLM, routed, key, n, s, execution)
        blocks = len(x_BLM) // s.router.group_rows
        sums = dataclasses.replace(sums, needed_1EH=None)
        return y_BLM, jax.tree.map(
            lambda sum_G: sum_G.reshape(blocks, -1, *sum_G.shape[1:]), sums
        )

    y_BLM, sums = execution.grid.run(
        on_device,
        in_specs=(
            rules.specs(specs, parameters.axes(specs), execution.grid.table),
            piece,
            Routed(mask_BL=piece, id_BL=piece, row_B=by_row),  # type: ignore[arg-type]
            PartitionSpec(),
            PartitionSpec(),
        ),
        out_specs=(piece, piece),
    )(w, x_BLM, routed, key, jnp.asarray(number))
    return y_BLM, jax.tree.map(
        lambda sum_BG: sum_BG.reshape(-1, *sum_BG.shape[2:]), sums
    )
