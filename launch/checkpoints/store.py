"""Checkpoints: Orbax, and around it what Orbax does not check.

A checkpoint is the arrays of the train state and a manifest: a digest per array, the
configuration, what data it learnt from. It restores on any mesh. Whatever does not fit
is one error that shows every mismatch.
"""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from launch.checkpoints import compare
from launch.checkpoints.digest import digests
from launch.config.diff import Change, changes
from launch.errors import UserError
from launch.job import together
from launch.run.assemble import Run
from moe.training.train_state import TrainState
from tasks.manifest import Manifest as StoreManifest

FOLDER = "checkpoints"
# What a later version tells apart: it goes up when names, shapes or meanings of arrays
# change, and then this file learns to read what came before.
FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of something else."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Args:
        model_dir: the run.
        keep: how many of the newest are kept.
        read_only: create nothing, delete nothing.
    """

    def __init__(self, model_dir: str, keep: int, *, read_only: bool = False) -> None:
        self.folder = Path(model_dir).absolute() / FOLDER
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_error)
        if not read_only:
            if together.is_first():
                with self._writing(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
            together.together("making the folder of checkpoints")
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "manifest"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=None if read_only else keep,
                # Orbax's own `read_only` does no more than these, and warns of itself.
                create=False,
                cleanup_tmp_directories=not read_only,
                single_host_load_and_broadcast=True,  # all know of the same steps
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the others may be gone, and closing would wait for them
        try:
            with self._writing(self.folder):
                self._manager.close()
        except CheckpointError:
            if kind is None:  # else the user must hear of what went wrong first
                raise

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Says in one line what keeps a checkpoint from being written."""
        try:
            yield
        # Of a full disk TensorStore makes a ValueError, the system an OSError.
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            why = os.strerror(int(code[1])) if code else _short(error)
            raise CheckpointError(f"cannot write {path}: {why}") from error

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / str(step)

    def latest(self) -> int | None:
        """Returns the newest step, or None.

        Raises:
            CheckpointError: the newest folder lacks its manifest: something other than
                this program put it there.
        """
        step = self._manager.latest_step()
        if step is not None and not (self.path(step) / "manifest").is_dir():
            raise CheckpointError(
                f"{self.path(step)} is not a checkpoint: it has no manifest. Move it "
                "away to go on from the one before"
            )
        return None if step is None else int(step)  # NumPy's, in several processes

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

    def save(self, state: TrainState, run: Run, provenance: Mapping[str, Any]) -> None:
        """Starts to save; returns when the arrays are copied, before they are written.

        Raises:
            CheckpointError: this step is there already.
        """
        step = int(state.step)
        arrays = named_arrays(state)
        checksums = digests(arrays)
        manifest = {
            "format": FORMAT,
            "step": step,
            "data_index": int(state.data_index),
            "arrays": {
                name: {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "digest": checksums[name],
                }
                for name, array in arrays.items()
            },
            "mesh": dataclasses.asdict(run.settings.mesh),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **provenance,
        }
        with self._writing(self.path(step)):
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
        if not saved:
            raise CheckpointError(
                f"step {step} was not saved: {self.folder} holds a step as new, "
                f"{self._manager.latest_step()}"
            )

    def wait(self) -> None:
        """Returns when every save has been committed."""
        with self._writing(self.folder):
            self._manager.wait_until_finished()

    def manifest(self, step: int) -> dict[str, Any]:
        """Reads what a checkpoint says about itself.

        Raises:
            CheckpointError: there is no such step, or its manifest cannot be read.
        """
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, sorted(self._manager.all_steps()))) or "none"
            raise CheckpointError(
                f"{self.folder} has no checkpoint of step {step}; there are: {there}"
            )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())
            )
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"the manifest of {self.path(step)} cannot be read: {_short(error)}. "
                f"{self._way_out(step)}"
            ) from error
        manifest = restored["manifest"]
        if isinstance(manifest, dict) and manifest.get("format", 0) != FORMAT:
            raise CheckpointError(
                f"{self.path(step)} is of format {manifest.get('format', 0)}, and this "
                f"version reads {FORMAT}. {self._way_out(step)}"
            )
        if not _is_manifest(manifest):
            raise CheckpointError(
                f"the manifest of {self.path(step)} lacks what it should say. "
                f"{self._way_out(step)}"
            )
        return manifest

    def restore(
        self,
        step: int,
        run: Run,
        now: Mapping[str, Any] | None = None,
        *,
        allow_changes: bool = False,
    ) -> TrainState:
        """Restores a whole state, on whatever mesh the run has.

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
        return self._compare(
            step, self.manifest(step), wanted, now, allow_changes=allow_changes
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
        self._compare(
            step, manifest, wanted, now, partial=partial, allow_changes=allow_changes
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=dict(wanted),
                        restore_args=ocp.checkpoint_utils.construct_restore_args(
                            dict(wanted)
                        ),
                        partial_restore=partial,
                    )
                ),
            )["state"]
        # A truncated or missing file surfaces as a bare Exception here.
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # the checkpoint is as good as it was
            raise CheckpointError(
                f"{self.path(step)} is damaged: {_short(error)}. {self._way_out(step)}"
            ) from error
        found = digests(restored)
        damaged = [
            name
            for name in restored
            if found[name] != manifest["arrays"][name]["digest"]
        ]
        if damaged:
            raise CheckpointError(
                f"{self.path(step)} is damaged: what was read is not what was saved, "
                f"in {', '.join(damaged)}. {self._way_out(step)}"
            )
        return restored

    def _compare(
        self,
        step: int,
        manifest: Mapping[str, Any],
        wanted: Mapping[str, jax.ShapeDtypeStruct],
        now: Mapping[str, Any] | None,
        *,
        partial: bool = False,
        allow_changes: bool = False,
    ) -> list[Change]:
        """Raises one error with every difference that is refused, in a table."""
        arrays = compare.arrays(manifest["arrays"], wanted, partial=partial)
        data = [] if now is None else compare.data(manifest, now, partial=partial)
        found = [] if now is None else changes(manifest["config"], now["config"])
        knobs = [(c.macro, c.before, c.now) for c in found if c.fixed and not partial]
        refused = arrays if allow_changes else [*arrays, *data, *knobs]
        if not refused:
            return found
        way_out = (
            "use that configuration, or another MODEL_DIR to start afresh"
            if arrays
            else "use that configuration, or another MODEL_DIR to start afresh; or add "
            "--allow_changes to go on with another one"
        )
        raise CheckpointError(
            f"{self.path(step)} does not fit this run, in {len(refused)} "
            f"place{'s' if len(refused) > 1 else ''}:\n{compare.table(refused)}\n"
            f"It was made with {self.folder.parent / 'config.gin'}; {way_out}"
        )

    def _way_out(self, step: int) -> str:
        older = [s for s in sorted(self._manager.all_steps()) if s < step]
        if not older:
            return "There is no older one: take another MODEL_DIR, or move it away"
        return f"Move that folder away to go on from step {older[-1]}"


def fingerprints(store: StoreManifest) -> dict[str, str]:
    """What a checkpoint remembers of its data."""
    return {
        "data_fingerprint": store.fingerprint,
        "vocabulary_fingerprint": store.vocabulary_fingerprint,
    }


def provenance(operative: str, store: StoreManifest) -> dict[str, Any]:
    """Where a checkpoint comes from: configuration, data and code."""
    return {
        "config": operative,
        "task": store.name,
        "parents": [],
        "code_version": importlib.metadata.version("switchyard"),
        "jax_version": jax.__version__,
        **fingerprints(store),
    }


def _is_manifest(found: Any) -> bool:
    """Whether all is there that a restore compares."""
    if not isinstance(found, dict):
        return False
    texts = ("config", "data_fingerprint", "vocabulary_fingerprint")
    arrays = found.get("arrays")
    return (
        all(isinstance(found.get(name), str) for name in texts)
        and isinstance(arrays, dict)
        and all(
            isinstance(array, dict) and array.keys() >= {"shape", "dtype", "digest"}
            for array in arrays.values()
        )
    )


def named_arrays(tree: Any) -> dict[str, Any]:
    """Flattens a tree into arrays by path, such as "params/embedding"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def unnamed(arrays: Mapping[str, Any], like: Any) -> Any:
    """Puts named arrays back into a tree."""
    ordered = [arrays[name] for name in named_arrays(like)]
    return jax.tree.unflatten(jax.tree.structure(like), ordered)


def _short(error: BaseException) -> str:
    """The first line of an error; of a long one, how it begins and how it ends."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:80]} … {line[-120:]}"


def _is_no_error(record: logging.LogRecord) -> bool:
    """Keeps from the terminal what Orbax logs in every thread before it raises it."""
    return record.levelno < logging.ERROR
