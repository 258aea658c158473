"""Runs a shrunk configuration on its meshes and on one device, and compares."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from launch.config.edit import describe_mesh
from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.verification import batches, compare, measure, weights
from launch.verification.compare import Row
from launch.verification.measure import Bench, Decisions, Evaluation, Start, Step
from launch.verification.shrink import Mesh, Shrunk
from moe.model.transformer import feature_axes

# What can be compared; a train step always is.
PARTS = ("decisions", "evaluation", "accumulation")
Waiting = Callable[[str], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one mesh gave.

    Attributes:
        mesh: that of the run, and the one that was run.
        rows: all comparisons.
        seconds: they took.
    """

    mesh: Mesh
    rows: tuple[Row, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything is the same."""
        return all(row.ok for row in self.rows)


@dataclasses.dataclass
class Reference:
    """One device's results, each computed when it is first asked for."""

    config: ResolvedConfig
    settings: Settings
    tail: int
    seed: int

    def __post_init__(self) -> None:
        self.batch = batches.draw(self.settings, 0, self.seed)
        self.padded_batch = batches.draw(self.settings, self.tail, self.seed)
        self.bench = Bench(self.config, self.settings)
        params = weights.draw(self.seed, self.settings.layers)
        start = self.bench.start(params)
        self.start: Start
        self.step: Step
        step = self.bench.step(start, self.batch)
        self.start, self.step = measure.calibrated(start, step)
        self._decisions: Decisions | None = None
        self._evaluation: Evaluation | None = None

    @property
    def decisions(self) -> Decisions:
        """What routers decide on one device."""
        if self._decisions is None:
            self._decisions = self.bench.decisions(self.start, self.batch)
        return self._decisions

    @property
    def evaluation(self) -> Evaluation:
        """How one device scores the batch."""
        if self._evaluation is None:
            self._evaluation = self.bench.evaluation(self.start, self.padded_batch)
        return self._evaluation


def examine(
    config: ResolvedConfig,
    shrunk: Shrunk,
    *,
    seed: int = 0,
    parts: Sequence[str] = PARTS,
    waiting: Waiting = lambda _: nullcontext(),
) -> list[Verdict]:
    """Compares each mesh with one device.

    Args:
        config: for messages.
        shrunk: what is run.
        seed: PRNG seed for parameters and data.
        parts: names in `PARTS` of what is compared beside a train step.
        waiting: shows a message while something takes long.
    """
    began = time.monotonic()
    with waiting("one device"):
        reference = Reference(config, shrunk.on_one_device(), shrunk.tail, seed)
    once: list[Row] = []
    if "accumulation" in parts:
        with waiting("one device, two microbatches"):
            once = [accumulated(reference)]
    verdicts = []
    for mesh in shrunk.meshes:
        with waiting(describe_mesh(mesh.small)):
            rows = on_mesh(reference, shrunk.on(mesh), shrunk.tail, parts)
        now = time.monotonic()
        verdicts.append(Verdict(mesh, (*rows, *once), now - began))
        began = now
    return verdicts


def on_mesh(
    reference: Reference, settings: Settings, tail: int, parts: Sequence[str]
) -> list[Row]:
    """All comparisons of one mesh with one device."""
    bench, start, batch = (
        Bench(reference.config, settings),
        reference.start,
        reference.batch,
    )
    rows = compare.steps(reference.step, bench.step(start, batch), start)
    if "decisions" in parts:
        rows += compare.decisions(
            reference.decisions,
            bench.decisions(start, batch),
            settings.router.num_selected,
        )
    if "evaluation" in parts:
        padded = reference.padded_batch
        whole = bench.evaluation(start, padded)
        shorter = {
            name: x[:, : x.shape[1] - tail] if "length" in feature_axes(name) else x
            for name, x in padded.items()
        }
        rows += compare.evaluations(reference.evaluation, whole, "held-out")
        cut = bench.evaluation(start, shorter)
        rows += compare.evaluations(whole, cut, "padding cut away")
    return rows


def accumulated(reference: Reference) -> Row:
    """One device's step in two microbatches against that in one."""
    train = dataclasses.replace(reference.settings.train, microbatches=2)
    bench = Bench(
        reference.config, dataclasses.replace(reference.settings, train=train)
    )
    step = bench.step(reference.start, reference.batch)
    rows = compare.steps(reference.step, step, reference.start)
    return compare.collapsed(rows, "two microbatches instead of one, on one device")


def differing(verdict: Verdict) -> list[Row]:
    """The rows that are not the same, the worst first."""

    def size(row: Row) -> Any:
        return (np.isnan(row.difference), row.difference / max(row.tolerance, 1e-12))

    return sorted((row for row in verdict.rows if not row.ok), key=size, reverse=True)
