"""However deep a model is, its layers are traced once."""

import jax
import pytest

from launch.config import reader
from launch.run.assemble import assemble


def lowered_lines(num_layers: int) -> int:
    mesh = ["SIMULATED_DEVICES=4", "MESH_DATA=2", "MESH_EXPERT=2"]
    knobs = [f"NUM_LAYERS={num_layers}", *mesh]
    run = assemble(reader.read(["runs/tiny.gin"], knobs))
    with jax.set_mesh(run.mesh):
        return run.lower_train_step().as_text().count("\n")


@pytest.mark.slow
def test_the_program_of_64_layers_is_as_long_as_that_of_4():
    # Dense and sparse layers in turn: each kind is the body of one loop.
    assert lowered_lines(64) == lowered_lines(4) > 1000
