"""Where checkpoints are in the folder of a run, and what one says about itself.

`MODEL_DIR/checkpoints/STEP` is a checkpoint: `manifest/metadata` says what it is, and
`state` holds its arrays. What has another name, such as `STEP.damaged`, is none.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.errors import UserError

FOLDER = "checkpoints"
VOCABULARY = "vocabulary"  # folder of it beside them
# What a later version tells apart: it goes up when names, shapes or meanings of arrays
# change, and then this folder learns to read what came before.
FORMAT = 1
ASIDE = ".damaged"
MANIFEST = "manifest/metadata"  # what a checkpoint says about itself
# As Orbax names what it has not finished; the next `train` removes what is so named.
UNFINISHED = ".orbax-checkpoint-tmp"

_SEAL = "manifest_digest"
_NEEDED = {"arrays", "config", "data_fingerprint", "vocabulary_fingerprint"}


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of something else."""


class DamagedError(CheckpointError):
    """A checkpoint that is proven to be damaged.

    Args:
        path: the checkpoint.
        what: what is damaged, as words that follow "is damaged: ".
        advice: a sentence that says what to do, if there is one to add.
    """

    def __init__(self, path: Path, what: str, advice: str = "") -> None:
        self.path = path
        self.what = what
        super().__init__(f"{path} is damaged: {what}{f'. {advice}' if advice else ''}")


def folder_of(model_dir: str | os.PathLike[str]) -> Path:
    """Returns the folder of a run's checkpoints."""
    return Path(model_dir).expanduser().absolute() / FOLDER


def steps_in(folder: Path) -> list[int]:
    """Lists the steps of a folder of checkpoints, in their order; none if it is not."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read {folder}: {error.strerror or error}"
        ) from error
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads what a checkpoint says about itself.

    Args:
        path: the folder of one step.
    Raises:
        DamagedError: it is not there, or not as it was written.
        CheckpointError: it is of another format, or cannot be read now.
    """
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(path, "its manifest/metadata is missing") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror or error}"
        ) from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):  # of JSON, or of its encoding
        raise DamagedError(path, "its manifest/metadata is not JSON") from None
    if not isinstance(manifest, dict):
        raise DamagedError(path, "its manifest/metadata is not that of a checkpoint")
    kept = manifest.get(_SEAL)
    if kept is not None and kept != _seal(manifest):
        raise DamagedError(path, "its manifest/metadata is not what was saved")
    if manifest.get("format", 0) != FORMAT:
        raise CheckpointError(
            f"{path} is of format {manifest.get('format', 0)}, and this version reads "
            f"{FORMAT}"
        )
    if not _is_whole(manifest):
        raise DamagedError(path, "its manifest/metadata lacks what it should say")
    if path.name.isdecimal() and manifest.get("step") != int(path.name):
        raise DamagedError(
            path, f"its manifest/metadata is that of step {manifest.get('step')}"
        )
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a manifest the digest by which a change of it is found."""
    return {**manifest, _SEAL: _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    said = {name: value for name, value in manifest.items() if name != _SEAL}
    text = json.dumps(said, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(manifest: Mapping[str, Any]) -> bool:
    """Whether all is there that a restore compares."""
    arrays = manifest.get("arrays")
    return (
        manifest.keys() >= _NEEDED
        and isinstance(arrays, dict)
        and all(
            isinstance(array, dict) and array.keys() >= {"shape", "dtype", "digest"}
            for array in arrays.values()
        )
    )


def short(error: BaseException) -> str:
    """The first line of an error; of a long one, how it begins and how it ends."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:80]} … {line[-120:]}"
