"""A checkpoint in another folder: all of it, or nothing."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.checkpoints import faults
from launch.checkpoints.places import (
    UNFINISHED,
    CheckpointError,
    DamagedError,
    folder_of,
)
from launch.checkpoints.writing import writing

# What a checkpoint of a run is used with, beside it in the folder of the run.
BESIDE = ("config.gin", "vocabulary")


def copy(model_dir: Path, path: Path, to: Path) -> Path:
    """Copies a checkpoint to the folder of another run, which is made if need be.

    The copy is read back, and appears under its name when every digest is right.

    Args:
        model_dir: the run.
        path: the folder of one of its steps.
        to: folder of the run that gets it.
    Returns:
        The new checkpoint.
    Raises:
        DamagedError: what is to be copied is damaged.
        CheckpointError: it is there already, `to` is of another run, or cannot be
            written.
    """
    step = int(path.name)
    with arriving(to, step) as part:
        with writing(part):
            shutil.copytree(path, part)
        _refuse(path, faults.find(part))
        beside(model_dir.expanduser().absolute(), to)
    return folder_of(to) / str(step)


@contextlib.contextmanager
def arriving(to: Path, step: int) -> Iterator[Path]:
    """Gives the name of a checkpoint that is not whole yet; in the end, its true name.

    Args:
        to: folder of the run that gets it.
        step: its step.
    Yields:
        A path that is not there.
    Raises:
        CheckpointError: the step is there already, or cannot be written.
    """
    folder = folder_of(to)
    path, part = folder / str(step), folder / f"{step}{UNFINISHED}"
    if path.exists():
        raise CheckpointError(
            f"{path} is there already: take another folder, or move it away"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if part.exists():
        raise CheckpointError(
            f"{part} is there: another save or copy of this step goes on, or was cut "
            "short; if it was, delete it"
        )
    try:
        yield part
        with writing(path):
            os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def beside(model_dir: Path, to: Path, config: str = "") -> None:
    """Copies what a checkpoint is used with, unless it is there.

    Args:
        model_dir: the run that it is of.
        to: the folder that gets it.
        config: the configuration there; "" copies that of the run.
    Raises:
        CheckpointError: `to` has a configuration, and it is another.
    """
    for name in BESIDE:
        source, target = model_dir / name, folder_of(to).parent / name
        if not source.exists():
            continue
        if name == "config.gin":
            content = config.encode() or source.read_bytes()
            if not target.exists():
                with writing(target):
                    target.write_bytes(content)
            elif content != target.read_bytes():
                wanted = "what it would be" if config else source
                raise CheckpointError(
                    f"{target} is not {wanted}: take a folder that holds no other run"
                )
            continue
        with writing(target):
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)


def _refuse(path: Path, verdict: faults.Verdict) -> None:
    if verdict.faults:
        raise DamagedError(path, "; ".join(verdict.faults[:3]))
