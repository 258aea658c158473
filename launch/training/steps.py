"""Train steps, launched ahead, and what is seen of each once it is done."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.checkpoints.digest import digests
from launch.checkpoints.names import named_arrays
from launch.training.log import Log
from launch.training.watch import Watch
from moe.training.train_state import TrainState

Record = dict[str, Any]
Step = Callable[..., tuple[TrainState, Record]]


@dataclasses.dataclass
class Launched:
    """A step on its way: its number, its batch, and in the end its metrics.

    Attributes:
        step: number of the step, from 1.
        index: number of its batch.
        batch: features on their devices.
        waited_seconds: time that the loop waited for the batch.
        metrics: what the step returned.
        limit: loss above which it is a spike, if the step looks at it.
    """

    step: int
    index: int
    batch: Any
    waited_seconds: float
    metrics: Record = dataclasses.field(default_factory=dict)
    limit: tuple[np.float32, ...] = ()


class Steps:
    """Launches each step before the one before has been looked at.

    A step that found no room for its rows left the state as it was, and so did the one
    launched after it: the first is taken again in rounds, then the second.

    Args:
        state: state to go on from.
        train_step: compiled; donates its state.
        in_rounds: returns the compiled step that always fits the row budget.
        log: keeps metrics.
        watch: looks at them.
        replay_period_steps: steps between those that are computed twice; 0: none are.
    """

    def __init__(
        self,
        state: TrainState,
        train_step: Step,
        in_rounds: Callable[[], Step],
        log: Log,
        watch: Watch,
        *,
        replay_period_steps: int = 0,
    ) -> None:
        self.state = state
        self._train_step = train_step
        self._in_rounds = in_rounds
        self._log = log
        self._watch = watch
        self._replay_period = replay_period_steps
        self._pending: Launched | None = None

    def take(self, launched: Launched) -> None:
        """Launches a step, and settles the one before."""
        launched.limit = self._watch.limit(launched.step)
        if self._replay_period and launched.step % self._replay_period == 0:
            self.settle()
            self._replay(launched)
            return
        before, self._pending = self._pending, launched
        self._launch(launched, self._train_step)
        if before is not None and not self._settled(before):
            self._launch(launched, self._train_step)

    def settle(self) -> None:
        """Waits for the step that was launched last."""
        if self._pending is not None:
            launched, self._pending = self._pending, None
            self._settled(launched)

    def _launch(self, launched: Launched, step: Step) -> None:
        index = np.int32(launched.index)
        self.state, launched.metrics = step(
            self.state, launched.batch, index, *launched.limit
        )

    def _settled(self, launched: Launched) -> bool:
        """Logs a step that is done; False if it had to be taken again."""
        fitted = bool(launched.metrics["state/taken"])
        if not fitted:
            too_many = launched.metrics["router/over_budget_rows"]
            self._launch(launched, self._in_rounds())
            assert launched.metrics["state/taken"], "rounds make room for everything"
            launched.metrics["router/over_budget_rows"] = too_many
        self._log.add(launched, again=not fitted)
        self._watch.saw(launched.step, launched.index, launched.metrics, fitted)
        return fitted

    def _replay(self, launched: Launched) -> None:
        """Takes a step twice from the same state, and compares every bit.

        Raises:
            RuntimeError: a device computes now this, now that.
        """
        copy = _copy(self.state)
        index = np.int32(launched.index)
        other, metrics = self._train_step(copy, launched.batch, index, *launched.limit)
        fitted = bool(metrics["state/taken"])
        self._launch(launched, self._train_step)
        one, two = (digests(named_arrays(state)) for state in (self.state, other))
        if differ := [name for name in one if one[name] != two[name]]:
            self._watch.failed(
                launched.step,
                f"step {launched.step:,} came out otherwise when it was computed again,"
                f" in {', '.join(differ[:5])}{' ...' if len(differ) > 5 else ''}: a "
                "device of this job computes or remembers wrong. Nothing of the step "
                "is saved; take that machine out, and start the same command again",
            )
        if fitted:
            self._watch.replayed(launched.step)
        self._settled(launched)


def _copy(state: TrainState) -> TrainState:
    """The same state once more, each array in its place."""
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=places)(state)
