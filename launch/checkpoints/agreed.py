"""What one process of a job finds damaged is damaged for all of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from launch.checkpoints.places import DamagedError
from launch.job import together
from launch.job.end import WEEK_MILLISECONDS, client

T = TypeVar("T")


def agreed(what: str, work: Callable[[], T]) -> T:
    """Does work in every process; all raise the damage that any of them has found.

    Otherwise one would go on from another checkpoint while the others wait for it.

    Args:
        what: names it, once in a job.
        work: reads a checkpoint, and waits for no other process.
    Raises:
        DamagedError: that of the first process that found some.
    """
    if jax.process_count() == 1:
        return work()
    found, damage = None, ""
    try:
        found = work()
    except DamagedError as error:
        damage = json.dumps([str(error.path), error.what])
    client().key_value_set(
        f"switchyard/{what}/{jax.process_index()}", damage or "whole"
    )

    def first() -> str:
        for process in range(jax.process_count()):
            said = client().blocking_key_value_get(
                f"switchyard/{what}/{process}", WEEK_MILLISECONDS
            )
            if said != "whole":
                return said
        return ""

    if said := together.as_first_finds(what, first):
        path, words = json.loads(said)
        raise DamagedError(Path(path), words)
    return found  # type: ignore[return-value]
