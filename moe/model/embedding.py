"""From tokens, and patches of images, to activations.

The table may be cut twice: the vocabulary over `model`, the width over the axes of full
sharding. It is never whole: tokens travel to its columns. In names here A is the
devices that the width is cut over.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe.model import norms
from moe.model.execution import Execution
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product
from moe.model.view import View
from moe.settings import EmbeddingSettings

# Of learned positions, beside tokens of unit variance: GPT-2 and GPT-3 draw positions
# with 0.01 and tokens with 0.02.
POSITION_STDDEV = 0.5


def specs(s: EmbeddingSettings) -> dict[str, Any]:
    """Describes the tables of tokens, maybe of positions and types, and the output."""
    V, M = s.vocab_size, s.width
    axes: tuple[str | None, ...]
    found: dict[str, Any] = {
        "embedding": Spec((V, M), ("vocab", "embed"), (0,), (1,), stddev=M**-0.5)
    }
    if s.max_positions:
        axes = ("position", "norm")
        shape = (s.max_positions, M)
        found["positions"] = Spec(shape, axes, (), (0, 1), stddev=POSITION_STDDEV)
    if s.token_types:
        axes, shape = (None, "norm"), (s.token_types, M)
        found["token_types"] = Spec(shape, axes, (), (0, 1), stddev=POSITION_STDDEV)
    if s.image_size:
        found["patches"] = {
            "kernel": matrix((s.patch_values, M), (None, "norm"), (0,), (1,)),
            "bias": vector((M,), ("norm",)),
        }
    if s.norm is not None:
        found["embedding_norm"] = norms.specs(s.norm, M)
    if not s.tied:
        found["head"] = matrix((M, V), ("embed", "vocab"), (0,), (1,), s.init_scale)
    if s.transform:
        found["transform"] = {
            "kernel": matrix((M, M), ("embed", "norm"), (0,), (1,), s.init_scale),
            "bias": vector((M,), ("norm",)),
            "norm": norms.specs(s.output_norm, M),
        }
    if s.output_bias:
        found["output_bias"] = vector((V,), ("vocab",))
    return found


def embed(
    params: Any,
    id_BL: jax.Array,
    seen: View,
    s: EmbeddingSettings,
    execution: Execution,
) -> jax.Array:
    """Embeds tokens, maybe adds their positions and types; x_BLM as the stream is cut.

    Where there are images, the first tokens of a row are their patches instead.

    By default scaled to unit variance: beside a smaller residual stream the first
    attention's mean would dominate, all tokens look alike, and the routers send them to
    the same experts. A tied output then starts out predicting its own input.
    """
    position_BL, type_BL = seen.position_BL, seen.type_BL
    x_BLM = look_up(params["embedding"], id_BL, execution) * s.scale
    if seen.image_BN is not None:
        patch_BPM = patches(params["patches"], seen.image_BN, s, execution)
        first_BL = (seen.queries.segment_BL == 1) & (position_BL >= 0)
        is_patch_BL = first_BL & (position_BL < s.num_patches)
        is_patch_BL, patch_BL = map(
            execution.grid.residual,
            (is_patch_BL, jnp.where(is_patch_BL, position_BL, 0)),
        )
        here_BLM = jnp.take_along_axis(patch_BPM, patch_BL[..., None], axis=1)
        x_BLM = jnp.where(is_patch_BL[..., None], here_BLM, x_BLM)
    if s.max_positions:
        # What is before a prompt has none; far outside the table there is no number.
        position_BL = execution.grid.residual(jnp.maximum(position_BL, 0))
        here_BLM = jnp.take(params["positions"], position_BL, axis=0)
        x_BLM += here_BLM.astype(x_BLM.dtype)
    if s.token_types:
        of_each_M = params["token_types"].astype(x_BLM.dtype)
        if type_BL is None:
            x_BLM += of_each_M[0]
        else:
            type_BL = execution.grid.residual(type_BL)
            x_BLM += jnp.take(of_each_M, type_BL, axis=0)
    if s.norm is not None:
        x_BLM = norms.normalise(params["embedding_norm"], x_BLM, s.norm)
    return x_BLM.astype(execution.settings.dtype)


def patches(
    w: Any, image_BN: jax.Array, s: EmbeddingSettings, execution: Execution
) -> jax.Array:
    """Cuts images into patches and projects each (arXiv:2010.11929, eq. 1).

    Args:
        w: kernel and bias of the projection.
        image_BN: uint8, pixels row by row, each with its channels; taken from -1 to 1.
        s: sizes of images and patches.
        execution: type of the product.
    Returns:
        patch_BPM, patches row by row, the same on all devices of a row.
    """
    B, size = len(image_BN), s.patch_size
    side = s.image_size // size
    pixel_BN = (image_BN.astype(jnp.float32) / 127.5 - 1).astype(
        execution.settings.dtype
    )
    shape = (B, side, size, side, size, s.image_channels)
    patch_BP = jnp.transpose(pixel_BN.reshape(shape), (0, 1, 3, 2, 4, 5))
    return product(
        patch_BP.reshape(B, s.num_patches, s.patch_values), w["kernel"], w["bias"]
    )


def look_up(table_vm: jax.Array, id_BL: jax.Array, execution: Execution) -> jax.Array:
    """Embeds tokens.

    Where the width is cut, each device looks up its columns for the tokens of all, and
    an exchange gives each of them its own tokens whole: as many bytes as activations
    have, where gathering the table would move all of it.

    Args:
        table_vm: this device's rows and columns of the embedding.
        id_BL: this device's tokens, the same on all of `model`.
        execution: type of the result, and the mesh.
    Returns:
        x_BLM, cut as the residual stream is.
    """
    grid = execution.grid
    axes = grid.table["embed"]
    id_ABL = grid.gather(id_BL[None], axes, 0)
    row_ABL = id_ABL - grid.index("model") * table_vm.shape[0]
    if grid.size("model") > 1:
        here_ABL = (row_ABL >= 0) & (row_ABL < table_vm.shape[0])
        x_ABLm = jnp.take(table_vm, jnp.where(here_ABL, row_ABL, 0), axis=0)
        x_ABLm = jnp.where(here_ABL[..., None], x_ABLm, 0)
    else:
        x_ABLm = jnp.take(table_vm, row_ABL, axis=0)
    x_ABLm = x_ABLm.astype(execution.settings.dtype)
    if grid.cuts_sequence:
        x_ABLm = grid.scatter_sum(x_ABLm, ["model"], 2)
    else:
        x_ABLm = grid.sum(x_ABLm, ["model"])
    if grid.size(*axes) == 1:
        return x_ABLm[0]
    large = tuple(axis for axis in axes if grid.size(axis) > 1)
    x_1BLM = jax.lax.all_to_all(x_ABLm, large, split_axis=0, concat_axis=3, tiled=True)
    return x_1BLM[0]
