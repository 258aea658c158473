"""Checkpoints for who only looks at them: in the folder of a run, or in a bucket."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.checkpoints import faults
from launch.checkpoints.places import (
    CheckpointError,
    DamagedError,
    folder_of,
    steps_in,
)
from launch.checkpoints.writing import writing

if TYPE_CHECKING:
    from launch.checkpoints.bucket import Bucket

# In MODEL_DIR: where the checkpoints are, and a word that says whose, so that those of
# another run are not taken for its own.
FILE = "checkpoint_dir.json"


class There:
    """The checkpoints of a run, wherever they are; no device is needed.

    Args:
        model_dir: the run.

    Attributes:
        where: folder of a bucket, or of this machine, for messages.
        steps: those there are, in their order.
    """

    def __init__(self, model_dir: str | os.PathLike[str]) -> None:
        self.folder = folder_of(model_dir)
        place = _said(self.folder.parent).get("place")
        self._bucket: Bucket | None = None
        if not place:
            self.where, self.steps = str(self.folder), steps_in(self.folder)
        else:
            from launch.checkpoints import bucket  # which few runs need

            self._bucket = bucket.Bucket(place)
            self._bucket.look()
            self.where, self.steps = self._bucket.place, sorted(self._bucket.entries)

    def step(self, step: int | None) -> int:
        """Returns the step asked for, or the newest.

        Raises:
            CheckpointError: it is not there.
        """
        if not self.steps:
            raise CheckpointError(f"{self.where} holds no checkpoint")
        if step is not None and step not in self.steps:
            raise CheckpointError(
                f"{self.where} has no checkpoint of step {step}; there are: "
                f"{', '.join(map(str, self.steps))}"
            )
        return self.steps[-1] if step is None else step

    def name(self, step: int) -> str:
        """Returns where the checkpoint of a step is, for messages."""
        if self._bucket is None:
            return str(self.folder / str(step))
        return f"{self.where}/{self._bucket.entries[step].folder}"

    @contextlib.contextmanager
    def held(self, step: int, only: str = "") -> Iterator[tuple[Path, int]]:
        """Yields the folder of a step, and the size of all its files.

        From a bucket it is read into a folder that is gone afterwards, unless the run
        has it.

        Args:
            step: one of `steps`.
            only: the one file that is needed; "": all are.
        Raises:
            DamagedError: the bucket does not hold what was written.
        """
        path = self.folder / str(step)
        if self._bucket is None:
            yield path, sum(faults.sizes_of(path).values())
            return
        size = self._bucket.entries[step].num_bytes
        if not only and self._bucket.is_here(step, path):
            yield path, size
            return
        with contextlib.ExitStack() as stack:
            with writing(self.folder):
                place = tempfile.TemporaryDirectory(
                    dir=self.folder.parent, prefix="fetched-"
                )
            path = Path(stack.enter_context(place)) / str(step)
            if only:
                self._bucket.fetch_file(step, only, path)
            else:
                self._bucket.fetch(step, path)
            yield path, size

    def verdict(self, step: int) -> faults.Verdict:
        """Reads all of a checkpoint, and says what is damaged."""
        try:
            with self.held(step) as (path, _):
                return faults.find(path)
        except DamagedError as damage:  # of what the bucket holds
            return faults.Verdict(damage.path, 0, 0, (damage.what,))


def place_of(model_dir: Path, configured: str) -> str:
    """Where the checkpoints of a run are: a bucket, or "" for its folder.

    A copy has the configuration of its run, and its checkpoint in its folder.

    Args:
        model_dir: the run.
        configured: CHECKPOINT_DIR, by which the next `train` goes.
    """
    if (place := _said(model_dir).get("place")) is not None:
        return str(place)
    return "" if steps_in(folder_of(model_dir)) else configured


def run_of(model_dir: Path) -> str:
    """Whose checkpoints those of a run are; "" if none were in a bucket yet."""
    return str(_said(model_dir).get("run", ""))


def keep(model_dir: Path, run: str, place: str) -> None:
    """Remembers where the checkpoints of a run are.

    Args:
        model_dir: the run.
        run: name of the run that they are of.
        place: the bucket; "" if they are in the run's folder.
    """
    file = model_dir / FILE
    with writing(file):
        model_dir.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"run": run, "place": place}), encoding="utf-8")
        os.replace(part, file)


def forget(model_dir: Path) -> None:
    """Remembers that the checkpoints of a run are in its folder again."""
    if _said(model_dir).get("place"):
        keep(model_dir, run_of(model_dir), "")


def _said(model_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((model_dir / FILE).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}
