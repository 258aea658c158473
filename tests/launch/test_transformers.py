"""Models that `transformers` has saved, and reads again, where it is installed."""

import re

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.names import unnamed
from launch.checkpoints.places import read_manifest
from launch.config import reader
from launch.exchange import checking, observing, tensors
from moe.model.execution import Execution
from moe.model.transformer import Model
from moe.settings import ExecutionSettings
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow
DRAWN = 20
FLOAT32 = ("--gin.DTYPE=float32", "--gin.SELF_CHECK=off")


@pytest.mark.parametrize("name", random_models.MODELS)
def test_a_model_comes_in_draws_and_goes_out(name, tmp_path):
    source, run, back = tmp_path / "public", tmp_path / "run", tmp_path / "back"
    model = random_models.save(name, source)
    two = "decoder_start_token_id" in random_models.MODELS[name][1]
    more = [f"--gin.EXTRA_IDS={random_models.SENTINELS}"] * two
    more += ["--gin.MASK_TOKEN=w5"] * (name == "bert")
    done = commands.inline("convert", str(source), str(run), *FLOAT32, *more)
    assert done.code == 0, done.err
    assert f"transformers {transformers.__version__} and step 0 of" in done.err
    agreed = re.search(r"([\d,]+) of ([\d,]+) choices of experts agree", done.err)
    assert agreed is None or agreed[1] == agreed[2]
    right = checking.by_transformers(source).seen.logits
    assert np.abs(on_eight_devices(run) - right).max() <= 1e-4
    if two or type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        ids = torch.tensor([[5, 9, 20, 2] if two else [1, 5, 9, 20]])
        (made,) = model.generate(
            ids, max_new_tokens=DRAWN, do_sample=False, suppress_tokens=[0]
        ).tolist()
        made = [5, 9, 20, *made] if two else made
        words = random_models.VOCAB - random_models.SENTINELS * two
        wanted = [f"w{n - 3}" for n in made if 2 < n < words]
        options = [f"--num_tokens={DRAWN}", "--temperature=0", "--prompt=w2 w6 w17"]
        options += ["--gin.OBJECTIVE=seq2seq"] * two
        drawn = commands.inline("generate", f"--model_dir={run}", *options)
        assert drawn.code == 0, drawn.err
        assert drawn.out.split() == wanted
    done = commands.inline("convert", str(run), str(back))
    assert done.code == 0, done.err
    assert f"and transformers {transformers.__version__}: logits" in done.err
    before, after = (tensors.open_tensors(folder) for folder in (source, back))
    assert sorted(after) == sorted(before)
    for key, tensor in before.items():
        assert np.array_equal(tensor.read(), after[key].read()), key


def on_eight_devices(run):
    """Logits of the check's tokens, from the run's checkpoint.

    The odd vocabulary does not divide over `model`.
    """
    config = reader.read([str(run / "config.gin")], [f"MODEL_DIR='{run}'"])
    mesh = make_mesh(MeshSettings(data=2, expert=2, context=2))
    execution = ExecutionSettings(dtype="float32", remat="none")
    layers = observing.token_by_token(config.settings.layers)
    model = Model(layers, Execution(execution, mesh))
    path = run / "checkpoints" / "0"
    arrays = Arrays(path, read_manifest(path))
    found = {
        name.removeprefix("params/"): arrays.opened(name).read().result()
        for name in arrays.saved
        if name.startswith("params/")
    }
    tokens = checking.seen.tokens_for(
        model.layers.stacks, config.settings.model.vocab_size
    )
    rows = {name: np.concatenate([ids] * 2) for name, ids in tokens.items()}
    batch = observing.batch_of(rows)  # a row for each device
    with jax.default_matmul_precision("highest"):
        logits_BLV, _ = jax.jit(
            lambda params, batch: forward(model, params, batch, jnp.arange(4))
        )(unnamed(found, model.specs), batch)
    return np.asarray(logits_BLV)[:2].reshape(-1, logits_BLV.shape[-1])
