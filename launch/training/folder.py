"""The folder of a run: who may write to it, and what is kept in it for others."""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.checkpoints.trained import keep_vocabulary
from launch.config.reader import ResolvedConfig
from launch.errors import EXIT_USER_ERROR, UserError
from launch.job import end, together
from launch.job.signals import Signals
from tasks import owner
from tasks.vocabularies import Vocabulary

_STOPPING = "stopping.json"  # is there while a run that was asked to stop saves


class ModelDirError(UserError):
    """The folder of a run cannot be used."""


@contextlib.contextmanager
def owned(model_dir: Path) -> Iterator[Callable[[], None]]:
    """Makes the folder of a run, and keeps a second run out of it.

    Of several processes the first holds it for all.

    Args:
        model_dir: the folder.
    Returns:
        A function that ends the process at once if the folder is no longer its own: to
        be called before much is written.
    Raises:
        ModelDirError: it cannot be written, another run is writing to it, or the
            processes of this one do not share it.
    """
    with contextlib.ExitStack() as held:
        yield together.first_alone(
            "locking MODEL_DIR",
            functools.partial(_lock, model_dir, held),
            functools.partial(_refuse_unshared, model_dir),
        )


def _lock(model_dir: Path, held: contextlib.ExitStack) -> Callable[[], None]:
    """Makes the folder, and locks it until `held` is left."""
    path = model_dir / "run.lock"
    with _writing(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
        # It may be another run's: nothing is changed before it is locked. Without
        # a buffer, a full disk is noticed here, and not when the file is closed.
        lock = held.enter_context(path.open("ab", buffering=0))
        still_ours: Callable[[], None] = _nothing
        try:
            if not owner.locked(lock):
                file = model_dir / "run.owner"
                still_ours = held.enter_context(
                    owner.owned(file, say=_say, lost=functools.partial(_lost, file))
                )
        except BlockingIOError:
            # The first word is a process, the others where and since when.
            pid, _, where = path.read_text(errors="replace").strip().partition(" ")
            raise _refused(model_dir, f"process {pid} {where}") from None
        except owner.TakenError as taken:
            raise _refused(model_dir, str(taken)) from None
        lock.truncate(0)
        me = owner.myself()
        lock.write(f"{me.pid} on {me.host}, since {me.since}\n".encode())
    return still_ours


def _refused(model_dir: Path, who: str) -> ModelDirError:
    return ModelDirError(
        f"another run is writing to {model_dir} ({who}): take another MODEL_DIR"
    )


def _say(message: str) -> None:
    print(f"  {message}", file=sys.stderr, flush=True)


def _lost(file: Path, why: str) -> None:
    """Ends a run from which another has taken its folder."""
    message = f"{why}: this run writes no more to {file.parent}"
    print(message, file=sys.stderr, flush=True)
    end.leave_all(EXIT_USER_ERROR, message)


def _nothing() -> None:
    """Does nothing."""


def _refuse_unshared(model_dir: Path) -> Callable[[], None]:
    if not (model_dir / "run.lock").is_file():
        raise ModelDirError(
            f"MODEL_DIR = {str(model_dir)!r} is not the folder that process 0 has "
            "made: all processes of a job need one that they share, such as one on NFS"
        )
    return _nothing


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


# ------------------------------------------------------------- a run that is to stop


def _kept(model_dir: Path) -> str:
    """Says which checkpoint is kept, whatever happens now."""
    steps = _steps(model_dir)
    if not steps:
        return "no checkpoint was saved yet"
    return (
        f"the checkpoint of step {max(steps):,} is kept; the same command goes on from "
        "it, and what was learnt since is learnt again"
    )


def be_ready_to_stop(model_dir: Path, signals: Signals, grace_seconds: float) -> None:
    """Has a signal noted in the folder until the run has saved.

    Says once that the last start was killed before it had.

    Args:
        model_dir: folder of the run.
        signals: who may ask it to stop.
        grace_seconds: time that it then has; 0 if nobody knows.
    """
    if not together.is_first():
        return

    def begin() -> None:
        text = json.dumps({"asked": time.strftime("%Y-%m-%d %H:%M:%S")})
        (model_dir / _STOPPING).write_text(text, encoding="utf-8")

    _say_if_killed(model_dir, grace_seconds)
    signals.kept = functools.partial(_kept, model_dir)
    signals.begin_to_stop = begin


def has_stopped(model_dir: Path, signals: Signals, grace_seconds: float) -> None:
    """Takes that back; says if it took longer than the scheduler may wait."""
    if not together.is_first():
        return
    (model_dir / _STOPPING).unlink(missing_ok=True)
    seconds = signals.seconds_since()
    if 0 < grace_seconds < seconds:
        print(
            f"warning: it took {seconds:.0f} s to stop and save, more than "
            f"GRACE_SECONDS = {grace_seconds:g}, after which the scheduler kills: ask "
            "it for more, or lower CHECKPOINT_PERIOD",
            file=sys.stderr,
        )


def _say_if_killed(model_dir: Path, grace_seconds: float) -> None:
    path = model_dir / _STOPPING
    if not path.is_file():
        return
    try:
        asked = json.loads(path.read_text(encoding="utf-8"))["asked"]
    except (ValueError, KeyError, TypeError):  # killed while it wrote that
        asked = "some time"
    path.unlink()
    steps, allowed = _steps(model_dir), ""
    if grace_seconds:
        allowed = f" (GRACE_SECONDS = {grace_seconds:g})"
    print(
        f"warning: at {asked} this run was asked to stop, and killed before it had "
        f"saved{allowed}; it goes on from step {max(steps, default=0):,}. Give it more "
        "time between SIGTERM and SIGKILL, or lower CHECKPOINT_PERIOD",
        file=sys.stderr,
    )


def _steps(model_dir: Path) -> list[int]:
    """Steps of the checkpoints that are whole: their folders have no other name."""
    names = (path.name for path in (model_dir / "checkpoints").glob("*"))
    return [int(name) for name in names if name.isdecimal()]
