"""A transformer: embedding, one stack of layers or two, and what logits are made of.

The whole pass is one `shard_map` over all mesh axes: what follows is what one device
does, and each collective, forward and backward, is one that is written here.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from moe.layers import Layers
from moe.model import embedding, head, inventory, norms, stack, view
from moe.model.block import Counted
from moe.model.execution import Execution
from moe.model.view import Source, Stream
from partitioning import rules
from partitioning.grid import Grid

# SeqIO's features of each stack, each int32[B, L]; images are uint8[B, N].
Batch = dict[str, jax.Array]

_OTHER_STACK = 2**31 - 2  # no layer has this number, by which the other draws are keyed


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
) -> tuple[jax.Array, tuple[Counted, ...]]:
    """Computes the activations that logits are made of.

    Args:
        model: the static description.
        params: this device's pieces of what `inventory.draw` returns.
        batch: this device's cut of SeqIO's features: for each stack, such as "decoder",
            `decoder_input_tokens`, `decoder_positions`, `decoder_segment_ids`, and
            `decoder_causal_attention` if it has prefixes, 1 on their tokens; and
            `decoder_images`, the pixels of each row's image, row by row.
        row_B: int32, global row number of each sequence; names its random draws.
        key: PRNG key of this step; None outside training, where nothing is drawn and no
            token dropped unless `eval_capacity_factor` says so.
    Returns:
        x_BLM, normalised, of this device's cut of its rows, the same on all of `model`;
        and what sublayers counted, led by their layers, in the order of
        `Layers.places`: sparse ones the sums of their groups, those of attention their
        largest logits, if the pass measures them.
    """
    sums: tuple[Counted, ...] = ()
    source: Source | None = None
    for name in model.layers.stacks:
        seen = view_of(model, name, params, batch, row_B, source)
        given = params, batch[f"{name}_input_tokens"], seen, None, key
        x_BLM, _, more = through_layers(model, name, *given)
        sums += more
        source = Source(seen.keys, x_BLM)
    return x_BLM, sums


def view_of(
    model: Model,
    name: str,
    params: Any,
    batch: Batch,
    row_B: jax.Array,
    source: Source | None = None,
) -> view.View:
    """Says who the tokens of a stack are; arguments as in `hidden`."""
    stream = Stream(
        id_BL=batch[f"{name}_input_tokens"],
        position_BL=batch[f"{name}_positions"],
        segment_BL=batch[f"{name}_segment_ids"],
        prefix_BL=batch.get(f"{name}_causal_attention"),
        row_B=row_B,
        type_BL=batch.get(f"{name}_token_types"),
        image_BN=batch.get(f"{name}_images"),
    )
    distance_table = params[name].get("distance")
    return view.of_stream(stream, distance_table, model.execution, source)


def through_layers(
    model: Model,
    name: str,
    params: Any,
    id_BL: jax.Array,
    seen: view.View,
    memories: stack.Tree | None,
    key: jax.Array | None,
    *,
    last_only: bool = False,
) -> tuple[jax.Array, stack.Tree | None, tuple[Counted, ...]]:
    """Embeds tokens and sends them through a stack: in training, scoring, drawing.

    Args:
        model: the static description.
        name: name of the stack.
        params: this device's pieces.
        id_BL: tokens of this device's rows.
        seen: who they are.
        memories: what is left of the tokens before; None in training and scoring.
        key: PRNG key of the step; None outside training.
        last_only: whether only the last token is wanted.
    Returns:
        x_BLM, normalised; the memories with the new tokens; what `hidden` returns.
    """
    layers, own = model.layers.stacks[name], params[name]
    if key is not None and name != model.layers.scored:  # draws of its own
        key = jax.random.fold_in(key, _OTHER_STACK)
    s, execution = model.layers.embedding, model.execution
    x_BLM = embedding.embed(params, id_BL, seen, s, execution)
    given = seen, memories, key, execution
    x_BLM, memories, sums = stack.run(layers, own, x_BLM, *given)
    x_BLM = x_BLM[:, -1:] if last_only else x_BLM
    if layers.norm is not None:
        x_BLM = norms.normalise(own["norm"], x_BLM, layers.norm)
    if s.transform and name == model.layers.scored:
        x_BLM = head.transform(params["transform"], x_BLM, s, execution)
    return model.grid.enter(x_BLM), memories, sums


def batch_spec(batch: Batch) -> dict[str, PartitionSpec]:
    """How the features of a batch are cut."""
    return {name: rules.spec(feature_axes(name)) for name in batch}


def feature_axes(name: str) -> tuple[str, str | None]:
    """Logical axes of a feature; pixels of an image are of no place in a sequence."""
    return ("batch", None) if name.endswith("_images") else ("batch", "length")
