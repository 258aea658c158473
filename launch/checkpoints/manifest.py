"""What a checkpoint says about itself, made when it is saved."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from launch.checkpoints.digest import digests
from launch.checkpoints.places import FORMAT, sealed
from launch.run.assemble import Run
from moe.training.train_state import TrainState


def manifest_of(
    state: TrainState,
    arrays: Mapping[str, jax.Array],
    run: Run,
    parents: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Makes the manifest of a state, every array of it digested.

    Args:
        state: what is saved.
        arrays: its arrays by name.
        run: gives the mesh.
        parents: path and step of the checkpoints that it came from.
        provenance: what is known of configuration, data, code and machines.
    """
    checksums = digests(arrays)
    return sealed(
        {
            "format": FORMAT,
            "step": int(state.step),
            "data_index": int(state.data_index),
            "skipped_in_a_row": int(state.skipped_in_a_row),
            "arrays": {
                name: {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "digest": checksums[name],
                }
                for name, array in arrays.items()
            },
            "mesh": dataclasses.asdict(run.settings.mesh),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "parents": list(parents),
            **provenance,
        }
    )
