"""When a checkpoint is due: by steps, by minutes, and not while nothing is learnt."""

import time
from collections.abc import Callable

import jax

from launch.job import together

# Steps between two looks at the clock of process 0, where there are several: each look
# is a message to all.
LOOK_STEPS = 10


class Times:
    """Adds to what is due after a step what the clock and skipped steps make of it.

    Args:
        minutes: between two checkpoints at most; 0 leaves it to steps.
        clock: seconds that only grow.
    """

    def __init__(
        self, minutes: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = 60 * minutes
        self._clock = clock
        self._saved = clock()
        self._postponed = False

    def due(self, due: set[str], step: int) -> set[str]:
        """Adds "save" if the last was minutes ago, or one had to wait.

        Every process of a job asks at the same steps, and has the same answer.
        """
        if self._postponed or "save" in due or not self._seconds:
            return due | ({"save"} if self._postponed else set())
        if jax.process_count() > 1 and step % LOOK_STEPS:
            return due
        late = together.as_first_finds(
            f"whether a checkpoint is due at step {step}",
            lambda: self._clock() - self._saved >= self._seconds,
        )
        return due | {"save"} if late else due

    def unless_stalled(self, due: set[str], skipped_in_a_row: int) -> set[str]:
        """Postpones a save until a step is taken again.

        After skipped steps the parameters are those of an earlier step: such a
        checkpoint would be a copy in the place of one with another content.
        """
        if "save" not in due or not skipped_in_a_row:
            return due
        self._postponed = True
        return due - {"save"}

    def saved(self) -> None:
        """Counts from now on."""
        self._saved, self._postponed = self._clock(), False
