"""The mean of the parameters of several checkpoints, as a run to score and draw from.

Averaging the last steps of one run, or runs that began alike, often scores better than
any of them (arXiv:1803.05407, arXiv:2203.05482).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launch.checkpoints import copying
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import (
    FORMAT,
    CheckpointError,
    DamagedError,
    folder_of,
    read_manifest,
    sealed,
)
from launch.checkpoints.sums import Digest
from launch.checkpoints.writing import manifest_written
from launch.checkpoints.written import Written
from launch.config.diff import OF_THE_MODEL, changes
from launch.config.places import sections


def average(
    paths: Sequence[Path], to: Path, code: dict[str, Any], names: Sequence[Path]
) -> Path:
    """Writes the mean of parameters, computed in float32 and kept in their type.

    Args:
        paths: folders of steps, two or more; the configuration is that of the first.
        to: folder of the run that is made.
        code: versions of what computes it, for its manifest.
        names: places of the steps in the folders of their runs.
    Returns:
        The new checkpoint; its step is the latest of those given.
    Raises:
        CheckpointError: they are not checkpoints of one model and vocabulary, or the
            mean cannot be written.
        DamagedError: one of them is damaged.
    """
    if len(set(paths)) < 2:
        raise CheckpointError("the mean of one checkpoint is itself: give two or more")
    manifests = [read_manifest(path) for path in paths]
    refuse_others(paths, manifests)
    sources = [
        Arrays(path, manifest) for path, manifest in zip(paths, manifests, strict=True)
    ]
    step = max(manifest["step"] for manifest in manifests)
    with copying.arriving(to, step) as part:
        kept = {}
        for name, said in sources[0].saved.items():
            if name.startswith("params/"):
                digest = _mean(name, sources, part / "state")
                kept[name] = dict(said) | {"digest": digest}
        manifest = {
            **manifests[0],
            "format": FORMAT,
            "step": step,
            "skipped_in_a_row": 0,
            "arrays": kept,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "parents": [
                {"path": str(name), "step": manifest["step"]}
                for name, manifest in zip(names, manifests, strict=True)
            ],
            **code,
        }
        manifest_written(part, sealed(manifest))
        copying.beside(names[0].parents[1], to)
    return folder_of(to) / str(step)


def refuse_others(paths: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """Raises what keeps checkpoints from being averaged."""
    section = sections()
    first = _parameters(manifests[0])
    for path, manifest in zip(paths[1:], manifests[1:], strict=True):
        other = _parameters(manifest)
        if first != other:
            names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
            raise CheckpointError(
                f"{path} has other parameters than {paths[0]}, in "
                f"{', '.join(names[:5])}: only those of one model have a mean"
            )
        found = changes(manifests[0]["config"], manifest["config"])
        model = [
            str(change)
            for change in found
            if change.fixed and section.get(change.macro) in OF_THE_MODEL
        ]
        if manifests[0]["vocabulary_fingerprint"] != manifest["vocabulary_fingerprint"]:
            model.append("its vocabulary")
        if model:
            raise CheckpointError(
                f"{path} is of another model than {paths[0]}: {', '.join(model)}"
            )


def _parameters(manifest: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (array["dtype"], tuple(array["shape"]))
        for name, array in manifest["arrays"].items()
        if name.startswith("params/")
    }


def _mean(name: str, sources: Sequence[Arrays], state: Path) -> str:
    """Writes the mean of an array, piece by piece; returns its digest.

    What is read is digested on the way, so that no damaged array is averaged.
    """
    opened = [source.opened(name) for source in sources]
    written = Written(state, name, opened[0].spec().to_json()["metadata"])
    sums = [Digest(opened[0].shape) for _ in sources]
    for place, values in sources[0].blocks(name):
        total = np.asarray(values, np.float32)
        sums[0].add(place, values)
        for number in range(1, len(sources)):
            read = opened[number][place].read()
            others = np.asarray(sources[number].result(name, read))
            sums[number].add(place, others)
            total = total + np.asarray(others, np.float32)
        written.add(place, (total / np.float32(len(sources))).astype(values.dtype))
    for source, found in zip(sources, sums, strict=True):
        if found.digest() != source.saved[name]["digest"]:
            raise DamagedError(source.path, f"{name} is not what was saved")
    return written.digest()
