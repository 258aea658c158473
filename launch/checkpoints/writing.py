"""What keeps a checkpoint from being written, said in one line and nothing else."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src import asyncio_utils

from launch.checkpoints.places import ASIDE, UNFINISHED, CheckpointError, short


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line what keeps a checkpoint from being written.

    Raises:
        CheckpointError: the disk is full, or the like.
    """
    try:
        yield
    # Of a full disk TensorStore makes a ValueError, the system an OSError.
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        why = os.strerror(int(code[1])) if code else short(error)
        raise CheckpointError(f"cannot write {path}: {why}") from error


def prepare() -> None:
    """Lets Orbax end what it has begun, and say things once.

    Orbax closes its event loop at the first error. Of every other write that was on its
    way, TensorStore then tells a closed loop, from its own threads: a traceback each.
    So what is left is waited for; that is short, since it fails or is done. And what
    Orbax raises it logs before, in every thread.
    """
    asyncio_utils._run_sync_via_new_loop = _to_its_end
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)


def manager(folder: Path, keep: Any) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints for Orbax to write to.

    Args:
        folder: the folder.
        keep: asked by Orbax which of them stay.
    """
    return ocp.CheckpointManager(
        folder,
        item_names=("state", "manifest"),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            create=False,
            cleanup_tmp_directories=True,
            single_host_load_and_broadcast=True,  # all know of the same steps
        ),
    )


def _to_its_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine and all that it has begun, in a loop of its own."""
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(work)
        finally:
            while left := asyncio.all_tasks(loop):
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _is_news(record: logging.LogRecord) -> bool:
    """Keeps what is raised, or read by nobody, from being logged too."""
    return record.levelno < logging.ERROR and "Metadata file" not in str(record.msg)


def remove_unfinished(folder: Path) -> list[str]:
    """Removes what a failed save has left, which takes room and is no checkpoint.

    Returns:
        The names of what could not be removed.
    """
    left = []
    for path in folder.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            left.append(path.name)
    return left


def set_aside(path: Path) -> str:
    """Renames a damaged checkpoint, if it is there; returns a name that is free."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}{ASIDE}{f'.{number}' * (number > 1)}")
        if not aside.exists():
            with writing(aside), contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            return aside.name
    raise AssertionError("numbers do not end")


def manifest_written(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes what a checkpoint says about itself, where Orbax writes it."""
    folder = path / "manifest"
    with writing(folder):
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps(manifest), encoding="utf-8")
