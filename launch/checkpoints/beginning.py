"""A run that begins with a part of another run's checkpoint: START_FROM."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import jax

from launch.checkpoints.fates import PARAMS, Part, part_of
from launch.checkpoints.names import named_arrays, unnamed
from launch.checkpoints.places import (
    FOLDER,
    MANIFEST,
    CheckpointError,
    DamagedError,
    folder_of,
    read_manifest,
    steps_in,
)
from launch.checkpoints.store import Checkpoints
from launch.checkpoints.there import There, place_of
from launch.config.reader import ResolvedConfig
from launch.data import opening
from launch.job import together
from launch.run.assemble import Run
from moe.training.train_state import TrainState
from tasks.store import is_there


@dataclasses.dataclass(frozen=True)
class Source:
    """Another run's checkpoint, from which a run begins.

    Attributes:
        saved: checkpoints of that run.
        part: what is taken of one of them.
    """

    saved: Checkpoints
    part: Part

    def say(self, *, quiet: bool) -> None:
        """Prints every fate once, and warnings however quiet a run is."""
        if not together.is_first():
            return
        if not quiet:
            for line in self.part.lines():
                print(f"  {line}", file=sys.stderr, flush=True)
        for words in self.part.warnings:
            print(f"warning: START_FROM: {words}", file=sys.stderr, flush=True)

    def first_state(self, run: Run) -> TrainState:
        """Draws the state of step 0, and takes parameters in the place of drawn ones.

        The optimizer's state begins with the parameters as they then are.

        Args:
            run: the run, assembled; its mesh is set.
        Raises:
            DamagedError: the checkpoint is damaged.
        """
        state = run.init_state()
        params = named_arrays(state.params)
        replaced = [params[name] for name in self.part.loaded]
        for array in [*replaced, *jax.tree.leaves(state.opt_state)]:
            array.delete()  # what comes in its place needs the memory
        try:
            params |= _taken(run, self)
        except DamagedError as damage:
            raise _damaged(damage) from damage
        whole = unnamed(params, run.shapes.params)
        opt_state = run.init_optimizer(whole)
        return dataclasses.replace(state, params=whole, opt_state=opt_state)

    def told(self, saved: Checkpoints) -> dict[str, Any]:
        """Returns what the next checkpoints of a run say of where it began.

        Args:
            saved: those of the run, which hear of their parent.
        """
        saved.parents = [{"path": str(self.part.path), "step": self.part.step}]
        return {"start_from": self.part.origin()}


def place(start_from: str) -> tuple[Path, int | None]:
    """Returns the run that START_FROM names, and the step; None is the newest."""
    path = Path(os.path.abspath(start_from))
    if path.name.isdecimal() and path.parent.name == FOLDER:
        return path.parents[1], int(path.name)
    return (path.parent if path.name == FOLDER else path), None


def source_of(
    config: ResolvedConfig, vocabulary: str, *, allow_changes: bool
) -> Source:
    """Finds what a run begins with; reads no array.

    Args:
        config: configuration of the run.
        vocabulary: fingerprint of its vocabulary.
        allow_changes: whether embeddings may be those of another one.
    Raises:
        CheckpointError: there is no such checkpoint.
        ConfigError: it does not fit, with all that does not.
    """
    start_from = config.settings.loop.start_from
    folder, step = place(start_from)
    bucket = place_of(folder, "")
    saved = Checkpoints(str(folder), keep=1, bucket=bucket, read_only=True)
    step = _among(saved.steps(), step, start_from)
    try:
        manifest = saved.manifest(step)
    except DamagedError as damage:
        raise _damaged(damage) from damage
    part = part_of(
        config, saved.path(step), manifest, vocabulary, allow_changes=allow_changes
    )
    return Source(saved, part)


def described(config: ResolvedConfig, *, allow_changes: bool) -> list[str]:
    """Says what START_FROM gives, for a dry run; nothing if the run would go on.

    Args:
        config: configuration of the run.
        allow_changes: whether embeddings may be those of another vocabulary.
    Raises:
        CheckpointError: there is no such checkpoint in the run that is named.
        ConfigError: it does not fit, with all that does not.
    """
    loop = config.settings.loop
    if steps_in(folder_of(loop.model_dir)):
        return []
    folder, step = place(loop.start_from)
    if not folder.is_dir():
        return [f"START_FROM: {folder} is not here, so what it gives is not known"]
    there = There(folder)
    step = _among(there.steps, step, loop.start_from)
    with there.held(step, MANIFEST) as (path, _):
        manifest = read_manifest(path)
    name = there.folder / str(step)
    vocabulary = None
    if is_there(config.settings.data.store_dir):
        vocabulary = opening.open_checked(config).manifest.vocabulary_fingerprint
    part = part_of(config, name, manifest, vocabulary, allow_changes=allow_changes)
    return [*part.lines(), *(f"  warning: {words}" for words in part.warnings)]


def _taken(run: Run, source: Source) -> dict[str, jax.Array]:
    """The parameters that a run takes, of its own types and at their places."""
    step = source.part.step
    saved = source.saved.manifest(step)["arrays"]
    wanted = named_arrays(run.placed_shapes().params)
    alike = {
        PARAMS + name: wanted[name]
        for name in source.part.loaded
        if saved[PARAMS + name]["dtype"] == wanted[name].dtype
    }
    found = source.saved.arrays(step, alike)
    for name in source.part.loaded:
        if (full := PARAMS + name) in alike:
            continue
        # One by one: of no more than one array both types are held.
        like = wanted[name]
        as_saved = jax.ShapeDtypeStruct(
            like.shape, saved[full]["dtype"], sharding=like.sharding
        )
        array = source.saved.arrays(step, {full: as_saved})[full]
        convert = jax.jit(
            lambda x, dtype=like.dtype: x.astype(dtype), out_shardings=like.sharding
        )
        found[full] = convert(array)
        jax.block_until_ready(found[full])
        array.delete()
    return {name.removeprefix(PARAMS): array for name, array in found.items()}


def _among(steps: list[int], step: int | None, start_from: str) -> int:
    """The step that is meant, of those there are."""
    if step in steps:
        return step
    if step is None and steps:
        return steps[-1]
    there = ", ".join(map(str, steps)) or "none"
    what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise CheckpointError(
        f"START_FROM = {start_from!r}: there is {what}; there are: {there}"
    )


def _damaged(damage: DamagedError) -> DamagedError:
    """The same damage, with what to do about it."""
    advice = "It is what START_FROM names: name another checkpoint"
    return DamagedError(damage.path, damage.what, advice)
