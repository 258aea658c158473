"""Layers that shared parameters get their own, and training goes on from there."""

import json
from pathlib import Path

import commands
import numpy as np
import pytest

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.delinking import copies_of
from launch.checkpoints.names import named_arrays
from launch.checkpoints.places import read_manifest
from launch.config import reader
from launch.errors import EXIT_DONE
from moe.model import inventory
from moe.training import new_state
from moe.training.optimizer import make_optimizer

KNOBS = {
    "NUM_LAYERS": 2,
    "LAYER_SHARING": "all",
    "ROUTER_BIAS": True,
    "TRAIN_STEPS": 3,
    "WARMUP_STEPS": 1,
    "CHECKPOINT_PERIOD": 2,
    "EVAL_PERIOD": 3,
    "LAST_EVAL_BATCHES": 1,
    "SELF_CHECK": "off",
    "COMPILE_AHEAD": "train_step",
}


def losses_of(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss/total"] for r in lines if r["split"] == "train"}


def arrays_of(folder: Path, step: int) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / str(step)
    arrays = Arrays(path, read_manifest(path))
    return {
        name: np.asarray(arrays.opened(name).read().result()) for name in arrays.saved
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    "knobs",
    [
        ("OPTIMIZER='adafactor'", "BETA1=0.0", "EMBED_DIM=128", "MLP_DIM=256"),
        ("OPTIMIZER='muon'", "NUM_LAYERS=6"),
        ("PARAM_DTYPE='bfloat16'", "ROUNDING='master'", "ROUTER_BIAS=True"),
        ("PREDICT_AHEAD=1", "FIRST_DENSE_LAYERS=2", "NUM_LAYERS=6"),
    ],
)
def test_every_array_of_every_optimizer_gets_the_shape_of_layers_of_their_own(knobs):
    def shapes(sharing: str):
        given = ["NUM_LAYERS=4", *knobs, f"LAYER_SHARING={sharing!r}"]
        settings = reader.read(["runs/tiny.gin"], given).settings
        layers = settings.layers
        optimizer = make_optimizer(settings.optimizer, 20, inventory.specs(layers))
        state = new_state.abstract(layers, settings.execution.param_dtype, optimizer)
        found = named_arrays(state)
        return layers, {name: list(x.shape) for name, x in found.items()}

    layers, shared = shapes("all")
    _, own = shapes("none")
    delinked = {
        name: [copies, *shape[1:]]
        if (copies := copies_of(name, shape, layers)) > 1
        else shape
        for name, shape in shared.items()
    }
    assert delinked == own
    assert delinked != shared


def test_a_delinked_run_goes_on_where_the_shared_one_was(trained, tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    done = commands.inline("train", *trained.knobs(shared, **KNOBS))
    assert done.code == EXIT_DONE, done.err
    words = ("delink", f"--model_dir={shared}", f"--to={own}", "--quiet")
    done = commands.inline(*words, "--step=2")
    assert done.code == EXIT_DONE, done.err
    before, after = arrays_of(shared, 2), arrays_of(own, 2)
    assert before.keys() == after.keys()
    for name, array in after.items():
        wanted = before[name]
        if "/layers/" in name and "selection_bias" not in name:
            assert wanted.shape[0] == 1, name
            wanted = np.concatenate([wanted, wanted])
        np.testing.assert_array_equal(array, wanted, name)
    said = [read_manifest(run / "checkpoints" / "2") for run in (shared, own)]
    assert said[0]["data_index"] == said[1]["data_index"] == 2
    assert said[1]["parents"] == [{"path": str(shared / "checkpoints/2"), "step": 2}]
    verified = commands.inline("checkpoint", "verify", f"--model_dir={own}")
    assert (verified.code, "whole" in verified.out) == (EXIT_DONE, True)

    done = commands.inline("train", f"--gin_file={own / 'config.gin'}")
    assert done.code == EXIT_DONE, done.err
    # The third step's loss is formed before its update: of the same function.
    np.testing.assert_allclose(losses_of(own)[3], losses_of(shared)[3], rtol=1e-6)
    params = arrays_of(own, 3)
    below, above = params["params/decoder/layers/0/0/attention/query"]
    assert not np.array_equal(below, above), "layers have become different"

    again = commands.inline("delink", f"--model_dir={own}", f"--to={tmp_path / 'no'}")
    assert again.code == 1
    assert "share no parameters" in again.err
