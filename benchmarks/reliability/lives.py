"""Lives of a run, begun in milliseconds: forks of a process that has all imported.

A life is `switchyard train` (or another verb) with its own process, files and signals.
"""

import collections
import functools
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

IMPORTED = (
    *("jax", "optax", "orbax.checkpoint", "tensorstore", "rich.live", "tensorboardX"),
    *("launch.training.start", "launch.report.run", "launch.evaluation.sampling"),
    *("launch.commands.train", "launch.commands.evaluate"),
    *("launch.checkpoints.trained", "launch.config.reader"),
)
_HEARD = (signal.SIGINT, signal.SIGTERM)
FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


def warm_up(cache: Path) -> None:
    """Imports what a run needs; starts no backend of jax, and no thread that matters.

    Args:
        cache: folder of compiled programs, which all lives share.
    """
    # jax reads these when it is imported.
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in IMPORTED:
        importlib.import_module(name)


class Life:
    """A command in a forked process.

    Args:
        words: words of the command line.
        output: file that its output is added to.
        process: number of this process in its job; -1 where it is alone.
    """

    def __init__(self, words: Sequence[str], output: Path, process: int = -1) -> None:
        self.began = time.monotonic()
        self._code: int | None = None
        # A signal that comes before the life has handlers of its own waits for them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os._exit(_run(words, output, process))
            except KeyboardInterrupt:  # as Python itself ends then
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
            finally:  # never what the process was doing that was forked
                os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process was waited for and its number is free."""
        if self._code is None:
            os.kill(self.pid, number)

    def is_over(self) -> bool:
        """Says whether the process has ended, and leaves its exit code for `end`."""
        status = Path(f"/proc/{self.pid}/stat").read_text()
        return status.rpartition(") ")[2][0] == "Z"

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while it goes on."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self._code

    def end(self, seconds: float = 600.0) -> int:
        """Waits for the exit code.

        Raises:
            TimeoutError: it hangs; it is killed.
        """
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                raise TimeoutError(f"process {self.pid} did not end")
            time.sleep(0.005)
        return code


def _run(words: Sequence[str], output: Path, process: int) -> int:
    """What the forked process does."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from launch import cli
    from launch.config import platform

    if process >= 0:
        import jax

        os.environ["JAX_PROCESS_ID"] = str(process)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax is imported, but not started: it still reads what is set now.
    environ = collections.ChainMap(os.environ)
    platform.prepare_environment = functools.partial(
        platform.prepare_environment, environ=environ
    )
    code = cli.main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def words_of(folder: Path, store: Path, **knobs: object) -> list[str]:
    """Words of a run of 40 tiny steps that saves every 4th, and scores every 10th."""
    given = {
        "MODEL_DIR": folder,
        "STORE_DIR": store,
        "XLA_FLAGS": FLAGS,
        "NUM_LAYERS": 1,
        "MOE_EVERY": 1,
        "TRAIN_STEPS": 40,
        "LOG_PERIOD": 1,
        "CHECKPOINT_PERIOD": 4,
        "EVAL_PERIOD": 10,
        "EVAL_BATCHES": 2,
        "LAST_EVAL_BATCHES": 4,
        "SELF_CHECK": "off",
        "COMPILE_AHEAD": "train_step",
        **knobs,
    }
    knob_words = [f"--gin.{name}={value}" for name, value in given.items()]
    return ["train", "--gin_file=configs/runs/tiny.gin", "--quiet", *knob_words]


def fresh(folder: Path) -> Path:
    """Returns the folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def preparing(store: Path) -> list[str]:
    """Words that make the tokens of the runs."""
    words = ["prepare", "--gin_file=configs/runs/tiny.gin", "--quiet"]
    return [*words, f"--gin.STORE_DIR={store}"]


def prepare(store: Path) -> None:
    """Makes the tokens of the runs, in a process of its own."""
    if code := Life(preparing(store), store.with_suffix(".log")).end():
        raise RuntimeError(f"preparing {store} ended with {code}")
