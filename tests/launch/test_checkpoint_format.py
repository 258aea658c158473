"""A checkpoint that was saved by an earlier version is read by this one.

The folder `format_1` was written by

    python tests/launch/test_checkpoint_format.py tests/launch/format_1

and the paths in its `commit_success.txt` were taken out. Never write it again: what
comes later must read it as it is.
"""

import json
import shutil
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from test_checkpoints import DATA

from launch.checkpoints import provenance
from launch.checkpoints.names import named_arrays
from launch.checkpoints.places import FORMAT, CheckpointError
from launch.checkpoints.store import Checkpoints
from launch.config import reader
from launch.run.assemble import Run, assemble

KNOBS = (
    "BATCH_SIZE=16 EMBED_DIM=8 MLP_DIM=8 EXPERT_MLP_DIM=8 NUM_HEADS=2 HEAD_DIM=4 "
    "NUM_LAYERS=5 FIRST_DENSE_LAYERS=1 MOE_EVERY=2 NUM_EXPERTS=4 "
    "EXPERTS_PER_LAYER=(2,4) ROUTER_BIAS=True ACTIVATION=swiglu EXPERT_BIASES=True "
    "POSITIONS=relative TIE_EMBEDDINGS=False SHARED_EXPERT_MLP_DIM=8"
)
SAVED = Path(__file__).parent / f"format_{FORMAT}"
STEP = 7


def a_run(*knobs: str) -> Run:
    given = [*KNOBS.split(), "SIMULATED_DEVICES=8", *knobs]
    return assemble(reader.read(["runs/tiny.gin"], given))


def known_state(run: Run):
    """Numbers that follow from the names of the arrays."""

    def known(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if shape.dtype == np.int32:
            values = np.full(shape.shape, STEP, np.int32)
        else:
            first = zlib.crc32(name.encode()) % 97
            places = np.arange(int(np.prod(shape.shape))).reshape(shape.shape)
            values = ((first + places) % 13 / 8).astype(shape.dtype)
        return jax.device_put(values, shape.sharding)

    return jax.tree_util.tree_map_with_path(known, run.placed_shapes())


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(str(folder), keep=1, read_only=True)


@pytest.mark.parametrize("knobs", [(), ("MESH_DATA=2", "MESH_EXPERT=2")])
def test_a_checkpoint_of_this_format_is_read_bit_for_bit(knobs):
    run = a_run(*knobs)
    with opened(SAVED) as saved:
        found = named_arrays(
            saved.restore(STEP, run, provenance.provenance("SEED = 7\n", DATA))
        )
    wanted = named_arrays(known_state(run))
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("found", [None, FORMAT + 1])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, found):
    shutil.copytree(SAVED, tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / str(STEP) / "manifest" / "metadata"
    manifest = json.loads(place.read_text())
    del manifest["format"]
    place.write_text(json.dumps(manifest | ({"format": found} if found else {})))
    said = f"of format {found or 0}, and this version reads {FORMAT}"
    with (
        opened(tmp_path / "run") as saved,
        pytest.raises(CheckpointError, match=said),
    ):
        saved.restore(STEP, a_run())


if __name__ == "__main__":
    with Checkpoints(sys.argv[1], keep=1) as written:
        run = a_run()
        state = known_state(run)
        provenance = provenance.provenance("SEED = 7\n", DATA)
        written.save(state, run, provenance)
