"""Public models become runs, and runs public models, without a bit of difference."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import commands
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tokenizers
from published import LAYERS, NUMBERS, OTHERS, SENTINELS, VOCAB, D, E, F, M, N, Shapes
from tokenizers import models, pre_tokenizers

from benchmarks.public_models import ours as small
from benchmarks.public_models.families import FAMILIES as SMALL
from launch.checkpoints import beginning
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import read_manifest, sealed
from launch.config import reader
from launch.exchange import checking, seen, tensors, writing
from launch.exchange.families import FAMILIES, config_of, knobs_of
from launch.exchange.family import ExchangeError
from launch.exchange.header import Form
from launch.exchange.numbers import numbers_of
from launch.exchange.seen import Seen
from moe.routing.capacity import capacity


def arrays_of(name: str, dtype: np.dtype) -> dict[str, np.ndarray]:
    """Random arrays under the names of their files."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (VOCAB, M),
        "model.norm.weight": (M,),
        "lm_head.weight": (VOCAB, M),
    }
    for number in range(2) if name in LAYERS else ():
        shapes |= LAYERS[name][0](f"model.layers.{number}")
    shapes = OTHERS[name][0] if name in OTHERS else shapes
    draw = np.random.default_rng(0)
    return {
        name: draw.normal(size=shape).astype(
            np.float32 if "e_score_correction_bias" in name else dtype
        )
        for name, shape in shapes.items()
    }


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    forms = {name: Form(array.dtype, array.shape) for name, array in arrays.items()}
    writing.write_tensors(folder, forms, arrays.__getitem__, shard_bytes=10_000)


def model(folder: Path, name: str, arrays: Mapping[str, np.ndarray]) -> Path:
    """A folder as they publish it, with a tokenizer."""
    folder.mkdir()
    write(folder, arrays)
    said = OTHERS[name][1] if name in OTHERS else NUMBERS | LAYERS[name][1]
    said = {"model_type": name} | said
    (folder / "config.json").write_text(json.dumps(said))
    special = ["<pad>", "</s>", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *"abcdefgh"])}
    if "shared.weight" in arrays:  # T5's sentinels are the last, in falling order
        sentinels = (f"<extra_id_{n}>" for n in reversed(range(SENTINELS)))
        words |= {word: len(words) + i for i, word in enumerate(sentinels)}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(special)
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def convert(source: Path, to: Path, *words: str) -> commands.Done:
    return commands.inline("convert", str(source), str(to), "--unchecked", *words)


def checked(source: Path, to: Path, *words: str) -> commands.Done:
    return commands.inline("convert", str(source), str(to), *words)


def bits(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[object, ...]]:
    return {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in arrays.items()}


def read(folder: Path) -> dict[str, np.ndarray]:
    return {name: one.read() for name, one in tensors.open_tensors(folder).items()}


@pytest.mark.parametrize("name", [*LAYERS, *OTHERS])
def test_what_goes_in_comes_out_again(name, tmp_path):
    arrays = arrays_of(name, np.dtype(ml_dtypes.bfloat16))
    source = model(tmp_path / "public", name, arrays)
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    verified = commands.inline("checkpoint", "verify", f"--model_dir={tmp_path}/run")
    assert verified.code == 0, verified.out
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 0, done.err
    assert bits(read(tmp_path / "back")) == bits(arrays)
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (source, tmp_path / "back")
    )
    assert {k: after[k] for k in before if before[k] is not None} == {
        k: v for k, v in before.items() if v is not None
    }
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (source / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def test_a_run_that_goes_out_comes_in_again(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    convert(model(tmp_path / "public", "olmoe", arrays), tmp_path / "run")
    done = convert(tmp_path / "run", tmp_path / "wide")
    assert done.code == 0, done.err
    done = convert(tmp_path / "wide", tmp_path / "again")
    assert done.code == 0, done.err
    first, second = (
        read_manifest(tmp_path / run / "checkpoints/0")["arrays"]
        for run in ("run", "again")
    )
    assert first == second


def test_each_expert_is_in_its_place(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    assert convert(source, tmp_path / "run").code == 0
    path = tmp_path / "run/checkpoints/0"
    up_PEMcF, query_PMND = (
        np.asarray(Arrays(path, read_manifest(path)).opened(name).read().result())
        for name in (
            "params/decoder/layers/0/0/sparse/experts/up",
            "params/decoder/layers/0/0/attention/query",
        )
    )
    for layer, e, f in np.ndindex(2, E, F):
        at = f"model.layers.{layer}.block_sparse_moe.experts.{e}"
        for c, name in enumerate(("w1", "w3")):
            wanted = arrays[f"{at}.{name}.weight"][f]
            assert np.array_equal(up_PEMcF[layer, e, :, c, f], wanted)
    for layer, n, d in np.ndindex(2, N, D):
        at = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert np.array_equal(query_PMND[layer, :, n, d], arrays[at][D * n + d])


def test_experts_in_one_array_are_read_too(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source = model(tmp_path / "public", "olmoe", arrays)
    fused = {name: a for name, a in arrays.items() if ".experts." not in name}
    for at in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        gate, up, down = (
            np.stack([arrays[f"{at}.{e}.{name}_proj.weight"] for e in range(E)])
            for name in ("gate", "up", "down")
        )
        fused[f"{at}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{at}.down_proj"] = down
    other = model(tmp_path / "fused", "olmoe", fused)
    for folder in (source, other):
        assert convert(folder, tmp_path / f"run_{folder.name}").code == 0
    first, second = (
        read_manifest(tmp_path / run / "checkpoints/0")["arrays"]
        for run in ("run_public", "run_fused")
    )
    assert first == second


def test_few_bits_become_numbers(tmp_path):
    draw = np.random.default_rng(1)
    held = {
        "up_blocks": draw.integers(0, 256, (E, 5, 1, 16), np.uint8),  # of 32 inputs
        "up_scales": draw.integers(120, 130, (E, 5, 1), np.uint8),
        "q": draw.normal(size=(3, 5)).astype(ml_dtypes.float8_e4m3fn),
        "q_scale_inv": draw.uniform(size=(2, 2)).astype(np.float32),
        "of_blocks": np.ones(2, np.float32),  # is what it is called
    }
    write(tmp_path, held)
    config = {"quantization_config": {"weight_block_size": [2, 4]}}
    float32 = np.dtype(np.float32)
    numbers = numbers_of(tensors.open_tensors(tmp_path), config, float32)
    assert sorted(numbers) == ["of_blocks", "q", "up"]
    assert np.array_equal(numbers["of_blocks"], held["of_blocks"])
    for m, n in np.ndindex(3, 5):
        wanted = np.float32(held["q"][m, n]) * held["q_scale_inv"][m // 2, n // 4]
        assert numbers["q"][m, n] == wanted
    e2m1, up = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), numbers["up"]
    for e, row, m in np.ndindex(E, 5, 32):
        byte = int(held["up_blocks"][e, row, 0, m // 2])
        bits = byte >> 4 if m % 2 else byte & 15
        value = e2m1[bits % 8] * (-1 if bits >= 8 else 1)
        assert up[e, m, row] == value * 2.0 ** (int(held["up_scales"][e, row, 0]) - 127)


def test_all_that_is_missing_and_all_that_is_not_used_is_said(tmp_path):
    arrays = arrays_of("qwen3_moe", np.dtype(np.float32))
    for number in range(2):
        del arrays[f"model.layers.{number}.self_attn.k_norm.weight"]
    del arrays["model.layers.1.mlp.experts.2.up_proj.weight"]
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    arrays["model.more"] = arrays["model.layers.0.mlp.more"] = np.ones(3, np.float32)
    source = model(tmp_path / "public", "qwen3_moe", arrays)
    done = convert(source, tmp_path / "run")
    assert done.code == 1
    for line in (
        "missing: model.layers.N.self_attn.k_norm.weight (2 of them)",
        "missing: model.layers.1.mlp.experts.2.up_proj.weight",
        "not used: model.more",
        "not used: model.layers.0.mlp.more",
    ):
        assert line in done.err
    assert done.err.count("missing: ") == done.err.count("not used: ") == 2
    assert not (tmp_path / "run" / "config.gin").exists()


def test_what_is_left_out_is_said(tmp_path):
    arrays = arrays_of("deepseek_v3", np.dtype(np.float32))
    for number in range(2):
        name = f"model.layers.{number}.self_attn.rotary_emb.inv_freq"
        arrays[name] = np.ones(2, np.float32)
    # A layer above the last predicts the token after the next.
    arrays["model.layers.2.eh_proj.weight"] = np.ones((M, 2 * M), np.float32)
    source = model(tmp_path / "public", "deepseek_v3", arrays)
    said = json.loads((source / "config.json").read_text())
    said["num_nextn_predict_layers"] = 1
    (source / "config.json").write_text(json.dumps(said))
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    assert [line for line in done.err.splitlines() if line.startswith("left")] == [
        "left out: model.layers.N.self_attn.rotary_emb.inv_freq (2 of them)",
        "left out: model.layers.2.eh_proj.weight",
    ]


def test_of_a_public_model_nothing_is_asked_that_only_runs_have(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    done = convert(source, tmp_path / "run", "--step=5", "--dtype=bfloat16")
    assert done.code == 1
    assert "--step, --dtype: of " in done.err
    assert not (tmp_path / "run").exists()


def test_another_shape_is_refused_and_nothing_is_left(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    arrays["model.layers.1.self_attn.q_proj.weight"] = np.zeros((N * D + 1, M))
    source = model(tmp_path / "public", "mixtral", arrays)
    done = convert(source, tmp_path / "run")
    assert done.code == 1
    assert "model.layers.1.self_attn.q_proj.weight has the shape (17, 16)" in done.err
    assert not list((tmp_path / "run").rglob("*.gin"))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"model_type": "bart"}, "of the family 'bart'; known are mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only 'silu' is known"),
        ({"model_type": "olmoe", "clip_qkv": 8.0, "num_experts": E}, "clip_qkv = 8.0"),
        (
            {"model_type": "olmoe", "num_experts": E},
            "not used: model.layers.N.block_sp",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"num_experts": E + 1}, "_moe.experts.3.w1.weight (2 of them)\n  missing"),
        ({"num_attention_heads": "four"}, "cannot be understood"),
        ({"vocab_size": 8}, "has 11 ids, and the model an embedding of 8"),
    ],
)
def test_what_is_not_known_is_refused(said, answer, tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    config = json.loads((source / "config.json").read_text())
    if "num_experts" in said:
        del config["num_local_experts"]
    config |= said
    (source / "config.json").write_text(json.dumps(config))
    done = convert(source, tmp_path / "run")
    assert done.code == 1
    assert answer in done.err
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_knob_that_would_make_another_model_is_refused(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    done = convert(source, tmp_path / "run", "--gin.LOGIT_CAP=30.0")
    assert done.code == 1
    assert "LOGIT_CAP 30.0 → 0.0" in done.err


def test_a_table_that_is_scaled_goes_out_so(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    assert convert(source, tmp_path / "run").code == 0
    config = tmp_path / "run" / "config.gin"
    text = config.read_text()
    assert "EMBED_SCALE = 1.0" in text
    config.write_text(text.replace("EMBED_SCALE = 1.0", "EMBED_SCALE = 0.0"))
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 0, done.err
    arrays["model.embed_tokens.weight"] *= 4  # the root of M
    assert bits(read(tmp_path / "back")) == bits(arrays)


def test_a_table_that_is_also_the_head_is_written_once(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    done = convert(source, tmp_path / "run")
    assert done.code == 1
    assert "lm_head.weight the same as model.embed_tokens.weight, and" in done.err
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    source = model(tmp_path / "tied", "mixtral", arrays)
    config |= {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    done = convert(source, tmp_path / "run")
    assert (done.code, "left out: lm_head.weight" in done.err) == (0, True), done.err
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 0, done.err
    del arrays["lm_head.weight"]
    assert bits(read(tmp_path / "back")) == bits(arrays)


def test_experts_of_both_stacks_are_in_their_places(tmp_path):
    arrays = arrays_of("switch_transformers", np.dtype(np.float32))
    source = model(tmp_path / "public", "switch_transformers", arrays)
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    path = tmp_path / "run/checkpoints/0"
    opened = Arrays(path, read_manifest(path)).opened
    for stack, last, layers in (("encoder", 1, (1, 3)), ("decoder", 2, (1,))):
        at = f"params/{stack}/layers/0"
        name = f"{at}/1/sparse/experts/down"
        down_PEFM = np.asarray(opened(name).read().result())
        for place, e in np.ndindex(len(layers), E):
            theirs = f"{stack}.block.{layers[place]}.layer.{last}.mlp.experts.expert_"
            wanted_MF = arrays[f"{theirs}{e}.wo.weight"]
            assert np.array_equal(down_PEFM[place, e], wanted_MF.T)
        table = np.asarray(opened(f"params/{stack}/distance").read().result())
        theirs = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert np.array_equal(table, arrays[theirs])
    settings = reader.read([f"{tmp_path}/run/config.gin"], []).settings
    router = settings.router
    assert capacity(router, E, train=False) == capacity(router, E, train=True) == 7
    assert router.group_size == settings.data.length


def test_a_tokenizer_keeps_the_name_that_its_family_has_for_it(tmp_path):
    source = model(tmp_path / "public", "t5", arrays_of("t5", np.dtype(np.float32)))
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefgh"]),
        model_writer=made,
        model_type="char",
        vocab_size=12,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2},
    )
    (source / "tokenizer.json").unlink()
    (source / "spiece.model").write_bytes(made.getvalue())
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    assert convert(tmp_path / "run", tmp_path / "back").code == 0
    kept = tmp_path / "run/vocabulary/vocabulary.model", tmp_path / "back/spiece.model"
    assert [file.read_bytes() for file in kept] == [made.getvalue()] * 2
    done = convert(source, tmp_path / "other", "--gin.EXTRA_IDS=113")
    assert "has 125 ids with EXTRA_IDS = 113, and the model an embedding" in done.err


def test_other_names_of_a_table_are_that_table(tmp_path):
    arrays = arrays_of("t5", np.dtype(np.float32))
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    arrays |= dict.fromkeys((*names, "lm_head.weight"), arrays["shared.weight"])
    done = convert(model(tmp_path / "a", "t5", arrays), tmp_path / "run")
    assert (done.code, done.err.count("left out: ")) == (0, 3), done.err
    arrays[names[0]] = arrays["shared.weight"] + 1
    done = convert(model(tmp_path / "b", "t5", arrays), tmp_path / "other")
    assert done.code == 1
    assert f"makes {names[0]} the same as shared.weight, and it is another" in done.err


def test_of_t5_newer_files_say_otherwise_that_the_head_is_another(tmp_path):
    # They say of all models that the embedding is the head, and of these
    # scale_decoder_outputs = false; the head is in the files, if it is another.
    for name, head in (("with", True), ("without", False)):
        arrays = arrays_of("t5_1_1", np.dtype(np.float32))
        wanted = arrays["lm_head.weight" if head else "shared.weight"]
        if not head:
            del arrays["lm_head.weight"]
        source = model(tmp_path / name, "t5_1_1", arrays)
        said = json.loads((source / "config.json").read_text())
        said |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
        (source / "config.json").write_text(json.dumps(said))
        done = convert(source, tmp_path / f"run_{name}")
        assert done.code == 0, done.err
        path = tmp_path / f"run_{name}/checkpoints/0"
        opened = Arrays(path, read_manifest(path)).opened("params/head")
        assert np.array_equal(np.asarray(opened.read().result()), wanted.T)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ({"num_sparse_encoder_layers": 1}, "sparse_step = 4 makes layers [1] of"),
        ({"encoder_sparse_step": 3}, "encoder_sparse_step = 3 makes layers [1] of 4"),
        ({"encoder_sparse_step": 1}, "missing: encoder.block.N.layer.1.mlp.router."),
        ({"encoder_sparse_step": 0}, "not used: encoder.block.N.layer.1.mlp.router."),
        ({"num_sparse_decoder_layers": 2}, "not used: decoder.block.0.layer.2.mlp"),
        ({"router_bias": True}, "router_bias = True: only False is known"),
        ({"decoder_start_token_id": 1}, "decoder_start_token_id = 1: only 0"),
        ({"dense_act_fn": "tanh"}, "dense_act_fn = 'tanh' is none of relu"),
        ({"expert_capacity": 0}, "expert_capacity = 0 is no number of slots"),
    ],
)  # fmt: skip
def test_what_two_stacks_cannot_have_is_refused(said, answer, tmp_path):
    arrays = arrays_of("switch_transformers", np.dtype(np.float32))
    source = model(tmp_path / "public", "switch_transformers", arrays)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | said))
    done = convert(source, tmp_path / "run")
    assert (done.code, answer in done.err) == (1, True), done.err


def test_a_run_whose_embedding_is_scaled_and_is_the_head_goes_out_so(tmp_path):
    # As the models of configs/ have it: EMBED_SCALE is the root of the width, and
    # logits are not scaled. In T5's files the table is larger, and logits are scaled.
    arrays = arrays_of("t5", np.dtype(np.float32))
    source = model(tmp_path / "public", "t5", arrays)
    assert convert(source, tmp_path / "run").code == 0
    config = tmp_path / "run" / "config.gin"

    def change(old: str, new: str) -> None:
        assert f"\n{old}" in config.read_text()
        config.write_text(config.read_text().replace(f"\n{old}", f"\n{new}"))

    change("EMBED_SCALE = 1.0", "EMBED_SCALE = 0.0")
    change("LOGIT_SCALE = 0.25", "LOGIT_SCALE = 1.0")
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 0, done.err
    arrays["shared.weight"] *= 4  # the root of M
    assert bits(read(tmp_path / "back")) == bits(arrays)
    change("LOGIT_SCALE = 1.0", "LOGIT_SCALE = 2.0")
    done = convert(tmp_path / "run", tmp_path / "other")
    assert "t5: LOGIT_SCALE 2.0 → 1.0" in done.err


def test_a_run_that_no_family_has_is_refused_by_its_knobs(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source = model(tmp_path / "public", "olmoe", arrays)
    assert convert(source, tmp_path / "run").code == 0
    config = tmp_path / "run" / "config.gin"
    config.write_text(config.read_text().replace("LOGIT_CAP = 0.0", "LOGIT_CAP = 9.0"))
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 1
    assert "olmoe: LOGIT_CAP 9.0 → 0.0\n" in done.err
    assert "mixtral: QK_NORM 'width' → 'none', LOGIT_CAP 9.0 → 0.0" in done.err
    assert not (tmp_path / "back").exists()
    config.write_text(config.read_text().replace("NUM_LAYERS = 2", "NUM_LAYERS = 1"))
    config.write_text(config.read_text().replace("LOGIT_CAP = 9.0", "LOGIT_CAP = 0.0"))
    done = convert(tmp_path / "run", tmp_path / "back")
    assert "has the shape [2, 16, 2, 4], and by config.gin [1, 16, 2, 4]" in done.err
    done = convert(tmp_path / "run", tmp_path / "back", "--family=bart")
    assert (done.code, "--family=bart is not known" in done.err) == (1, True)


def test_a_damaged_array_does_not_go_out(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source = model(tmp_path / "public", "olmoe", arrays)
    assert convert(source, tmp_path / "run").code == 0
    file = tmp_path / "run/checkpoints/0/manifest/metadata"
    manifest = json.loads(file.read_text())
    manifest["arrays"]["params/decoder/layers/0/0/attention/key"]["digest"] = "0" * 8
    file.write_text(json.dumps(sealed(manifest)))
    done = convert(tmp_path / "run", tmp_path / "back")
    assert done.code == 1
    assert "attention/key is not what was saved" in done.err
    assert not (tmp_path / "back").exists()


def test_other_names_on_disk_are_the_same_model(tmp_path):
    float32, at = np.dtype(np.float32), "cls.predictions"
    for name, other, more, copies in (
        (
            "gpt2",
            lambda name: name.removeprefix("transformer."),
            {"h.1.attn.bias": (1, 1, 77, 77), "h.0.attn.masked_bias": ()},
            {"lm_head.weight": "wte.weight"},
        ),
        (
            "bert",
            lambda name: name.replace("Norm.weight", "Norm.gamma").replace(
                "Norm.bias", "Norm.beta"
            ),
            {"bert.pooler.dense.weight": (M, M), "cls.seq_relationship.bias": (2,)},
            {
                f"{at}.decoder.weight": "bert.embeddings.word_embeddings.weight",
                f"{at}.decoder.bias": f"{at}.bias",
            },
        ),
        (
            "bert_without_a_head",
            lambda name: name.removeprefix("bert."),
            {"pooler.dense.bias": (M,), "embeddings.position_ids": (1, 77)},
            {},
        ),
    ):
        arrays = arrays_of(name, float32)
        odd = {other(key): array for key, array in arrays.items()}
        assert odd.keys() != arrays.keys()
        odd |= {key: np.ones(shape, float32) for key, shape in more.items()}
        odd |= {key: odd[original] for key, original in copies.items()}
        plain = model(tmp_path / name, name, arrays)
        done = convert(plain, tmp_path / f"run_{name}")
        assert (done.code, "left out" in done.err) == (0, False), done.err
        done = convert(
            model(tmp_path / f"odd_{name}", name, odd), tmp_path / f"run_odd_{name}"
        )
        assert (done.code, done.err.count("left out: ")) == (
            0,
            len(more | copies),
        ), done.err
        first, second = (
            read_manifest(tmp_path / run / "checkpoints/0")["arrays"]
            for run in (f"run_{name}", f"run_odd_{name}")
        )
        assert first == second


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    arrays = arrays_of("gpt2", np.dtype(np.float32))
    arrays["wte.weight"] = arrays["transformer.wte.weight"]
    done = convert(model(tmp_path / "public", "gpt2", arrays), tmp_path / "run")
    assert done.code == 1
    assert "has transformer.wte.weight twice, once as " in done.err


def test_another_name_of_a_family_is_that_family(tmp_path):
    arrays = arrays_of("deepseek_v3", np.dtype(np.float32))
    source = model(tmp_path / "public", "deepseek_v3", arrays)
    said = json.loads((source / "config.json").read_text())
    # Angles of Kimi K2, whose two numbers of turns are one.
    rope = {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0} | {
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }
    said |= {"model_type": "kimi_k2", "rope_theta": 50000.0, "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(said))
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    for words, name in (([], "kimi_k2"), (["--family=deepseek_v3"], "deepseek_v3")):
        done = convert(tmp_path / "run", tmp_path / name, *words)
        assert done.code == 0, done.err
        assert bits(read(tmp_path / name)) == bits(arrays)
        out = json.loads((tmp_path / name / "config.json").read_text())
        assert out["model_type"] == name
        found = knobs_of(out, "config.json")[1]
        assert found == knobs_of(said, "config.json")[1]


def test_what_stands_for_a_masked_token_must_be_in_the_vocabulary(tmp_path):
    source = model(tmp_path / "public", "bert", arrays_of("bert", np.dtype(np.float32)))
    done = convert(source, tmp_path / "run", "--gin.MASK_TOKEN=<mask>")
    assert done.code == 1
    assert "MASK_TOKEN = '<mask>' is no piece of the vocabulary" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_knobs_are_those_whose_logits_are_the_same(name):
    # `benchmarks.public_models` compares the logits of these settings with theirs.
    family = SMALL[name]
    model, router = family.model_settings(), family.router_settings()
    said = config_of(name, model, router)
    found, knobs = knobs_of(said, "config.json")
    assert found == name
    bindings = [f"{macro}={value!r}" for macro, value in knobs.items()]
    bindings += ["MODEL_DIR=a", "GROUP_SIZE=1", "VOCABULARY=some/tokenizer.json"]
    bindings += ["ENCODER_GROUP_SIZE=1"]
    of_data = [] if "d_model" in family.config else ["data/here.gin"]
    if "MAX_POSITIONS" in knobs:
        bindings.append("TASK_FEATURE_LENGTHS={'targets': 64}")
    layers = reader.read([FAMILIES[name].data, *of_data], bindings).settings.layers
    assert layers == small.described(family).layers
    # Of the words that `transformers` was given there, all are understood alike.
    theirs = dict(family.config)
    rope = {"rope_type": "default", "rope_theta": 100.0} | theirs.pop("rope", {})
    again = {**said, **theirs, "rope_parameters": rope}
    assert knobs_of(again, "config.json")[1] == knobs


def test_text_is_drawn_with_a_model_that_came_in(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source = model(tmp_path / "public", "olmoe", arrays)
    done = convert(
        source, tmp_path / "run", "--gin.DTYPE=float32", "--gin.SELF_CHECK=off"
    )
    assert done.code == 0, done.err
    done = commands.inline(
        "generate",
        f"--model_dir={tmp_path / 'run'}",
        "--prompt=a b",
        "--num_tokens=4",
        "--temperature=0",
    )
    assert done.code == 0, done.err
    assert done.out.startswith("a b")
    done = commands.inline(
        "generate", f"--model_dir={tmp_path / 'run'}", "--gin.START_TOKEN=nope"
    )
    assert done.code == 1
    assert "START_TOKEN = 'nope' is no piece of the vocabulary" in done.err


def test_a_start_that_the_tokenizer_has_not_is_said(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source = model(tmp_path / "public", "olmoe", arrays)
    done = convert(source, tmp_path / "no", "--gin.START_TOKEN=nope")
    assert (done.code, "START_TOKEN = 'nope' is no piece" in done.err) == (1, True)
    assert not (tmp_path / "no" / "config.gin").exists()
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token_id": 99}))
    done = convert(source, tmp_path / "run")
    assert done.code == 0, done.err
    assert "left out: bos_token_id = 99, which the tokenizer has not\n" in done.err
    assert "START_TOKEN = ''" in (tmp_path / "run" / "config.gin").read_text()


def test_who_gets_a_model_can_tell_whether_it_is_the_same(tmp_path):
    arrays = arrays_of("qwen3_moe", np.dtype(np.float32))
    source = model(tmp_path / "public", "qwen3_moe", arrays)
    done = checked(source, tmp_path / "run")
    assert done.code == 0, done.err
    if "transformers" not in done.err:
        assert "not compared: torch is not installed: pip install" in done.err
    done = checked(tmp_path / "run", tmp_path / "back")
    assert (done.code, "logits differ by" in done.err) == (0, True), done.err
    assert (tmp_path / "back" / "fingerprint.npz").stat().st_size < 100_000
    # Whoever has one of both kinds, or two of either, compares them.
    done = checked(tmp_path / "back", tmp_path / "run", "--check")
    assert (done.code, "0.0e+00 of the largest; 96 of 96 choices" in done.err) == (
        0,
        True,
    ), done.err
    changed = read(tmp_path / "back")
    changed["model.layers.1.self_attn.o_proj.weight"][0, 0] += 0.5
    shutil.copytree(tmp_path / "back", tmp_path / "other")
    for file in (tmp_path / "other").glob("model*"):
        file.unlink()
    write(tmp_path / "other", changed)
    done = commands.inline(
        "convert", "--check", f"--to={tmp_path / 'other'}", str(tmp_path / "run")
    )
    assert done.code == 1
    assert "; first at decoder layer 1, by " in done.err
    assert "they are not the same: 1e-04 of the largest logit is allowed" in done.err


def test_a_fingerprint_tells_where_a_model_was_changed(tmp_path):
    arrays = arrays_of("mixtral", np.dtype(np.float32))
    source = model(tmp_path / "public", "mixtral", arrays)
    run, tokens = tmp_path / "run", seen.tokens_for(["decoder"], VOCAB)
    assert convert(source, run).code == 0
    right = checking.of_run(reader.read([str(run / "config.gin")]))
    assert (len(right.seen.streams), right.seen.logits.shape) == (3, (24, VOCAB))
    for chosen in right.seen.choices.values():
        assert chosen.sum() == 2 * tokens["decoder"].size
    seen.keep(source, right.seen)
    again = checking.by_fingerprint(source)
    assert again is not None
    assert again.seen.sampled
    assert checking.compared(right, again).logits == 0
    other = {name: x.copy() for name, x in right.seen.streams.items()}
    other["decoder layer 0"][3, 0] += 1.0
    choices = {name: ~c for name, c in right.seen.choices.items()}
    found = seen.difference(again.seen, Seen(other, choices, right.seen.logits), 1e-4)
    assert (found.first, found.same, found.chosen) == ("decoder layer 0", 0, 96)
    none = with_no_number(right.seen)
    assert seen.difference(right.seen, none, 1e-4).logits == float("inf")
    file = source / "fingerprint.npz"
    whole = file.read_bytes()
    for content in (b"", whole[:-40], b"PK" + bytes(100), whole[:200] + whole[201:]):
        file.write_bytes(content)
        with pytest.raises(ExchangeError, match=r"fingerprint\.npz is damaged"):
            checking.by_fingerprint(source)


def test_other_models_are_told_apart_by_their_shapes(tmp_path):
    for name in ("mixtral", "deepseek_v3"):
        arrays = arrays_of(name, np.dtype(np.float32))
        source = model(tmp_path / name, name, arrays)
        assert convert(source, tmp_path / f"run_{name}").code == 0
    runs = [str(tmp_path / f"run_{name}") for name in ("mixtral", "deepseek_v3")]
    done = checked(*map(Path, runs), "--check")
    assert done.code == 1
    assert "they are other models, in 1 of 6 shapes, the first that of the " in done.err
    assert "choices of decoder layer 0: (24, 3) and none" in done.err


def with_no_number(one: Seen) -> Seen:
    """The same, but that a logit is no number."""
    logits = one.logits.copy()
    logits[0, 0] = np.nan
    return one._replace(logits=logits)


def test_both_folders_must_be_named():
    done = commands.inline("convert", "one")
    assert (done.code, "TO must be given" in done.err) == (1, True)
    done = commands.inline("convert", "one", "two", "three")
    assert (done.code, "'three' is not an option of convert" in done.err) == (1, True)
    done = commands.inline("convert", "none", "nothing", "--check", "--unchecked")
    assert (done.code, "--unchecked: nothing is made" in done.err) == (1, True)


def test_a_run_begins_with_a_model_that_came_in(tmp_path):
    arrays = arrays_of("olmoe", np.dtype(np.float32))
    source, there = model(tmp_path / "public", "olmoe", arrays), tmp_path / "run"
    assert convert(source, there).code == 0
    knobs = [f"MODEL_DIR={tmp_path}/mine", f"START_FROM={there}", "NUM_LAYERS=2"]
    config = reader.read([str(there / "config.gin")], knobs)
    vocabulary = read_manifest(there / "checkpoints/0")["vocabulary_fingerprint"]
    found = beginning.source_of(config, vocabulary, allow_changes=False)
    assert found.part.counts().keys() == {"loaded", "new", "ignored"}
    assert found.part.counts()["loaded"] > 0
    assert found.part.counts()["new"] == found.part.counts()["ignored"] == 0
    assert found.part.warnings == ()
