"""One step, and one evaluation, on one mesh: everything that must not depend on it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.run.assemble import Run, assemble
from moe import architecture
from moe.routing.assignment import Trace
from moe.testing.whole_arrays import forward
from moe.training import new_state
from moe.training.scoring import eval_step
from moe.training.train_state import TrainState
from moe.training.train_step import Learner, train_step
from partitioning import rules

# Of a step of gradient descent: its clipped gradient is half as long as the gradient,
# so that clipping by another norm shows, and it moves parameters by a tenth.
_CLIPPED, _MOVED = 0.5, 0.1


class Start(NamedTuple):
    """Where every mesh starts: in host memory, the same for all.

    Attributes:
        params: drawn once.
        opt_state: state of the run's own optimizer before the first step.
        clip: norm that the step of gradient descent clips to.
        rate: its learning rate.
    """

    params: Any
    opt_state: Any
    clip: Any
    rate: Any


class Recorded(NamedTuple):
    """What the recording optimizer keeps as its state."""

    own: Any
    gradient: Any
    descended: Any
    clip: Any
    rate: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """What a train step gave.

    Attributes:
        metrics: by name.
        gradient: derivative of the loss by each parameter, summed over the devices.
        descended: parameters after clipping and a step of gradient descent.
        params: parameters after the run's own optimizer.
    """

    metrics: dict[str, np.ndarray]
    gradient: Any
    descended: Any
    params: Any


@dataclasses.dataclass(frozen=True)
class Decisions:
    """Logits of the model and what its routers did.

    Attributes:
        logits_BLV: the model's outputs at every position.
        routers: traces of each sparse sublayer, whose arrays lead with layers and
            groups; empty in a dense model.
    """

    logits_BLV: np.ndarray
    routers: tuple[Trace, ...]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A scored batch: its sums as a flat dict, and the nats of each target."""

    sums: dict[str, np.ndarray]
    nats_BL: np.ndarray


class Bench:
    """A configuration on one mesh, ready to be measured.

    Args:
        config: where the settings come from, for messages.
        settings: small ones.
    """

    def __init__(self, config: ResolvedConfig, settings: Settings) -> None:
        shrunk = dataclasses.replace(config, settings=settings)
        devices = jax.devices()[: settings.mesh.num_devices]
        self.run: Run = assemble(shrunk, devices)
        self._replicated = rules.replicated(self.run.mesh)

    def start(self, params: Any) -> Start:
        """The own optimizer's state before the first step, and placeholders."""
        init = jax.jit(self.run.learner.optimizer.init)
        one = np.ones((), np.float32)
        return Start(params, jax.device_get(init(params)), one, one)

    def step(self, start: Start, batch: dict[str, np.ndarray]) -> Step:
        """Takes one real train step, with an optimizer that records."""
        run, settings = self.run, self.run.settings
        optimizer = recording(run.learner.optimizer)
        shapes = new_state.abstract(
            settings.layers, settings.execution.param_dtype, optimizer
        )
        axes = new_state.logical_axes(shapes, settings.layers)
        places = new_state.shardings(shapes, axes, run.mesh, settings.partition)
        learner = _with_optimizer(run.learner, optimizer, places)
        zero = np.zeros((), np.int32)
        state = TrainState(
            zero,
            zero,
            zero,
            zero,
            start.params,
            Recorded(
                start.opt_state, start.params, start.params, start.clip, start.rate
            ),
        )
        compiled = jax.jit(
            functools.partial(train_step, learner=learner),
            in_shardings=(places, run.batch_shardings, self._replicated),
            out_shardings=(places, self._replicated),
        )
        with jax.default_matmul_precision("highest"):
            after, metrics = compiled(state, batch, zero)
        after, metrics = jax.device_get((after, metrics))
        if "router/load" in metrics:  # without the experts that a layer has not
            experts = architecture.experts_of(settings.model)
            rows = zip(metrics["router/load"], experts, strict=True)
            metrics["router/load"] = np.concatenate([row[:n] for row, n in rows])
        kept: Recorded = after.opt_state
        return Step(metrics, kept.gradient, kept.descended, after.params)

    def decisions(self, start: Start, batch: dict[str, np.ndarray]) -> Decisions:
        """Runs the same step's forward pass, and keeps what routers decided."""
        seed, model = self.run.settings.train.seed, self.run.learner.model
        execution = dataclasses.replace(model.execution, traces_routers=True)
        model = dataclasses.replace(model, execution=execution)

        def decide(params: Any, batch: Any) -> Any:
            rows = len(batch[f"{model.layers.scored}_target_tokens"])
            row_B = jnp.arange(rows, dtype=jnp.int32)
            _, steps_key = jax.random.split(jax.random.key(seed))
            key = jax.random.fold_in(steps_key, 0)
            logits_BLV, sums = forward(model, params, batch, row_B, key)
            return logits_BLV, tuple(each.trace for each in sums)

        return Decisions(*self._compute(decide, start, batch))

    def evaluation(self, start: Start, batch: dict[str, np.ndarray]) -> Evaluation:
        """Scores the batch as held-out data are scored."""
        score = functools.partial(eval_step, learner=self.run.learner)
        sums, nats_BL = self._compute(score, start, batch)
        named = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(sums)
        }
        return Evaluation(named, nats_BL)

    def _compute(self, function: Any, start: Start, batch: Any) -> Any:
        """Compiles a function of parameters and batch as a run places them."""
        compiled = jax.jit(
            function,
            in_shardings=(self.run.shardings.params, self.run.batch_shardings),
            out_shardings=self._replicated,
        )
        with jax.default_matmul_precision("highest"):
            return jax.device_get(compiled(start.params, batch))


def recording(own: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps the run's optimizer; its state holds the gradient, and a plain step."""

    def init(params: Any) -> Recorded:
        one = jnp.ones(())
        return Recorded(own.init(params), params, params, one, one)

    def update(gradient: Any, state: Any, params: Any) -> tuple[Any, Recorded]:
        updates, own_state = own.update(gradient, state.own, params)
        clip = optax.clip_by_global_norm(state.clip)
        clipped, _ = clip.update(gradient, clip.init(params))
        descended = jax.tree.map(lambda p, g: p - state.rate * g, params, clipped)
        kept = Recorded(own_state, gradient, descended, state.clip, state.rate)
        return updates, kept

    return optax.GradientTransformation(init, update)


def calibrated(start: Start, step: Step) -> tuple[Start, Step]:
    """Sets clip and rate by a first step, and computes what they make of it.

    The reference's own step of gradient descent is plain arithmetic in float64.
    """
    squares = [np.sum(np.square(g, dtype=np.float64)) for g in _leaves(step.gradient)]
    norm = float(np.sqrt(np.sum(squares)))
    size = [np.sum(np.square(p, dtype=np.float64)) for p in _leaves(start.params)]
    clip = _CLIPPED * norm
    rate = _MOVED * float(np.sqrt(np.sum(size))) / clip
    descended = jax.tree.map(
        lambda p, g: p - rate * _CLIPPED * g.astype(np.float64),
        start.params,
        step.gradient,
    )
    known = start._replace(clip=np.float32(clip), rate=np.float32(rate))
    return known, dataclasses.replace(step, descended=descended)


def _with_optimizer(
    learner: Learner, optimizer: optax.GradientTransformation, places: TrainState
) -> Learner:
    """The run's learner with another optimizer, whose state is placed as it says."""
    changed: dict[str, Any] = {"optimizer": optimizer}
    if learner.opt_shardings is not None:
        changed["opt_shardings"] = places.opt_state
    return dataclasses.replace(learner, **changed)


def _leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
