"""A trained model of a run, ready to be scored or to draw text."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from launch.checkpoints.places import VOCABULARY
from launch.checkpoints.store import Checkpoints
from launch.checkpoints.there import place_of
from launch.config.diff import changes, told
from launch.config.reader import ResolvedConfig
from launch.data import opening
from launch.run import compiler_check
from launch.run.assemble import Run
from launch.terminal.lines import waiting
from tasks import vocabularies
from tasks.vocabularies import Vocabulary


@contextlib.contextmanager
def restored(
    config: ResolvedConfig,
    run: Run,
    vocabulary: Vocabulary,
    step: int | None = None,
    *,
    quiet: bool,
) -> Iterator[tuple[Any, int]]:
    """Restores the parameters of a step, on the mesh of a run.

    Args:
        config: configuration of the run.
        run: the run, assembled.
        vocabulary: what the parameters must have learnt.
        step: step of the checkpoint; None takes the newest.
        quiet: whether no progress is shown.
    Yields:
        The parameters, and their step; with the run's mesh set.
    Raises:
        CheckpointError: there is no such checkpoint, or it does not fit.
        CompilerCheckError: the compiler of the CPU computes wrong numbers, unless
            SELF_CHECK is "off".
    """
    if config.settings.loop.self_check == "on":
        compiler_check.check()
    model_dir = config.settings.loop.model_dir
    bucket = place_of(Path(model_dir), config.settings.loop.checkpoint_dir)
    with (
        jax.set_mesh(run.mesh),
        Checkpoints(model_dir, keep=1, bucket=bucket, read_only=True) as saved,
    ):
        step = saved.require(step)
        now = {
            "config": config.operative,
            "vocabulary_fingerprint": vocabulary.fingerprint,
        }
        with waiting(f"restoring step {step}", quiet=quiet):
            params = saved.restore_params(step, run, now)
        found = changes(saved.manifest(step)["config"], config.operative)
        if not quiet and (other := [change for change in found if change.fixed]):
            print(f"  other than when it was trained: {told(other)}", file=sys.stderr)
        yield params, step


def keep_vocabulary(model_dir: Path, vocabulary: Vocabulary) -> None:
    """Writes a vocabulary into the folder of a run, which then needs no tokens."""
    folder = model_dir / VOCABULARY
    folder.mkdir(exist_ok=True)
    for name, content in vocabularies.to_files(vocabulary).items():
        (folder / name).write_bytes(content)


def vocabulary_of(config: ResolvedConfig) -> Vocabulary:
    """Returns the vocabulary of a run: its own, or that of its tokens.

    Raises:
        StoreError: it has neither.
    """
    folder = Path(config.settings.loop.model_dir, VOCABULARY)
    if not folder.is_dir():
        return opening.open_checked(config).vocabulary

    def read(name: str) -> bytes | None:
        file = folder / name
        return file.read_bytes() if file.is_file() else None

    return vocabularies.from_files(read, str(folder))
