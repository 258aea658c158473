"""From tokens to activations, and from activations to what the losses need of logits.

Both tables may be cut twice: the vocabulary over `model`, the width over the axes of
full sharding. Neither is ever whole: tokens travel to the columns of the embedding, and
logits are formed piece by piece of the vocabulary. In names here A is the devices that
the width is cut over, and Z the pieces of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.model.weights import gathered
from moe.settings import ModelSettings
from partitioning.grid import Grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What the losses need of the logits.

    Attributes:
        log_z_BL: logarithm of the softmax's normaliser.
        target_logit_BL: logit of the target.
        likeliest_BL: int32, id of the largest logit, the first of equals.
    """

    log_z_BL: jax.Array
    target_logit_BL: jax.Array
    likeliest_BL: jax.Array


def look_up(
    table_vm: jax.Array, id_BL: jax.Array, settings: ModelSettings, grid: Grid
) -> jax.Array:
    """Embeds tokens.

    Where the width is cut, each device looks up its columns for the tokens of all, and
    an exchange gives each of them its own tokens whole: as many bytes as activations
    have, where gathering the table would move all of it.

    Args:
        table_vm: this device's rows and columns of the embedding.
        id_BL: this device's tokens, the same on all of `model`.
        settings: the type of the result.
        grid: the mesh.
    Returns:
        x_BLM, cut as the residual stream is.
    """
    axes = grid.table["embed"]
    id_ABL = grid.gather(id_BL[None], axes, 0)
    row_ABL = id_ABL - grid.index("model") * table_vm.shape[0]
    if grid.size("model") > 1:
        here_ABL = (row_ABL >= 0) & (row_ABL < table_vm.shape[0])
        x_ABLm = jnp.take(table_vm, jnp.where(here_ABL, row_ABL, 0), axis=0)
        x_ABLm = jnp.where(here_ABL[..., None], x_ABLm, 0)
    else:
        x_ABLm = jnp.take(table_vm, row_ABL, axis=0)
    x_ABLm = x_ABLm.astype(settings.dtype)
    if grid.cuts_sequence:
        x_ABLm = grid.scatter_sum(x_ABLm, ["model"], 2)
    else:
        x_ABLm = grid.sum(x_ABLm, ["model"])
    if grid.size(*axes) == 1:
        return x_ABLm[0]
    large = tuple(axis for axis in axes if grid.size(axis) > 1)
    x_1BLM = jax.lax.all_to_all(x_ABLm, large, split_axis=0, concat_axis=3, tiled=True)
    return x_1BLM[0]


def score(
    head_mv: jax.Array,
    x_BLM: jax.Array,
    target_BL: jax.Array,
    settings: ModelSettings,
    grid: Grid,
) -> Scores:
    """Forms logits, piece by piece of the vocabulary, and keeps what losses need.

    Args:
        head_mv: this device's part of the output projection.
        x_BLM: normalised activations, the same on all of `model`.
        target_BL: int32.
        settings: number of pieces.
        grid: the mesh.
    """
    chunks, width = settings.vocab_chunks, head_mv.shape[1] // settings.vocab_chunks
    first = grid.index("model") * head_mv.shape[1]

    def one(head_mv: jax.Array, chunk: jax.Array | int) -> tuple[jax.Array, ...]:
        logits_BLV = logits_of(head_mv, x_BLM, settings, grid)
        id_V = first + chunk * width + jnp.arange(width)
        # A comparison instead of a gather: its transpose is not a scatter over V.
        is_target_BLV = target_BL[..., None] == id_V
        target_logit_BL = jnp.sum(jnp.where(is_target_BLV, logits_BLV, 0.0), axis=-1)
        fixed_BLV = jax.lax.stop_gradient(logits_BLV)
        return (
            jax.nn.logsumexp(logits_BLV, axis=-1),
            target_logit_BL,
            jnp.max(fixed_BLV, axis=-1),
            id_V[0] + jnp.argmax(fixed_BLV, axis=-1),
        )

    policies = jax.checkpoint_policies
    if chunks > 1:
        one = jax.checkpoint(one, prevent_cse=False)
    elif grid.size(*grid.table["embed"]) > 1:  # keep no whole head
        one = jax.checkpoint(one, policy=policies.dots_with_no_batch_dims_saveable)
    if chunks == 1:
        parts = tuple(x[None] for x in one(head_mv, 0))
    else:
        head_Zmv = jnp.moveaxis(head_mv.reshape(-1, chunks, width), 1, 0)
        _, parts = jax.lax.scan(
            lambda _, scanned: (None, one(*scanned)),
            None,
            (head_Zmv, jnp.arange(chunks)),
        )
    log_z_ZBL, target_logit_ZBL, most_ZBL, id_ZBL = parts
    log_z_BL = jax.nn.logsumexp(log_z_ZBL, axis=0)
    target_logit_BL = jnp.sum(target_logit_ZBL, axis=0)
    most_BL = jnp.max(most_ZBL, axis=0)
    is_most_ZBL = most_ZBL == most_BL
    id_BL = jnp.min(jnp.where(is_most_ZBL, id_ZBL, settings.vocab_size), axis=0)
    if grid.size("model") > 1:
        top_BL = grid.max(log_z_BL, ["model"])
        sum_BL = grid.sum(jnp.exp(log_z_BL - top_BL), ["model"])
        log_z_BL = top_BL + jnp.log(sum_BL)
        target_logit_BL = grid.sum(target_logit_BL, ["model"])
        is_most_BL = most_BL == grid.max(most_BL, ["model"])
        id_BL = -grid.max(-jnp.where(is_most_BL, id_BL, settings.vocab_size), ["model"])
    return Scores(log_z_BL, target_logit_BL, id_BL)


def logits_of(
    head_mv: jax.Array, x_BLM: jax.Array, settings: ModelSettings, grid: Grid
) -> jax.Array:
    """Projects to logits_BLV, in float32, of this device's part of the vocabulary."""
    axes = grid.table["embed"]
    if grid.size(*axes) > 1:
        types = settings.dtype, settings.reduce_dtype
        head_Mv = gathered(head_mv, grid, axes, 0, *types)
    else:
        head_Mv = head_mv.astype(x_BLM.dtype)
    return jnp.einsum("BLM,MV->BLV", x_BLM, head_Mv, preferred_element_type=jnp.float32)
