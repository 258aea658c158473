"""A run whose checkpoints are in a bucket, and its folder that holds the newest.

Orbax writes to the folder, which all processes share. Then each process uploads what it
wrote, and process 0 makes the checkpoint exist. A checkpoint is used from the folder
too: what is missing there, or is other than in the bucket, is read first.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from launch.checkpoints import bucket, there
from launch.checkpoints.places import (
    CheckpointError,
    folder_of,
    read_manifest,
    steps_in,
)
from launch.checkpoints.retention import is_stalled
from launch.job import together
from launch.job.end import WEEK_MILLISECONDS, client

_OF_PROCESS = re.compile(r"ocdbt\.process_(\d+)/")


class Remote:
    """The checkpoints of a run in a bucket.

    Args:
        place: CHECKPOINT_DIR.
        model_dir: the run.
        number: tells it from others in this job.

    Attributes:
        steps: those there are, in their order; the same in all processes.
        stalled: those of them that only skipped steps led to.
    """

    def __init__(self, place: str, model_dir: Path, number: int) -> None:
        self.place = place
        self._folder, self._model_dir = folder_of(model_dir), model_dir
        self._bucket = bucket.Bucket(place)
        self._number = number
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="uploads")
        self._uploading: tuple[Future[None], list[int]] | None = None
        self._run = ""
        self.steps: list[int] = []
        self.stalled: list[int] = []

    def look(self, *, read_only: bool) -> None:
        """Finds out what there is; a run that goes on finishes what was cut short.

        Args:
            read_only: change nothing.
        Raises:
            CheckpointError: the bucket cannot be read, or holds those of another run.
        """

        def find() -> tuple[list[int], list[int], str]:
            self._bucket.look()
            if not read_only:
                self._belong()
            entries = self._bucket.entries
            stalled = [step for step, entry in entries.items() if entry.stalled]
            return sorted(entries), sorted(stalled), self._run

        what = f"what {self.place} holds, {self._number}"
        self.steps, self.stalled, self._run = together.as_first_finds(what, find)

    def bring(self, step: int) -> None:
        """Makes the folder of a step what the bucket has of it; process 0 alone does.

        Raises:
            DamagedError: the bucket does not hold what was written.
        """
        # The index is not read again: what it said at the start is what this run may
        # replace, and nothing that another has written since.
        if together.is_first():
            self._bucket.fetch(step, self._folder / str(step))

    def begin(
        self, step: int, keep: Collection[int], finished: Callable[[], None]
    ) -> None:
        """Uploads a checkpoint in a thread, when it is whole in the folder.

        Args:
            step: which one.
            keep: steps that stay.
            finished: returns when it is whole.
        """

        def work() -> None:
            finished()
            self._upload(step, keep)

        self._uploading = self._thread.submit(work), sorted(keep)

    def wait(self) -> None:
        """Returns when the bucket has what was begun.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._uploading is not None:
            (future, steps), self._uploading = self._uploading, None
            future.result()
            self.steps = steps

    def set_aside(self, step: int) -> None:
        """Counts a damaged checkpoint as none, in all processes."""
        self.steps = [other for other in self.steps if other != step]
        if together.is_first():
            self._bucket.own(self._run)
            self._bucket.set_aside(step)

    def _belong(self) -> None:
        """Finds whose checkpoints they are, and finishes what was cut short."""
        local, known = steps_in(self._folder), self._bucket.run
        mine = there.run_of(self._model_dir)
        if known and mine != known and (mine or local):
            raise CheckpointError(
                f"CHECKPOINT_DIR = {self.place!r} holds the checkpoints of another run "
                f"than {self._model_dir}: take another CHECKPOINT_DIR, or an empty "
                "MODEL_DIR to go on with that run"
            )
        self._run = known or mine or secrets.token_hex(8)
        there.keep(self._model_dir, self._run, self.place)
        newest = max(self._bucket.entries, default=-1)
        for step in local:
            if step > newest:
                path, folder = self._folder / str(step), bucket.new_folder(step)
                self._bucket.own(self._run)
                listing = self._bucket.upload(path, folder, bucket.files_of(path))
                self._bucket.commit(step, folder, listing, stalled=_stalled(path))

    def _upload(self, step: int, keep: Collection[int]) -> None:
        """Uploads this process's files; process 0 then makes the checkpoint exist."""
        path, key = self._folder / str(step), f"upload {self._number}-{step}"

        def share() -> tuple[str, list[list[str]]]:
            self._bucket.own(self._run)
            names = bucket.files_of(path)
            return bucket.new_folder(step), shares(names, jax.process_count())

        folder, names = together.as_first_finds(key, share)
        me = jax.process_index()
        if not together.is_first():
            key = f"switchyard/{key}/{me}"
            try:
                found = self._bucket.upload(path, folder, names[me])
            except CheckpointError as error:
                client().key_value_set(key, json.dumps([{}, str(error)]))
                raise
            client().key_value_set(key, json.dumps([found, ""]))
            return
        listing = self._bucket.upload(path, folder, names[me])
        for of_other in _of_others(key):
            listing |= of_other
        self._bucket.commit(
            step, folder, listing, stalled=_stalled(path), keep=keep.__contains__
        )


def shares(names: Sequence[str], num_processes: int) -> list[list[str]]:
    """Gives each process the files that it wrote; process 0 those of nobody."""
    found: list[list[str]] = [[] for _ in range(num_processes)]
    for name in names:
        of = _OF_PROCESS.search(name)
        number = int(of[1]) if of else 0
        found[number if number < num_processes else 0].append(name)
    return found


def _of_others(key: str) -> Iterator[Any]:
    """What the other processes have uploaded."""
    for process in range(1, jax.process_count()):
        said = client().blocking_key_value_get(
            f"switchyard/{key}/{process}", WEEK_MILLISECONDS
        )
        listing, fault = json.loads(said)
        if fault:
            raise CheckpointError(fault)
        yield listing


def _stalled(path: Path) -> bool:
    try:
        return is_stalled(read_manifest(path))
    except CheckpointError:
        return False  # said when, and if, it is restored
