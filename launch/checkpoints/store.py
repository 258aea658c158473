"""Checkpoints of a run: Orbax writes them; what it does not check is checked here.

A checkpoint is the arrays of the train state and a manifest: a digest per array, the
configuration, what data it learnt from. It restores on any mesh. Whatever does not fit
is one error that shows every mismatch; whatever is damaged is an error of its own.
"""

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp

from launch.checkpoints import (
    compare,
    history,
    places,
    retention,
    there,
    writing,
)
from launch.checkpoints.agreed import agreed
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.manifest import manifest_of
from launch.checkpoints.names import named_arrays, unnamed
from launch.checkpoints.places import FOLDER, CheckpointError, DamagedError
from launch.checkpoints.restoring import changed, placed, refuse_changed
from launch.config.diff import Change
from launch.job import together
from launch.run.assemble import Run
from moe.training.train_state import TrainState

if TYPE_CHECKING:
    from launch.checkpoints.remote import Remote

_OPENED = itertools.count()  # every process opens the same, in the same order


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
        model_dir: the run.
        keep: how many of the newest are kept.
        keep_period: the first of every so many steps is kept for good; 0: none.
        keep_best: how many with the least held-out loss are kept; 0: none for that.
        bucket: CHECKPOINT_DIR, where they are kept; "": in the folder of the run.
        read_only: create no checkpoint, delete none.

    Attributes:
        folder: where they are, or the newest of them.
        parents: path and step of what the next one that is saved comes from.
    Raises:
        CheckpointError: the folder cannot be read or made; or the run's checkpoints
            were deleted and its metrics were not.
    """

    def __init__(
        self,
        model_dir: str,
        keep: int,
        keep_period: int = 0,
        keep_best: int = 0,
        *,
        bucket: str = "",
        read_only: bool = False,
    ) -> None:
        self._model_dir = Path(model_dir).absolute()
        self.folder = self._model_dir / FOLDER
        self._number = next(_OPENED)
        self._asked = itertools.count()
        self._manifests: dict[int, dict[str, Any]] = {}
        self.parents: list[dict[str, Any]] = []
        self._saving: int | None = None
        self._manager: ocp.CheckpointManager | None = None
        self._steps: list[int] = []
        self._retention = retention.Retention(keep, keep_period, keep_best)
        self._remote: Remote | None = None
        if bucket:
            from launch.checkpoints import remote  # more than a run without needs

            self._remote = remote.Remote(bucket, self._model_dir, self._number)
            self._remote.look(read_only=read_only)
        if read_only:
            self._steps = self._as_first("steps", lambda: places.steps_in(self.folder))
            return
        writing.prepare()
        if together.is_first():
            if self._remote is None:
                there.forget(self._model_dir)
            if self._remote is None or not self._remote.steps:
                history.refuse_deleted(self._model_dir)
            with writing.writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
        together.together(f"making the folder of checkpoints {self._number}")
        self._open()
        losses, stalled = self._as_first(
            "history", lambda: history.known(self._model_dir, losses=keep_best > 0)
        )
        self._retention.losses |= {int(step): loss for step, loss in losses}
        stalled = self._remote.stalled if self._remote else stalled
        self._retention.stalled |= set(stalled)

    def _open(self) -> None:
        """Opens the folder, or opens it again after another hand changed it."""
        # Of those in a bucket, the folder has the newest.
        keep = retention.Retention(1) if self._remote else self._retention
        self._manager = writing.manager(self.folder, keep)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._manager is None:
            return
        if kind is not None and jax.process_count() > 1:
            return  # the others may be gone, and closing would wait for them
        try:
            self.wait()
            self._manager.close()
        except CheckpointError:
            if kind is None:  # else the user must hear of what went wrong first
                raise
        finally:
            if together.is_first() and (kind is not None or self._saving is not None):
                writing.remove_unfinished(self.folder)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Lists the steps that there are, in their order; the same in all processes."""
        if self._remote is not None:
            return self._remote.steps
        known = self._steps if self._manager is None else self._manager.all_steps()
        return sorted(map(int, known))  # they are NumPy's, in several processes

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def before(self, step: int) -> int | None:
        """Returns the newest step before one, or None."""
        return max((s for s in self.steps() if s < step), default=None)

    def require(self, step: int | None) -> int:
        """Returns the step asked for, or the newest.

        Raises:
            CheckpointError: there is none.
        """
        found = self.latest() if step is None else step
        if found is None:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint yet: let `switchyard train` run on"
            )
        return found

    def scored(self, step: int, scores: Mapping[str, Any]) -> None:
        """Hears of the held-out metrics of a step, by which the best are kept."""
        found = retention.losses_of([{"step": step, "split": "heldout"} | dict(scores)])
        self._retention.losses |= found

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it counts as none; returns its place.

        Its bytes are left for whoever wants to know what happened to them.
        """
        assert self._manager is not None, "what only reads moves nothing"

        name = self._as_first("aside", lambda: writing.set_aside(self.path(step)))
        if self._remote is not None:
            self._remote.set_aside(step)
        together.together(f"setting a checkpoint aside {self._number}-{step}")
        self._manager.close()
        self._open()
        return self.folder / name

    def save(self, state: TrainState, run: Run, provenance: Mapping[str, Any]) -> None:
        """Starts to save; returns when the arrays are copied, before they are written.

        Raises:
            CheckpointError: this step is there already, or the one before could not be
                written.
        """
        assert self._manager is not None, "what only reads saves nothing"
        self.wait()
        step, arrays = int(state.step), named_arrays(state)
        manifest = manifest_of(state, arrays, run, self.parents, provenance)
        if retention.is_stalled(manifest):
            self._retention.stalled.add(step)
        self._saving = step
        with writing.writing(self.path(step)):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
        if not saved:
            self._saving = None
            raise CheckpointError(
                f"step {step} was not saved: {self.folder} holds a step as new, "
                f"{self.latest()}"
            )
        if self._remote is not None:
            keep = self._retention.kept([*self.steps(), step])
            self._remote.begin(step, keep, self._manager.wait_until_finished)

    def wait(self) -> None:
        """Returns when what was being saved has been committed.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._manager is None or self._saving is None:
            return
        with writing.writing(self.path(self._saving)):
            if self._remote is not None:
                self._remote.wait()
            else:
                self._manager.wait_until_finished()
        step, self._saving = self._saving, None
        if together.is_first():
            history.remember_saved(self._model_dir, step)

    def manifest(self, step: int) -> dict[str, Any]:
        """Reads what a checkpoint says about itself.

        Raises:
            CheckpointError: there is no such step, or it is of another format.
            DamagedError: its manifest is missing, or is not as it was written.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.folder} has no checkpoint of step {step}; there are: {there}"
            )
        if step not in self._manifests:
            if self._remote is not None:
                bring = functools.partial(self._remote.bring, step)
                self._agreed(step, bring)
                if self._manager is not None:
                    self._manager.reload()
            self._manifests[step] = self._agreed(
                step, lambda: places.read_manifest(self.path(step))
            )
        return self._manifests[step]

    def restore(
        self,
        step: int,
        run: Run,
        now: Mapping[str, Any] | None = None,
        *,
        allow_changes: bool = False,
    ) -> TrainState:
        """Restores a whole state, on whatever mesh the run has.

        What is trained only now has a state of the optimizer that begins here.

        Args:
            step: which one.
            run: gives shapes, and the place of every array.
            now: the run's provenance, as `save` would keep it; None compares arrays
                alone.
            allow_changes: whether the run may learn otherwise, or other things, than
                the checkpoint's did.
        Raises:
            CheckpointError: the checkpoint is of another model, of other data, or of
                the same data in another order, with every difference; or it is
                damaged, with every damaged array.
        """
        wanted = named_arrays(run.placed_shapes())
        arrays = self._arrays(step, wanted, now, allow_changes=allow_changes)
        if len(arrays) < len(wanted):
            params = unnamed(arrays, {"params": run.shapes.params})["params"]
            fresh = named_arrays({"opt_state": run.init_optimizer(params)})
            arrays = fresh | arrays
        return unnamed(arrays, run.shapes)

    def compare(
        self,
        step: int,
        run: Run,
        now: Mapping[str, Any],
        *,
        allow_changes: bool = False,
    ) -> list[Change]:
        """Compares a run with what a checkpoint was made by.

        Returns:
            What has changed, and may.
        Raises:
            CheckpointError: as `restore`, but for damage.
        """
        wanted = named_arrays(run.placed_shapes())
        return compare.checked(
            self.path(step),
            self.manifest(step),
            wanted,
            now,
            allow_changes=allow_changes,
        )

    def restore_params(
        self, step: int, run: Run, now: Mapping[str, Any] | None = None
    ) -> Any:
        """Restores the parameters alone, for scoring and drawing text.

        Args:
            step: which one.
            run: gives shapes, and the place of every array.
            now: if given, its vocabulary must be the one the checkpoint learnt; its
                text may be another.
        Raises:
            CheckpointError: as `restore`.
        """
        shapes = run.placed_shapes().params
        wanted = {
            f"params/{name}": shape for name, shape in named_arrays(shapes).items()
        }
        arrays = self._arrays(step, wanted, now, partial=True)
        return unnamed(
            {name.removeprefix("params/"): array for name, array in arrays.items()},
            run.shapes.params,
        )

    def _arrays(
        self,
        step: int,
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        now: Mapping[str, Any] | None,
        *,
        partial: bool = False,
        allow_changes: bool = False,
    ) -> dict[str, jax.Array]:
        """Restores named arrays after comparing, and digests them."""
        manifest = self.manifest(step)
        compare.checked(
            self.path(step),
            manifest,
            wanted,
            now,
            partial=partial,
            allow_changes=allow_changes,
        )
        saved = manifest["arrays"]
        there = {name: like for name, like in wanted.items() if name in saved}
        restored = self.arrays(step, there)
        self.parents = [{"path": str(self.path(step)), "step": step}]
        return restored

    def arrays(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Restores some arrays by name, and compares each with its digest.

        Args:
            step: which one.
            wanted: the shape and the type in which each was saved, and its place.
        Raises:
            DamagedError: one of them is damaged.
            CheckpointError: it cannot be read.
        """
        arrays = Arrays(self.path(step), self.manifest(step))
        restored = self._agreed(step, lambda: placed(arrays, wanted))
        names = changed(arrays, restored)
        self._agreed(step, lambda: refuse_changed(arrays, names))
        return restored

    def _agreed(self, step: int, work: Any) -> Any:
        """Reads in every process; if it is damage for one, then for all."""
        what = f"reading {self._number}-{step}-{next(self._asked)}"
        try:
            return agreed(what, work)
        except DamagedError as error:
            older = self.before(step)
            advice = (
                "There is no older one: take another MODEL_DIR to start afresh"
                if older is None
                else f"The one before is of step {older}"
            )
            raise DamagedError(self.path(step), error.what, advice) from error

    def _as_first(self, what: str, find: Any) -> Any:
        """What process 0 finds, in all processes."""
        key = f"checkpoints {self._number}: {what} {next(self._asked)}"
        return together.as_first_finds(key, find)
