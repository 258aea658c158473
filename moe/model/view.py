"""What a stack is told of its tokens, once per pass."""

import dataclasses

import jax
import jax.numpy as jnp

from moe.model.attention.mask import Who
from moe.model.execution import Execution
from partitioning.settings import BATCH_AXES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """Tokens as they come to a stack, this device's cut of each row.

    Attributes:
        id_BL: int32, tokens.
        position_BL: int32, position of each in its segment.
        segment_BL: int32, segment of each; 0 is padding.
        prefix_BL: int32, above 0 for tokens of their segment's prefix, which also see
            those of the prefix that follow (arXiv:1910.10683, section 3.2.1); None
            without.
        row_B: int32, global row number of each sequence in its batch; names its random
            draws, wherever they are made.
        type_BL: int32, token types; None: all 0.
        image_BN: uint8, the image that the first tokens stand for; None without.
    """

    id_BL: jax.Array
    position_BL: jax.Array
    segment_BL: jax.Array
    prefix_BL: jax.Array | None
    row_B: jax.Array
    type_BL: jax.Array | None = None
    image_BN: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Source:
    """What a decoder sees of the encoder.

    Attributes:
        keys: who its tokens are, as `View.keys`.
        x_BTM: its output, this device's cut of each row but the same on all of `model`;
            None once it is remembered.
    """

    keys: Who
    x_BTM: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What the sublayers of a pass need to know, in all layers.

    Attributes:
        queries: who the tokens are that ask, this device's cut of each row.
        keys: who the tokens are that are asked: the same if a ring brings the keys of
            other cuts, else the whole row, or all that a memory has room for.
        position_BL: positions of those that ask, in their segments.
        routed: what routers are told of this device's pieces of its sequences.
        start: int32 scalar, tokens already in memory; None without memory.
        distance_table: bias by distance that layers share, [buckets, N]; None without.
        source: the encoder's tokens; None without.
        type_BL: types of those that ask; None: all 0.
        image_BN: image of each row, whose patches are its first tokens; None without.
    """

    queries: Who
    keys: Who
    position_BL: jax.Array
    routed: "Routed"
    start: jax.Array | None = None
    distance_table: jax.Array | None = None
    source: Source | None = None
    type_BL: jax.Array | None = None
    image_BN: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a sparse layer is told of its tokens beside their activations.

    Attributes:
        mask_BL: True for real tokens.
        id_BL: int32, for hash routing.
        row_B: int32, global row number of each sequence; names its groups.
    """

    mask_BL: jax.Array
    id_BL: jax.Array
    row_B: jax.Array


def of_stream(
    stream: Stream,
    distance_table: jax.Array | None,
    execution: Execution,
    source: Source | None = None,
) -> View:
    """Looks at whole sequences, in training and scoring."""
    grid, whole = execution.grid, execution.tokens_replicated
    length = stream.segment_BL.shape[1]
    first = 0 if whole else grid.index("context") * length
    place_L = first + jnp.arange(length, dtype=jnp.int32)
    queries = keys = Who(place_L, stream.segment_BL, stream.prefix_BL)
    cut = not whole and grid.size("context") > 1
    if cut and grid.partition.context_attention == "all_gather":
        segment_BT, prefix_BT = jax.tree.map(
            lambda x_BL: grid.gather(x_BL, ["context"], 1),
            (stream.segment_BL, stream.prefix_BL),
        )
        place_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
        keys = Who(place_T, segment_BT, prefix_BT)
    cuts = [] if whole else ["model"]
    return View(
        queries,
        keys,
        stream.position_BL,
        Routed(
            mask_BL=grid.piece(stream.segment_BL > 0, cuts, 1),
            id_BL=grid.piece(stream.id_BL, cuts, 1),
            row_B=stream.row_B,
        ),
        distance_table=distance_table,
        source=source,
        type_BL=stream.type_BL,
        image_BN=stream.image_BN,
    )


def into_memory(
    id_BL: jax.Array,
    mask_BL: jax.Array,
    start: jax.Array,
    first_B: jax.Array,
    room: int,
    distance_table: jax.Array | None,
    execution: Execution,
    source: Source | None = None,
    image_BN: jax.Array | None = None,
    *,
    bidirectional: bool,
    prefix_tokens: int = 0,
) -> View:
    """Looks from L new tokens, at `start` and on, to all that came before them.

    Args:
        id_BL: the new tokens.
        mask_BL: False for padding, which takes no slot of an expert.
        start: int32 scalar, tokens already in memory.
        first_B: int32, place of each row's first token. What is before it is padding
            and never seen; positions count from it.
        room: T, tokens that memory has room for.
        distance_table: bias by distance that layers share.
        execution: the mesh, which cuts no sequence.
        source: the encoder's tokens; None without.
        image_BN: image of each row, if its patches are among the new tokens.
        bidirectional: whether the new tokens are a prefix, and see one another whole.
        prefix_tokens: those of each row's first that are, if not all.
    """
    B, L = id_BL.shape
    place_L = start + jnp.arange(L, dtype=jnp.int32)
    place_T = jnp.arange(room, dtype=jnp.int32)
    inside_BT = (place_T >= first_B[:, None]) & (place_T < start + L)

    def prefix(place_L: jax.Array) -> jax.Array | None:
        new_BL = jnp.broadcast_to(place_L >= start, (B, len(place_L)))
        if prefix_tokens:
            new_BL &= place_L < first_B[:, None] + prefix_tokens
        return new_BL.astype(jnp.int32) if bidirectional else None

    # Padding before a row's first token sees nothing, and is seen by none.
    return View(
        queries=Who(place_L, jnp.ones_like(id_BL), prefix(place_L)),
        keys=Who(place_T, inside_BT.astype(jnp.int32), prefix(place_T)),
        position_BL=place_L - first_B[:, None],
        routed=Routed(
            mask_BL=mask_BL,
            id_BL=id_BL,
            row_B=execution.grid.index(*BATCH_AXES) * B + jnp.arange(B),
        ),
        start=start,
        distance_table=distance_table,
        source=source,
        image_BN=image_BN,
    )
