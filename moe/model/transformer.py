"""A decoder-only transformer: embedding, layers, and what logits are made of.

The whole pass is one `shard_map` over all mesh axes: what follows is what one device
does, and each collective, forward and backward, is one that is written here.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from moe.layers import Layers
from moe.model import embedding, inventory, norms, stack, view
from moe.model.execution import Execution
from moe.model.view import Stream
from moe.routing.assignment import RouterSums
from partitioning import rules
from partitioning.grid import Grid

Batch = dict[str, jax.Array]  # SeqIO's decoder features, each [B, L]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its parameters; static under `jit`.

    Attributes:
        layers: what it is.
        execution: how it is computed.
    """

    layers: Layers
    execution: Execution

    @property
    def grid(self) -> Grid:
        """The mesh as one device sees it."""
        return self.execution.grid

    @property
    def specs(self) -> Any:
        """What every parameter is."""
        return inventory.specs(self.layers)

    @property
    def partition_specs(self) -> Any:
        """How every parameter is cut, the same tree as the parameters."""
        table = self.grid.table
        return jax.tree.map(lambda spec: rules.spec(spec.axes, table), self.specs)


def hidden(
    model: Model,
    params: Any,
    batch: Batch,
    row_B: jax.Array,
    key: jax.Array | None,
) -> tuple[jax.Array, tuple[RouterSums, ...]]:
    """Computes the activations that logits are made of.

    Args:
        model: the static description.
        params: this device's pieces of what `inventory.draw` returns.
        batch: this device's cut of `decoder_input_tokens`, `decoder_positions`,
            `decoder_segment_ids`, and `decoder_causal_attention` if it has prefixes, 1
            on their tokens.
        row_B: int32, global row number of each sequence; names its random draws.
        key: PRNG key of this step; None outside training, where nothing is drawn and no
            token dropped unless `eval_capacity_factor` says so.
    Returns:
        x_BLM, normalised, of this device's cut of its rows, the same on all of `model`;
        and of each sparse sublayer the sums of its groups, led by its layers.
    """
    stream = Stream(
        id_BL=batch["decoder_input_tokens"],
        position_BL=batch["decoder_positions"],
        segment_BL=batch["decoder_segment_ids"],
        prefix_BL=batch.get("decoder_causal_attention"),
        row_B=row_B,
    )
    distance_table = params["decoder"].get("distance")
    seen = view.of_stream(stream, distance_table, model.execution)
    x_BLM, _, sums = through_layers(model, params, stream.id_BL, seen, None, key)
    return x_BLM, sums


def through_layers(
    model: Model,
    params: Any,
    id_BL: jax.Array,
    seen: view.View,
    memories: stack.Tree | None,
    key: jax.Array | None,
    *,
    last_only: bool = False,
) -> tuple[jax.Array, stack.Tree | None, tuple[RouterSums, ...]]:
    """Embeds tokens and sends them through all layers: in training, scoring, drawing.

    Args:
        model: the static description.
        params: this device's pieces.
        id_BL: tokens of this device's rows.
        seen: who they are.
        memories: what is left of the tokens before; None in training and scoring.
        key: PRNG key of the step; None outside training.
        last_only: whether only the last token is wanted.
    Returns:
        x_BLM, normalised; the memories with the new tokens; sums as in `hidden`.
    """
    grid, decoder = model.grid, model.layers.decoder
    x_BLM = embedding.embed(
        params, id_BL, seen.position_BL, model.layers.embedding, model.execution
    )
    x_BLM, memories, sums = stack.run(
        decoder, params["decoder"], x_BLM, seen, memories, key, model.execution
    )
    x_BLM = x_BLM[:, -1:] if last_only else x_BLM
    x_BLM = norms.normalise(params["decoder"]["norm"], x_BLM, decoder.norm)
    return grid.enter(x_BLM), memories, sums


def batch_spec(batch: Batch) -> dict[str, PartitionSpec]:
    """How the features of a batch are cut."""
    return dict.fromkeys(batch, rules.spec(["batch", "length"]))
