"""Where a checkpoint comes from: configuration, data, code, command and machines."""

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from tasks.manifest import Manifest as StoreManifest

_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorstore",
    "numpy",
)
_GIT_SECONDS = 10


def fingerprints(store: StoreManifest) -> dict[str, str]:
    """What a checkpoint remembers of its data."""
    return {
        "data_fingerprint": store.fingerprint,
        "vocabulary_fingerprint": store.vocabulary_fingerprint,
    }


def provenance(operative: str, store: StoreManifest) -> dict[str, Any]:
    """Where the checkpoints of one start of a run come from.

    Args:
        operative: the configuration, every knob.
        store: manifest of the tokens.
    """
    return {
        "config": operative,
        "task": store.name,
        "command": list(sys.argv),
        "jax_version": jax.__version__,
        **code(),
        "hosts": jax.process_count(),
        "devices": jax.device_count(),
        "device_kind": jax.devices()[0].device_kind,
        **fingerprints(store),
    }


@functools.cache
def code() -> dict[str, Any]:
    """The version of Switchyard and of what it computes with.

    `git` is the commit of the sources that run and whether they were changed since, or
    None where they are no checkout.
    """
    return {
        "code_version": importlib.metadata.version("switchyard"),
        "git": _git(Path(__file__).resolve().parent),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        },
    }


def _git(sources: Path) -> dict[str, Any] | None:
    """Asks git about the sources; a checkout around an installed copy is another's."""
    here = Path(__file__).name
    if _asked(sources, "ls-files", "--error-unmatch", "--", here) is None:
        return None
    commit = _asked(sources, "rev-parse", "HEAD")
    changed = _asked(sources, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _asked(folder: Path, *words: str) -> str | None:
    """What git answers; None if it is not here, or has none."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=environ | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
