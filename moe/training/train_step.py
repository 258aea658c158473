"""One step of learning: a pure function of the state and a batch."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe.model import transformer
from moe.model.transformer import Batch, Model
from moe.settings import LossSettings
from moe.training import losses
from moe.training.state import TrainState
from partitioning import rules
from partitioning.settings import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a step needs beside state and batch; static under `jit`.

    Attributes:
        model: the model, without its parameters.
        optimizer: from `make_optimizer`.
        schedule: the learning rate it uses, for the log.
        loss: weights of the losses.
        microbatches: pieces the batch is computed in.
        seed: of every random draw.
    """

    model: Model
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss: LossSettings
    microbatches: int
    seed: int


def train_step(
    state: TrainState, batch: Batch, learner: Learner
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learns from one batch.

    A step whose loss or gradient is not finite leaves parameters and optimizer as
    they were; it is counted, and its batch is passed over.

    Args:
        state: before the step; donated by the caller's `jit`.
        batch: SeqIO's decoder features, each [B, L].
        learner: static.
    Returns:
        The state after the step, and metrics named `area/quantity_unit`.
    """
    key = jax.random.fold_in(jax.random.key(learner.seed), state.step)

    def objective(params: Any) -> tuple[jax.Array, dict]:
        return losses.total(batch_sums(params, batch, key, learner), learner.loss)

    gradients, metrics = jax.grad(objective, has_aux=True)(state.params)
    gradient_norm = optax.tree.norm(gradients)
    updates, opt_state = learner.optimizer.update(
        gradients, state.opt_state, state.params
    )
    finite = jnp.isfinite(gradient_norm) & jnp.isfinite(metrics["loss/total"])
    skipped = 1 - finite.astype(jnp.int32)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    new_state = TrainState(
        step=state.step + 1,
        data_index=state.data_index + 1,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
        params=params,
        opt_state=opt_state,
    )
    metrics |= {
        "optimizer/gradient_norm": gradient_norm,
        "optimizer/parameter_norm": optax.tree.norm(params),
        "optimizer/learning_rate": learner.schedule(state.step),
        "state/skipped_steps": new_state.skipped_steps,
        "state/skipped_in_a_row": new_state.skipped_in_a_row,
    }
    return new_state, metrics


def eval_step(params: Any, batch: Batch, model: Model) -> losses.Sums:
    """Scores one batch: nothing is drawn, and by default nothing is dropped."""
    return _forward_sums(params, batch, _rows(batch), None, model)


def batch_sums(
    params: Any, batch: Batch, key: jax.Array, learner: Learner
) -> losses.Sums:
    """Sums up the batch, microbatch by microbatch.

    The losses are formed from the result and differentiated through the scan, so any
    loss has its exact gradient whatever the number of microbatches. Each microbatch
    keeps only its inputs and is recomputed on the way back: one more forward pass.
    """
    rows = _rows(batch)
    if learner.microbatches == 1:
        return _forward_sums(params, batch, rows, key, learner.model)
    pieces, piece_rows = _split((batch, rows), learner)

    @jax.checkpoint
    def one(params: Any, piece: Batch, piece_rows: jax.Array) -> losses.Sums:
        return _forward_sums(params, piece, piece_rows, key, learner.model)

    def add(carried: losses.Sums, scanned: Any) -> tuple[losses.Sums, None]:
        return jax.tree.map(jnp.add, carried, one(params, *scanned)), None

    shapes = jax.eval_shape(
        one, params, *jax.tree.map(lambda x: x[0], (pieces, piece_rows))
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (pieces, piece_rows))[0]


def _forward_sums(
    params: Any, batch: Batch, rows: jax.Array, key: jax.Array | None, model: Model
) -> losses.Sums:
    logits_BLV, router = transformer.forward(model, params, batch, rows, key)
    return losses.sums(
        logits_BLV,
        batch["decoder_target_tokens"],
        batch["decoder_loss_weights"],
        router,
    )


def _rows(batch: Batch) -> jax.Array:
    """Global row numbers of a whole batch."""
    return jnp.arange(batch["decoder_target_tokens"].shape[0], dtype=jnp.int32)


def _split(tree: Any, learner: Learner) -> Any:
    """Cuts [B, ...] into [A, B/A, ...].

    Piece a is the a-th block of each device's own rows, so that no row moves; a plain
    reshape would exchange rows.
    """
    mesh = learner.model.mesh
    shards = math.prod(mesh.shape[a] for a in BATCH_AXES)

    def cut(x: jax.Array) -> jax.Array:
        A = learner.microbatches
        blocks = x.reshape(shards, A, x.shape[0] // (shards * A), *x.shape[1:])
        pieces = blocks.swapaxes(0, 1).reshape(A, x.shape[0] // A, *x.shape[1:])
        logical = (None, "batch", *(None,) * (x.ndim - 1))
        return jax.lax.with_sharding_constraint(pieces, rules.sharding(mesh, logical))

    return jax.tree.map(cut, tree)
