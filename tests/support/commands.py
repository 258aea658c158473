"""Runs the command line in processes of its own, and in that of the tests."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from launch import cli
from launch.config.settings import PlatformSettings

ROOT = Path(__file__).resolve().parents[2]
TINY = "--gin_file=runs/tiny.gin"

# In the environment of the run of a session: none may be seen in what it says or keeps.
PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws-key",
    "HF_TOKEN": "hf_planted-token",
    "WANDB_API_KEY": "planted-wandb-key",
    "HTTPS_PROXY": "http://user:planted-password@proxy.invalid:3128",
}

# Names the modules that are imported before the first step; ends with 99 instead of 0
# if what only `prepare` needs was imported.
LIGHT = """
import sys
from launch import cli

def before_jax(platform, original=cli._before_jax):
    found = original(platform)
    from launch.training import loop

    def train(*given, original=loop.train, **named):
        ours = {"configs", "launch", "moe", "partitioning", "tasks"}
        print("imported", *(m for m in sys.modules if m.partition(".")[0] in ours))
        return original(*given, **named)

    loop.train = train
    return found

cli._before_jax = before_jax
code = cli.main()
heavy = sorted({"tensorflow", "seqio"} & sys.modules.keys())
sys.exit(code or (99 if heavy else 0))
"""

# Says so and waits before it reads batch PAUSE_AT, until the loop has noted a signal:
# then another handler has both signals.
PAUSED = """
import os, signal, sys, time
from launch import cli
from tasks.batches import Batches

def read(batches, index, start, stop, original=Batches.read):
    if index == int(os.environ["PAUSE_AT"]):
        before = signal.getsignal(signal.SIGTERM)
        print("paused", flush=True)
        while signal.getsignal(signal.SIGTERM) is before is not signal.SIG_DFL:
            time.sleep(0.01)
    return original(batches, index, start, stop)

Batches.read = read
sys.exit(cli.main())
"""


# Says so and waits where "module:name" PAUSE_IN is called, until the run has noted a
# signal; or, if DEAF is set, for minutes in which Python hears none, as in a compiler.
PAUSED_IN = """
import functools, hashlib, importlib, os, signal, sys, time
from launch import cli

def before_jax(platform, original=cli._before_jax):
    found = original(platform)
    module, _, name = os.environ["PAUSE_IN"].partition(":")
    *holders, name = name.split(".")
    holder = functools.reduce(getattr, holders, importlib.import_module(module))
    called = getattr(holder, name)

    def paused(*arguments, **options):
        before = signal.getsignal(signal.SIGTERM)
        print("paused", flush=True)
        if os.environ["DEAF"]:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        while signal.getsignal(signal.SIGTERM) is before is not signal.SIG_DFL:
            time.sleep(0.01)
        return called(*arguments, **options)

    setattr(holder, name, paused)
    return found

cli._before_jax = before_jax
sys.exit(cli.main())
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of a test session find their data and what was compiled.

    Attributes:
        shared: a folder of the session.
    """

    shared: Path

    @property
    def store(self) -> Path:
        """Tokens of `python_topics_small`: bytes."""
        return self.shared / "store"

    def knobs(self, model_dir: Path, **knobs: Any) -> list[str]:
        """The words that choose a tiny run: its folder, and what it changes."""
        given = {
            "MODEL_DIR": model_dir,
            "STORE_DIR": self.store,
            # A hit saves ten seconds and changes no bit.
            "COMPILATION_CACHE_DIR": self.shared / "compiled",
            "LOG_PERIOD": 1,
            # One layer, a sparse one, compiles faster than two.
            "NUM_LAYERS": 1,
            "MOE_EVERY": 1,
            **knobs,
        }
        return [TINY, *(f"--gin.{macro}={value}" for macro, value in given.items())]

    def start(
        self, *words: str, program: str = "", cwd: Path = ROOT, **exported: str
    ) -> subprocess.Popen[str]:
        """Starts a command, or a program that calls `cli.main` with its words."""
        entry = ["-c", program] if program else ["-m", "launch"]
        return subprocess.Popen(
            [sys.executable, *entry, *words],
            cwd=cwd,
            env=self._environment() | exported,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **how: Any) -> Done:
        """Runs a command to its end."""
        return finish(self.start(*words, **how))

    def _environment(self) -> dict[str, str]:
        """That of the tests, without the platform and the devices they export."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("JAX_")
        }
        if sys.dont_write_bytecode:
            # Elsewhere than beside the sources, it is no trace, and saves seconds.
            kept["PYTHONDONTWRITEBYTECODE"] = ""
            kept["PYTHONPYCACHEPREFIX"] = str(self.shared / "bytecode")
        kept["PYTHONPATH"] = str(ROOT)
        kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        return kept


@dataclasses.dataclass(frozen=True)
class Trained(Place):
    """A finished run, which tests only read.

    Attributes:
        done: the command that made it.
    """

    done: Done

    @property
    def folder(self) -> Path:
        """Its MODEL_DIR."""
        return self.shared / "trained"


def inline(*words: str | Path) -> Done:
    """Runs a command in this process, which has its 8 devices already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr("launch.config.platform.prepare_environment", _compiled_once)
        try:
            code = cli.main([str(word) for word in words])
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
    return Done(code, out.getvalue(), err.getvalue())


def _compiled_once(platform: PlatformSettings) -> list[str]:
    """Keeps what a run compiles where it says, though jax has begun already."""
    if platform.compilation_cache_dir not in ("", "auto"):
        jax.config.update("jax_compilation_cache_dir", platform.compilation_cache_dir)
        compilation_cache.reset_cache()
    return []


def finish(process: subprocess.Popen[str], seconds: float = 150) -> Done:
    """Waits for the end of a command."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Done(process.returncode, out, err)
