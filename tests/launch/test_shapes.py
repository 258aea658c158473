"""Runs of an encoder-decoder and of an encoder, from text to an answer."""

import dataclasses
import json

import pytest
from commands import Place, inline

from launch.config import reader
from launch.config.reader import ConfigError
from launch.evaluation.prompts import SampleError, encode_prompt, filled
from launch.run import self_check
from launch.run.assemble import assemble
from tasks.vocabularies import ByteVocabulary

BLANKS = ByteVocabulary(extra_ids=20)
V = BLANKS.size
SPANS = {
    "ARCHITECTURE": "encoder_decoder",
    "OBJECTIVE": "span_corruption",
    "TASK_FEATURE_LENGTHS": "{'inputs': 64, 'targets': 16}",
    "EXTRA_IDS": 20,
    "POSITIONS": "relative",
    "GROUP_SIZE": 16,
    "ENCODER_GROUP_SIZE": 64,
}
MASKED = {
    "ARCHITECTURE": "encoder",
    "OBJECTIVE": "masked_lm",
    "EXTRA_IDS": 20,
    "ROUTER": "expert_choice",
}


def knobs(given: dict) -> list[str]:
    return [f"{macro}={value}" for macro, value in given.items()]


def settings_of(given: dict, **sample):
    settings = reader.read(["runs/tiny.gin"], knobs(given)).settings
    sample = dataclasses.replace(settings.sample, **sample)
    return dataclasses.replace(settings, sample=sample)


def test_an_encoder_decoder_trains_goes_on_scores_and_fills_a_blank(tmp_path):
    place, folder = Place(tmp_path), tmp_path / "run"
    quick = {"SELF_CHECK": "off", "COMPILE_AHEAD": "train_step", "WARMUP_STEPS": 2}
    given = place.knobs(folder, **SPANS, **quick)
    begun = inline("train", *given, "--gin.TRAIN_STEPS=2")
    assert begun.code == 0, begun.err
    done = inline("train", *given, "--gin.TRAIN_STEPS=4")
    assert done.code == 0, done.err
    assert "  changed since step 2: TRAIN_STEPS 2 → 4\n" in done.err
    assert "stretches the cosine" in done.err
    assert "--gin.SCHEDULE_STEPS=2 keeps it" in done.err
    lives = sorted(path.name for path in (folder / "configs").iterdir())
    assert lives == ["001_from_step_0.gin", "002_from_step_2.gin"]
    other = inline("train", *given, "--gin.TRAIN_STEPS=4", "--gin.ACTIVATION=relu")
    assert other.code == 1
    assert "ACTIVATION  'gelu'  'relu'" in other.err
    assert "--allow_changes" in other.err
    records = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [r for r in records if "router/load_variation_per_layer" in r]
    assert sorted({r["step"] for r in steps}) == [1, 2, 3, 4]
    layers = {len(r["router/load_variation_per_layer"]) for r in steps}
    assert layers == {2}, "a layer of each stack"
    filled_in = inline(
        *("generate", f"--model_dir={folder}", "--prompt=def <extra_id_0>(self):"),
        *("--num_beams=2", "--num_tokens=6", "--gin.SELF_CHECK=off"),
    )
    assert filled_in.code == 0, filled_in.err
    assert filled_in.out.startswith("def ")
    assert filled_in.out.endswith("(self):\n")


def test_what_is_said_of_a_sentinel_stands_in_its_place():
    said = [V - 1, *BLANKS.encode("main"), V - 2, *BLANKS.encode("x, "), V - 4, 70]
    prompt = "def <extra_id_0>(<extra_id_1>y): <extra_id_2>"
    assert filled(prompt, said, BLANKS) == "def main(x, y): <extra_id_2>"


def test_blanks_of_a_prompt_are_sentinels_and_inputs_end():
    settings = settings_of(SPANS, prompt="def <extra_id_0>(<extra_id_19>):")
    expected = [*BLANKS.encode("def "), V - 1, *BLANKS.encode("("), V - 20]
    expected += [*BLANKS.encode("):"), BLANKS.eos_id]
    assert encode_prompt(settings, BLANKS) == expected
    settings = settings_of(SPANS, prompt="<extra_id_20>")
    with pytest.raises(SampleError, match="sentinels up to <extra_id_19>"):
        encode_prompt(settings, BLANKS)


def test_an_encoder_alone_draws_nothing():
    with pytest.raises(SampleError, match="an encoder alone draws nothing"):
        encode_prompt(settings_of(MASKED, prompt="def"), BLANKS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            SPANS | {"ENCODER_GROUP_SIZE": 48},
            "ENCODER_GROUP_SIZE = 48 does not divide a sequence of 64 tokens",
        ),
        (
            SPANS | {"ROUTER": "expert_choice"},
            "A causal decoder would learn from the future",
        ),
        (
            {"ENCODER_ROUTER": "expert_choice"},
            "ENCODER_ROUTER = 'expert_choice' means nothing to ARCHITECTURE = 'dec",
        ),
        (
            {"NUM_ENCODER_LAYERS": 3},
            "NUM_ENCODER_LAYERS = 3 means nothing to ARCHITECTURE = 'decoder'",
        ),
        (
            SPANS | {"NUM_ENCODER_LAYERS": 3},
            "NUM_ENCODER_LAYERS = 3 is not a multiple of ENCODER_MOE_EVERY = 2",
        ),
        (
            SPANS | {"ENCODER_MOE_EVERY": 0, "PREFIX_ATTENTION": "bidirectional"},
            "PREFIX_ATTENTION = 'bidirectional' means nothing to ARCHITECTURE",
        ),
        (
            SPANS | {"MESH_CONTEXT": 3, "SIMULATED_DEVICES": 3},
            "a row of 64 tokens does not divide over MESH_CONTEXT 3",
        ),
        ({"OBJECTIVE": "masked_lm", "EXTRA_IDS": 1}, "is not for ARCHITECTURE"),
    ],
)
def test_what_does_not_suit_a_shape_is_said(given, said):
    with pytest.raises(ConfigError) as caught:
        reader.read(["runs/tiny.gin"], knobs(given))
    assert said in str(caught.value)


def test_an_encoder_s_experts_choose_without_a_warning():
    settings = settings_of(MASKED)
    assert settings.layers.decoder is None
    alone = SPANS | {"ENCODER_ROUTER": "expert_choice", "ENCODER_MOE_EVERY": 1}
    routers = [s.router.family for s in settings_of(alone).layers.settings("sparse")]
    assert routers == ["expert_choice", "expert_choice", "token_choice"]


def test_a_run_keeps_that_one_knob_follows_another():
    config = reader.read(["runs/tiny.gin"], knobs(SPANS))
    assert "ENCODER_ROUTER = %ROUTER " in config.operative
    assert "ENCODER_GROUP_SIZE = 64 " in config.operative


@pytest.mark.slow
def test_sparse_layers_of_both_stacks_are_checked():
    given = SPANS | {"ENCODER_MOE_EVERY": 1, "ENCODER_ROUTER": "expert_choice"}
    run = assemble(reader.read(["runs/tiny.gin"], knobs(given)))
    found = self_check.compare(run)
    assert len(found) == 4, "training and evaluation of two kinds"
    assert all(one.is_right for one in found)
