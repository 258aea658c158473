"""What is looked at after every step: whether it was kept, and how its loss is."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from launch.config.settings import LoopSettings
from launch.job import together
from launch.records.events import EventLog
from launch.training.health import Health
from launch.training.spikes import Spikes


class Watch:
    """Sees every step that is done, and says when to go back to a checkpoint.

    Args:
        loop: periods and limits.
        events: keeps what happens.
        say: shows a line.
        kept: what the checkpoint that the run goes on from kept of this; None if there
            is none.
        hashed: whether a table chooses, of each sparse layer; () where none does.

    Attributes:
        skipped_in_a_row: steps at the end that were left out.
        rollbacks: how often in a row the run has gone back without a new checkpoint.
        going_back: why the run must go back; "" if it need not.
        resume_index: batch with which it then goes on: that after the step which was
            one too many, whatever was launched since.
    """

    def __init__(
        self,
        loop: LoopSettings,
        events: EventLog,
        say: Callable[[str], None],
        kept: Mapping[str, Any] | None,
        hashed: Sequence[bool] = (),
    ) -> None:
        self._loop = loop
        self._events = events
        self._say = say
        self._health = Health(hashed)
        self._asks_step = loop.spike_action == "skip"
        self.restore(kept)
        self.rollbacks = 0 if kept is None else int(kept["rollbacks"])

    def restore(self, kept: Mapping[str, Any] | None) -> None:
        """Goes on from what a checkpoint kept; rollbacks are counted on."""
        spikes = None if kept is None else kept["spikes"]
        self._spikes = Spikes.restored(self._loop.spike_stddevs, spikes)
        self._limits: dict[int, float] = {}
        self.skipped_in_a_row = 0
        self.going_back, self.resume_index = "", 0

    def kept(self) -> dict[str, Any]:
        """Returns what a checkpoint is to keep: a run goes on as if never stopped."""
        return {"spikes": self._spikes.kept(), "rollbacks": self.rollbacks}

    def limit(self, step: int) -> tuple[np.float32, ...]:
        """Returns what a step is given besides: the limit of its loss, or nothing."""
        if self._loop.spike_action == "none":
            return ()
        limit = self._limits[step] = self._spikes.limit(step)
        return (np.float32(limit),) if self._asks_step else ()

    def saw(
        self, step: int, index: int, metrics: Mapping[str, Any], fitted: bool
    ) -> None:
        """Takes in a step that is done.

        Args:
            step: number of the step.
            index: number of its batch.
            metrics: what the step returned.
            fitted: whether there was room for all rows at once.
        """
        loss = float(metrics["loss/total"])
        skipped = int(metrics["state/skipped_in_a_row"])
        facts = {"batch": index, "loss": loss}
        if not fitted:
            rows = int(metrics["router/over_budget_rows"])
            self._events.note("again", step, over_budget_rows=rows)
        if skipped:
            self._events.note("skipped", step, in_a_row=skipped, **facts)
        if step % self._loop.log_period_steps == 0:
            self._look(step, metrics)
        if self.going_back:
            return  # launched before it was known
        self.skipped_in_a_row, self.resume_index = skipped, index + 1
        self._spikes.add(step, loss)
        limit = self._limits.pop(step, np.inf)
        if self._loop.spike_action == "rollback" and loss > limit:
            self.going_back = (
                f"the loss of step {step:,} was {loss:.4g}, above {limit:.4g}: "
                f"{self._loop.spike_stddevs:g} deviations (SPIKE_STDDEVS) over its mean"
            )
        elif skipped >= self._loop.max_skipped_steps:
            self.going_back = f"{skipped} steps in a row were left out"

    def _look(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Says what begins to be wrong with the routers, and what is over."""
        here = {name: x for name, x in metrics.items() if name.startswith("router/")}
        for alarm in self._health.look(step, jax.device_get(here)):
            kind = "alarm" if alarm.layers else "cleared"
            facts = {"since": alarm.since, "layers": list(alarm.layers)}
            self._events.note(kind, step, about=alarm.kind, words=alarm.words, **facts)
            self._say(f"routers: {alarm.words}")

    def replayed(self, step: int) -> None:
        """Notes that a step was computed twice, with one result."""
        self._events.note("replayed", step)

    def failed(self, step: int, message: str) -> None:
        """Notes a fault, and raises it.

        Raises:
            RuntimeError: always; it is none of the user's.
        """
        self._events.note("fault", step, message=message)
        if together.is_first():
            print(message, file=sys.stderr, flush=True)
        raise RuntimeError(message)
