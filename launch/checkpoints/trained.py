"""A trained model of a run, ready to be scored or to draw text."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from launch.checkpoints.store import Checkpoints
from launch.config.reader import ResolvedConfig
from launch.data import opening
from launch.run import compiler_check
from launch.run.assemble import Run, assemble
from launch.terminal.lines import waiting
from tasks.store import TokenStore


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a checkpoint holds, on the mesh of its run.

    Attributes:
        run: the assembled run.
        store: its data.
        params: the parameters.
        step: step they are of.
    """

    run: Run
    store: TokenStore
    params: Any
    step: int


@contextlib.contextmanager
def restored(
    config: ResolvedConfig, step: int | None = None, *, quiet: bool
) -> Iterator[Trained]:
    """Restores the parameters of a step.

    Args:
        config: of the run.
        step: step of the checkpoint; None takes the newest.
        quiet: whether no progress is shown.
    Raises:
        DeviceError: jax finds no device of the run's platform.
        StoreError: the store of the run is missing or damaged.
        CheckpointError: there is no such checkpoint, or it does not fit.
        CompilerCheckError: the compiler of the CPU computes wrong numbers, unless
            SELF_CHECK is "off".
    """
    run = assemble(config)
    if config.settings.loop.self_check == "on":
        compiler_check.check()
    store = opening.open_checked(config)
    model_dir = config.settings.loop.model_dir
    with (
        jax.set_mesh(run.mesh),
        Checkpoints(model_dir, keep=1, read_only=True) as saved,
    ):
        step = saved.require(step)
        with waiting(f"restoring step {step}", quiet=quiet):
            params = saved.restore_params(step, run, store.manifest)
        yield Trained(run, store, params, step)
