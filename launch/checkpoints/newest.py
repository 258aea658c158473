"""The newest checkpoint that can be read, for a run that goes on from it."""

import itertools
import sys
from collections.abc import Callable
from typing import TypeVar

from launch.checkpoints.places import DamagedError
from launch.checkpoints.store import Checkpoints
from launch.job import together

T = TypeVar("T")


def from_newest(saved: Checkpoints, use: Callable[[int | None], T]) -> T:
    """Calls a function with the newest step, or with the one before if it is damaged.

    What is damaged is renamed, never deleted, and one line says so: which checkpoint,
    what of it, and what is used instead. With no older one nothing is touched.

    Args:
        saved: the checkpoints of the run.
        use: restores a step, or starts where there is none (None).
    Returns:
        What `use` returns.
    Raises:
        DamagedError: the oldest that there is is damaged too.
    """
    for attempt in itertools.count():
        what = f"the newest checkpoint, {attempt}"
        step = together.as_first_finds(what, saved.latest)
        try:
            return use(step)
        except DamagedError as damage:
            older = None if step is None else saved.before(step)
            if step is None or older is None or damage.path != saved.path(step):
                raise
            aside = saved.set_aside(step)
            if together.is_first():
                print(
                    f"warning: {damage.path} is damaged: {damage.what}; it is kept as "
                    f"{aside.name}, and the run goes on from step {older:,}",
                    file=sys.stderr,
                )
    raise AssertionError("numbers do not end")
