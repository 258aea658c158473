"""Scoring a batch, and the learner whose experts always have room."""

import dataclasses
from typing import Any

import jax

from moe.model.transformer import Batch
from moe.training import losses
from moe.training.train_step import Learner, batch_sums


def in_rounds(learner: Learner) -> Learner:
    """Returns the learner whose steps always fit, in rounds of the row budget."""
    execution = dataclasses.replace(learner.model.execution, in_rounds=True)
    model = dataclasses.replace(learner.model, execution=execution)
    return dataclasses.replace(learner, model=model)


def eval_step(
    params: Any, batch: Batch, learner: Learner
) -> tuple[losses.Sums, jax.Array]:
    """Scores one batch: nothing is drawn, and by default nothing is dropped.

    It is computed in the microbatches of training, so that it needs no more memory
    than a step, and in rounds, so that whatever comes finds room.

    Returns:
        The sums of the batch, and nats_BL; see `batch_sums`.
    """
    return batch_sums(params, batch, None, in_rounds(learner))
