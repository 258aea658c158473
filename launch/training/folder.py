"""The folder of a run: who may write to it, and what is kept in it for others."""

import contextlib
import fcntl
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from launch.checkpoints.trained import keep_vocabulary
from launch.config.reader import ResolvedConfig
from launch.errors import UserError
from launch.job import together
from tasks.vocabularies import Vocabulary


class ModelDirError(UserError):
    """The folder of a run cannot be used."""


@contextlib.contextmanager
def owned(model_dir: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps a second run out of it.

    Of several processes the first holds it for all.

    Raises:
        ModelDirError: it cannot be written, another run is writing to it, or the
            processes of this one do not share it.
    """
    with contextlib.ExitStack() as held:
        together.first_alone(
            "locking MODEL_DIR",
            functools.partial(_lock, model_dir, held),
            functools.partial(_refuse_unshared, model_dir),
        )
        yield


def _lock(model_dir: Path, held: contextlib.ExitStack) -> None:
    """Makes the folder, and locks it until `held` is left."""
    with _writing(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
        # It may be another run's: nothing is changed before it is locked. Without
        # a buffer, a full disk is noticed here, and not when the file is closed.
        lock = held.enter_context((model_dir / "run.lock").open("ab", buffering=0))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelDirError(
                f"another run is writing to {model_dir}: take another MODEL_DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} {time.time():.0f}\n".encode())


def _refuse_unshared(model_dir: Path) -> None:
    if not (model_dir / "run.lock").is_file():
        raise ModelDirError(
            f"MODEL_DIR = {str(model_dir)!r} is not the folder that process 0 has "
            "made: all processes of a job need one that they share, such as one on NFS"
        )


def keep(
    model_dir: Path, config: ResolvedConfig, step: int, vocabulary: Vocabulary
) -> None:
    """Keeps what is needed of the run, wherever it is used.

    The newest configuration, one for each start, and the vocabulary.

    Args:
        model_dir: the folder.
        config: configuration of this start.
        step: step that it goes on from.
        vocabulary: vocabulary of its tokens.
    """
    operative, store_dir = config.operative, config.settings.data.store_dir
    if "://" not in store_dir:
        line = "\nSTORE_DIR = {!r}  # "
        absolute = line.format(os.path.abspath(store_dir))
        operative = operative.replace(line.format(store_dir), absolute)
    with _writing(model_dir):
        keep_vocabulary(model_dir, vocabulary)
        (model_dir / "config.gin").write_text(operative, encoding="utf-8")
        lives = model_dir / "configs"
        lives.mkdir(exist_ok=True)
        number = len(list(lives.glob("*.gin"))) + 1
        name = f"{number:03}_from_step_{step}.gin"
        (lives / name).write_text(operative, encoding="utf-8")


@contextlib.contextmanager
def _writing(model_dir: Path) -> Iterator[None]:
    """Says in one line what keeps the folder of a run from being written."""
    try:
        yield
    except OSError as error:
        raise ModelDirError(
            f"cannot write to MODEL_DIR = {str(model_dir)!r}: {error.strerror or error}"
        ) from error
