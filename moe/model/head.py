"""From activations to what losses need of logits, piece by piece of the vocabulary.

The projection may be cut twice: the vocabulary over `model`, the width over the axes of
full sharding. It is never whole.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe.model import norms
from moe.model.execution import Execution
from moe.model.feed_forward.dense import activate
from moe.model.products import gather, product
from moe.settings import EmbeddingSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetScores:
    """What the losses need of the logits.

    Attributes:
        log_z_BL: logarithm of the softmax's normaliser.
        target_logit_BL: logit of the target.
        likeliest_BL: int32, id of the largest logit, the first of equals.
        logit_sum_BL: sum of all logits; None unless it was asked for.
    """

    log_z_BL: jax.Array
    target_logit_BL: jax.Array
    likeliest_BL: jax.Array
    logit_sum_BL: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """This device's part of the output projection.

    Attributes:
        matrix_mv: the matrix.
        bias_v: bias of the logits; None without.
        scale: factor of the logits.
        cap: bound of the logits; 0 sets none.
    """

    matrix_mv: jax.Array
    bias_v: jax.Array | None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    cap: float = dataclasses.field(default=0.0, metadata={"static": True})


def score_targets(
    head: Head,
    x_BLM: jax.Array,
    target_BL: jax.Array,
    execution: Execution,
    *,
    with_sum: bool = False,
) -> TargetScores:
    """Forms logits, piece by piece of the vocabulary, and keeps what losses need.

    Args:
        head: this device's part of the output projection.
        x_BLM: normalised activations, the same on all of `model`.
        target_BL: int32.
        execution: pieces of the vocabulary, types, and the mesh.
        with_sum: whether all logits are added up too.
    """
    grid, chunks = execution.grid, execution.settings.vocab_chunks
    width = head.matrix_mv.shape[1] // chunks
    none = jnp.iinfo(jnp.int32).max
    first = grid.index("model") * head.matrix_mv.shape[1]

    def one(head: Head, chunk: jax.Array | int) -> tuple[jax.Array, ...]:
        logits_BLV = logits_of(head, x_BLM, execution)
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
            *((jnp.sum(logits_BLV, axis=-1),) if with_sum else ()),
        )

    policies = jax.checkpoint_policies
    if chunks > 1:
        one = jax.checkpoint(one, prevent_cse=False)
    elif grid.size(*grid.table["embed"]) > 1:  # keep no whole head
        policy = policies.dots_with_no_batch_dims_saveable
        one = jax.checkpoint(one, policy=policy, prevent_cse=False)
    if chunks == 1:
        parts = tuple(x[None] for x in one(head, 0))
    else:
        pieces = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], chunks, width), -2, 0), head
        )
        _, parts = jax.lax.scan(
            lambda _, scanned: (None, one(*scanned)),
            None,
            (pieces, jnp.arange(chunks)),
        )
    log_z_ZBL, target_logit_ZBL, most_ZBL, id_ZBL, *more = parts
    log_z_BL = jax.nn.logsumexp(log_z_ZBL, axis=0)
    target_logit_BL = jnp.sum(target_logit_ZBL, axis=0)
    most_BL = jnp.max(most_ZBL, axis=0)
    is_most_ZBL = most_ZBL == most_BL
    id_BL = jnp.min(jnp.where(is_most_ZBL, id_ZBL, none), axis=0)
    if grid.size("model") > 1:
        top_BL = grid.max(log_z_BL, ["model"])
        sum_BL = grid.sum(jnp.exp(log_z_BL - top_BL), ["model"])
        log_z_BL = top_BL + jnp.log(sum_BL)
        target_logit_BL = grid.sum(target_logit_BL, ["model"])
        is_most_BL = most_BL == grid.max(most_BL, ["model"])
        id_BL = -grid.max(-jnp.where(is_most_BL, id_BL, none), ["model"])
    sums = [grid.sum(jnp.sum(sum_ZBL, axis=0), ["model"]) for sum_ZBL in more]
    return TargetScores(log_z_BL, target_logit_BL, id_BL, *sums)


def logits_of(head: Head, x_BLM: jax.Array, execution: Execution) -> jax.Array:
    """Projects to logits_BLV, in float32, of this device's part of the vocabulary.

    With a cap they are cap·tanh(logit / cap) (Gemma 2, arXiv:2408.00118, section 2).
    """
    matrix_Mv = _whole(head.matrix_mv, execution)
    logits_BLV = product(x_BLM, matrix_Mv, head.bias_v, result=jnp.float32)
    if head.scale != 1:
        logits_BLV *= head.scale
    return head.cap * jnp.tanh(logits_BLV / head.cap) if head.cap else logits_BLV


def projection(params: Any, s: EmbeddingSettings) -> Head:
    """Returns this device's part of the output projection, [M, V], and its bias."""
    matrix_mv = params["embedding"].T if s.tied else params["head"]
    bias = params.get("output_bias")
    return Head(matrix_mv, bias, cap=s.logit_cap, scale=s.logit_scale)


def transform(
    w: Any, x_BLM: jax.Array, s: EmbeddingSettings, execution: Execution
) -> jax.Array:
    """Applies a dense layer, its activation and a norm (BERT, arXiv:1810.04805)."""
    y_BLM = product(x_BLM, _whole(w["kernel"], execution), w["bias"])
    return norms.normalise(w["norm"], activate(y_BLM, s.transform), s.output_norm)


def _whole(matrix_mX: jax.Array, execution: Execution) -> jax.Array:
    """Gathers a matrix that is fully sharded along its inputs."""
    grid, settings = execution.grid, execution.settings
    axes = grid.table["embed"]
    if grid.size(*axes) == 1:
        return matrix_mX
    return gather(matrix_mX, grid, axes, 0, settings.dtype, settings.reduce_dtype)
