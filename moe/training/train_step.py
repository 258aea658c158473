"""One step of learning: a pure function of the state and a batch."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from moe.model import multi_token, transformer
from moe.model.attention.attend import LargestLogits
from moe.model.block import Counted
from moe.model.head import projection, score_targets
from moe.model.transformer import Batch, Model
from moe.routing.assignment import RouterSums
from moe.settings import LossSettings
from moe.training import ledger, losses, qk_clip
from moe.training.precision import MasterState, apply_updates
from moe.training.selection_bias import move_selection_biases
from moe.training.train_state import TrainState
from moe.training.trained import joined
from partitioning import rules

_ROUNDING = 2**31 - 1  # no layer has this number, by which the other draws are keyed


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a step needs beside state and batch; static under `jit`.

    Attributes:
        model: the model, without its parameters.
        optimizer: from `make_optimizer`.
        schedule: the learning rate it uses, for the log.
        loss: weights of the losses.
        microbatches: pieces the batch is computed in.
        seed: PRNG seed for every random draw.
        rounding: how updates reach the parameters.
        trained_of: what is trained of a tree of parameters, None in place of all else;
            None where all are.
        qk_clip: bound of the logits of attention; 0 sets none.
        opt_shardings: where the optimizer's state belongs on the devices, if it is kept
            on their hosts between steps; else None.
    """

    model: Model
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    loss: LossSettings
    microbatches: int
    seed: int
    rounding: str = "nearest"
    trained_of: Callable[[Any], Any] | None = None
    qk_clip: float = 0.0
    opt_shardings: Any = None


def train_step(
    state: TrainState,
    batch: Batch,
    batch_index: jax.Array,
    loss_limit: jax.Array | None = None,
    *,
    learner: Learner,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learns from one batch.

    Steps may be launched ahead of their predecessors' metrics, since a step that
    cannot be taken returns the state as it was: one whose batch is not the state's
    next, and one whose experts got more rows than their budget. The caller then takes
    the latter again with `scoring.in_rounds(learner)`, and all those after it.

    A step whose loss or gradient is not finite, or whose loss is above a limit, leaves
    parameters and optimizer as they were; it is counted, and its batch is passed over.

    Args:
        state: before the step; donated by the caller's `jit`.
        batch: SeqIO's decoder features, each [B, L].
        batch_index: int32 scalar, which batch it is.
        loss_limit: float32 scalar, largest "loss/total" that is learnt from; None for
            no limit.
        learner: static.
    Returns:
        The state after the step, and metrics named `area/quantity_unit`;
        `state/taken` is 0 for a step that could not be taken.
    """
    _, steps_key = jax.random.split(jax.random.key(learner.seed))  # the other: weights
    key, layers = jax.random.fold_in(steps_key, state.step), learner.model.layers

    trained = state.params
    if learner.trained_of is not None:
        trained = learner.trained_of(state.params)

    def whole(params: Any) -> Any:
        return params if learner.trained_of is None else joined(params, state.params)

    def objective(params: Any) -> tuple[jax.Array, tuple[losses.Sums, dict]]:
        sums, _ = batch_sums(whole(params), batch, key, learner)
        value, metrics = losses.total(sums, learner.loss, layers.sparse_order)
        return value, (sums, metrics)

    gradients, (sums, metrics) = jax.grad(objective, has_aux=True)(trained)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    gradient_norm = optax.tree.norm(gradients)
    old_opt_state = state.opt_state
    if learner.opt_shardings is not None:
        old_opt_state = jax.device_put(old_opt_state, learner.opt_shardings)
    updates, opt_state = learner.optimizer.update(gradients, old_opt_state, trained)
    params = apply_updates(
        trained,
        updates,
        opt_state,
        learner.rounding,
        jax.random.fold_in(key, _ROUNDING),
    )
    taken = batch_index == state.data_index
    if sums.router:
        taken &= ledger.excess_rows(sums.routers) == 0
        params = move_selection_biases(params, sums.routers, layers)
        if isinstance(opt_state, MasterState):  # the next update starts from it
            master = move_selection_biases(opt_state.master, sums.routers, layers)
            opt_state = opt_state._replace(master=master)
    if sums.logits:
        metrics |= qk_clip.metrics(sums.logits, learner.qk_clip)
        params, opt_state = _clipped(params, opt_state, sums.logits, learner)
    finite = jnp.isfinite(gradient_norm) & jnp.isfinite(metrics["loss/total"])
    if loss_limit is not None:
        finite &= metrics["loss/total"] <= loss_limit
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(taken & finite, new, old),
        (params, opt_state),
        (trained, old_opt_state),
    )
    params = whole(params)
    one = taken.astype(jnp.int32)
    skipped = (taken & ~finite).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + one,
        data_index=state.data_index + one,
        skipped_steps=state.skipped_steps + skipped,
        skipped_in_a_row=jnp.where(
            taken, (state.skipped_in_a_row + 1) * skipped, state.skipped_in_a_row
        ),
        params=params,
        opt_state=opt_state,
    )
    metrics |= {
        "loss/target_tokens": sums.weight,
        "optimizer/gradient_norm": gradient_norm,
        "optimizer/parameter_norm": optax.tree.norm(params),
        # Skipped steps made no update, and the schedule counts updates.
        "optimizer/learning_rate": learner.schedule(state.step - state.skipped_steps),
        "state/taken": one,
        "state/skipped_steps": new_state.skipped_steps,
        "state/skipped_in_a_row": new_state.skipped_in_a_row,
    }
    return new_state, metrics


def _apart(
    counted: Sequence[Counted],
) -> tuple[tuple[RouterSums, ...], tuple[LargestLogits, ...]]:
    """Parts what sublayers return by what it is, each in its order."""
    routers = tuple(each for each in counted if isinstance(each, RouterSums))
    logits = tuple(each for each in counted if isinstance(each, LargestLogits))
    return routers, logits


def _clipped(
    params: Any, opt_state: Any, logits: Any, learner: Learner
) -> tuple[Any, Any]:
    """Bounds the logits of attention, of a master copy too."""
    given = logits, learner.model.layers, learner.qk_clip
    params = qk_clip.clip(params, *given)
    if isinstance(opt_state, MasterState):
        opt_state = opt_state._replace(master=qk_clip.clip(opt_state.master, *given))
    return params, opt_state


def batch_sums(
    params: Any, batch: Batch, key: jax.Array | None, learner: Learner
) -> tuple[losses.Sums, jax.Array]:
    """Sums up the batch, microbatch by microbatch, in training and outside it.

    The losses are formed from the result and differentiated through the scan, so any
    loss has its exact gradient whatever the number of microbatches. Each microbatch
    keeps only its inputs and is recomputed on the way back: one more forward pass.

    Piece a is the a-th block of each device's own rows, so that no row moves, and
    gradients of parameters that devices share are summed once, after the last.

    Args:
        params: parameters, as `inventory.draw` returns them.
        batch: SeqIO's decoder features, each [B, L].
        key: PRNG key of the step; None outside training, where nothing is drawn.
        learner: static; its optimizer is not used.
    Returns:
        The sums of the batch, and nats_BL: float32, the cross-entropy of each target,
        0 where its weight is 0, without a gradient. Hosts add it up by document, in
        float64.
    """
    model, A, scored = learner.model, learner.microbatches, learner.model.layers.scored
    if learner.qk_clip and key is not None:
        measuring = dataclasses.replace(model.execution, measures_logits=True)
        model = dataclasses.replace(model, execution=measuring)
    ahead = model.layers.ahead if key is not None else None
    if ahead is not None:
        batch = batch | multi_token.features(batch, ahead)
    one = functools.partial(
        _sums_of_piece, model=model, loss=learner.loss, ahead=ahead is not None
    )

    def on_device(params: Any, batch: Batch, row_B: jax.Array, key: Any) -> Any:
        if A == 1:
            sums, nats_BL = one(params, batch, row_B, key)
            return losses.over_devices(sums, model.grid), nats_BL
        pieces = jax.tree.map(
            lambda x: x.reshape(A, x.shape[0] // A, *x.shape[1:]), (batch, row_B)
        )
        again = jax.checkpoint(one, prevent_cse=False)

        def add(carried: losses.Sums, piece: Any) -> tuple[losses.Sums, jax.Array]:
            sums, nats_BL = again(params, *piece, key)
            return losses.merged(carried, sums), nats_BL

        first = jax.tree.map(lambda x: x[0], pieces)
        shapes, _ = jax.eval_shape(one, params, *first, key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        none = jax.tree.map(lambda logit: logit - jnp.inf, zeros.logits)
        zeros = dataclasses.replace(zeros, logits=none)
        sums, nats_ABL = jax.lax.scan(add, zeros, pieces)
        nats_BL = nats_ABL.reshape(-1, nats_ABL.shape[-1])
        return losses.over_devices(sums, model.grid), nats_BL

    by_row = rules.spec(["batch"])
    num_rows = batch[f"{scored}_target_tokens"].shape[0]
    return model.grid.run(
        on_device,
        in_specs=(
            model.partition_specs,
            transformer.batch_spec(batch),
            by_row,
            PartitionSpec(),
        ),
        out_specs=(PartitionSpec(), rules.spec(["batch", "length"])),
    )(params, batch, jnp.arange(num_rows, dtype=jnp.int32), key)


def _sums_of_piece(
    params: Any,
    piece: Batch,
    row_B: jax.Array,
    key: jax.Array | None,
    *,
    model: Model,
    loss: LossSettings,
    ahead: bool,
) -> tuple[losses.Sums, jax.Array]:
    """Sums up one device's cut of a microbatch; returns nats_BL too."""
    scored = model.layers.scored
    x_BLM, counted = transformer.hidden(model, params, piece, row_B, key)
    router, logits = _apart(counted)
    target_BL = piece[f"{scored}_target_tokens"]
    weight_BL = piece[f"{scored}_loss_weights"]
    head = projection(params, model.layers.embedding)
    scores = score_targets(
        *(head, x_BLM, target_BL, model.execution),
        with_sum=loss.label_smoothing > 0,
    )
    sparse = [place.sublayer.settings for place in model.layers.sparse()]
    sums = losses.sums(
        scores,
        target_BL,
        weight_BL,
        router,
        loss,
        _adds_up(model),
        vocab_size=model.layers.embedding.vocab_size,
        group_rows=[s.router.group_rows for s in sparse],
    )
    if ahead:
        more, logits_ahead = _sums_ahead(
            params, x_BLM, piece, row_B, key, model=model, loss=loss
        )
        sums = dataclasses.replace(sums, ahead=more)
        logits += logits_ahead
    sums = dataclasses.replace(sums, logits=logits)
    nats_BL = jax.lax.stop_gradient(scores.log_z_BL - scores.target_logit_BL)
    return sums, jnp.where(weight_BL > 0, nats_BL, 0)


def _sums_ahead(
    params: Any,
    x_BLM: jax.Array,
    piece: Batch,
    row_B: jax.Array,
    key: Any,
    *,
    model: Model,
    loss: LossSettings,
) -> tuple[losses.AheadSums, tuple[LargestLogits, ...]]:
    """Sums up what is predicted of tokens after the next; see `multi_token`."""
    layers, execution = model.layers, model.execution
    seen = transformer.view_of(model, layers.scored, params, piece, row_B)
    given = params, x_BLM, piece, seen, key, layers, execution
    outputs, counted = multi_token.hidden(*given)
    router, logits = _apart(counted)
    head = projection(params, layers.embedding)
    names = [f"ahead_{k}" for k in range(1, len(outputs) + 1)]
    sparse = [place.sublayer.settings for place in layers.sparse_ahead()]
    sums = losses.ahead_sums(
        [
            score_targets(head, x, piece[f"{name}_target_tokens"], execution)
            for name, x in zip(names, outputs, strict=True)
        ],
        [piece[f"{name}_loss_weights"] for name in names],
        router,
        loss,
        _adds_up(model),
        group_rows=[s.router.group_rows for s in sparse],
    )
    return sums, logits


def _adds_up(model: Model) -> Callable[[jax.Array], jax.Array]:
    """Returns what adds up over the devices that a sequence is cut over."""
    return functools.partial(model.grid.sum, axes=("context", "model"))
