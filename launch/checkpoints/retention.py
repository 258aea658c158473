"""Which checkpoints of a run are kept, and which make room for newer ones."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from launch.checkpoints.places import CheckpointError, read_manifest


@dataclasses.dataclass
class Retention:
    """Decides which steps stay when another is saved; Orbax asks it.

    Attributes:
        newest: how many of the newest stay.
        period_steps: the first of every so many steps stays for good; 0: none does.
        best: how many with the least held-out loss stay; 0: none for that.
        losses: held-out loss of steps, as far as it is known.
        stalled: steps whose state is as an earlier one left it, because every step
            since then was skipped.
    """

    newest: int
    period_steps: int = 0
    best: int = 0
    losses: dict[int, float] = dataclasses.field(default_factory=dict)
    stalled: set[int] = dataclasses.field(default_factory=set)

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> list[bool]:
        """Answers Orbax for each checkpoint, the newest last."""
        del context
        steps = [int(one.step) for one in checkpoints]
        stays = self.kept(steps)
        return [step in stays for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Chooses among steps, in their order, those that stay."""
        return kept(
            steps,
            newest=self.newest,
            period_steps=self.period_steps,
            best=self.best,
            losses=self.losses,
            stalled=self.stalled,
        )


def kept(
    steps: Sequence[int],
    *,
    newest: int,
    period_steps: int = 0,
    best: int = 0,
    losses: Mapping[int, float],
    stalled: Collection[int] = (),
) -> set[int]:
    """Chooses what stays of the checkpoints of a run.

    The last is always kept. One that only skipped steps led to holds the parameters of
    an earlier one, and is kept for nothing else: it takes the place of no other.

    Args:
        steps: those there are, in their order.
        newest: how many of the newest stay.
        period_steps: the first of every so many steps stays; 0: none does.
        best: how many of the least loss stay.
        losses: held-out loss of steps, as far as it is known.
        stalled: steps whose state is as an earlier one left it.
    """
    progress = [step for step in steps if step not in stalled]
    found = {*progress[-newest:], *steps[-1:]}
    if period_steps:
        first: dict[int, int] = {}
        for step in progress:
            first.setdefault(step // period_steps, step)
        found |= {step for number, step in first.items() if number}
    known = [s for s in progress if math.isfinite(losses.get(s, math.nan))]
    # Of two as good, the later one: it has learnt longer.
    return found | set(sorted(known, key=lambda s: (losses[s], -s))[:best])


def is_stalled(manifest: Mapping[str, Any]) -> bool:
    """Whether the steps just before a checkpoint were all skipped."""
    return manifest.get("skipped_in_a_row", 0) > 0


def stalled_of(folder: Any, steps: Sequence[int]) -> list[int]:
    """Lists the stalled among checkpoints; those that cannot be read are not."""
    found = []
    for step in steps:
        try:
            if is_stalled(read_manifest(folder / str(step))):
                found.append(step)
        except CheckpointError:
            continue  # said when, and if, it is restored
    return found


def losses_of(records: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Reads the held-out losses of steps from the metrics of a run."""
    name = "loss/nats_per_token"
    return {
        int(record["step"]): float(record[name])
        for record in records
        if record.get("split") == "heldout" and name in record
    }
