"""A checkpoint whose layers share parameters, made one whose layers have their own.

It computes the same, and goes on from there: pseudo-to-real training (M6-10T,
arXiv:2110.03888, section 3.2).
"""

import time
from pathlib import Path
from typing import Any

from launch.checkpoints import copying
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import (
    CheckpointError,
    DamagedError,
    folder_of,
    read_manifest,
    sealed,
)
from launch.checkpoints.sums import Digest
from launch.checkpoints.writing import manifest_written
from launch.checkpoints.written import Written
from launch.config.edit import with_values
from moe.layers import Layers


def delink(model_dir: Path, path: Path, to: Path, layers: Layers, code: Any) -> Path:
    """Writes a checkpoint in which each layer has a copy of what it shared.

    Of parameters and of the optimizer's state alike. Step, place in the data and all
    else stay.

    Args:
        model_dir: the run whose layers share.
        path: the folder of one of its steps.
        to: folder of the run that is made.
        layers: those of the run.
        code: versions of what makes it, for its manifest.
    Returns:
        The new checkpoint.
    Raises:
        CheckpointError: nothing is shared, or the checkpoint cannot be written.
        DamagedError: it is damaged.
    """
    step = int(path.name)
    manifest = read_manifest(path)
    source = Arrays(path, manifest)
    copies = {
        name: copies_of(name, said["shape"], layers)
        for name, said in source.saved.items()
    }
    if max(copies.values()) == 1:
        raise CheckpointError(f"the layers of {path} share no parameters")
    other = {"LAYER_SHARING": "none", "MODEL_DIR": str(to), "CHECKPOINT_DIR": ""}
    config = with_values(manifest["config"], other)
    with copying.arriving(to, step) as part:
        kept = {
            name: _copied(source, name, copies[name], part / "state")
            for name in source.saved
        }
        made = manifest | {
            "config": config,
            "arrays": kept,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "parents": [{"path": str(folder_of(model_dir) / str(step)), "step": step}],
            **code,
        }
        manifest_written(part, sealed(made))
        copying.beside(model_dir.expanduser().absolute(), to, config)
    return folder_of(to) / str(step)


def copies_of(name: str, shape: list[int], layers: Layers) -> int:
    """Returns how many layers share an array; 1 for all that is not shared.

    Args:
        name: its path in the state, such as
            "params/decoder/layers/0/1/sparse/router".
        shape: sizes of its dimensions; the first is 1 where layers share it.
        layers: those of the model.
    """
    names = name.split("/")
    for place, stack in enumerate(names):
        if stack in layers.stacks and names[place + 1 : place + 2] == ["layers"]:
            segment = layers.stacks[stack].segments[int(names[place + 2])]
            return segment.uses if shape[:1] == [1] else 1
    return 1


def _copied(source: Arrays, name: str, copies: int, state: Path) -> dict[str, Any]:
    """Writes an array so many times along its first dimension; returns what it is.

    What is read is digested on the way, so that no damaged array goes on.
    """
    said = source.saved[name]
    shape = list(said["shape"])
    if copies > 1:
        shape[0] = copies
    like = source.opened(name).spec().to_json()["metadata"]
    written = Written(state, name, like | {"shape": shape})
    read = Digest(tuple(said["shape"]))
    for place, values in source.blocks(name):
        read.add(place, values)
        for copy in range(copies):
            there = (slice(copy, copy + 1), *place[1:]) if copies > 1 else place
            written.add(there, values)
    if read.digest() != said["digest"]:
        raise DamagedError(source.path, f"{name} is not what was saved")
    return said | {"shape": shape, "digest": written.digest()}
