"""Gin files become settings, and every setting tells where it comes from."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path

import pytest
from base_gin import (
    BASE,
    CONFIGS,
    fields_of_settings,
    macros_of_base,
    settings_and_macros,
)

from benchmarks.ladder.rows import is_shared
from launch.config import diff, macros, places, reader
from launch.config.syntax import statements
from launch.errors import ConfigError

pytestmark = pytest.mark.fast

LEAVES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.gin")
    if path.name != "base.gin"
)
# What several models or runs share is no whole one; that of the demos is read alone.
WHOLE = [
    name
    for name in LEAVES
    if not is_shared(CONFIGS / name) or name == "models/demo_base.gin"
]
TINY = "runs/tiny.gin"


def knob(config, macro):
    (found,) = [knob for knob in config.knobs if knob.macro == macro]
    return found


# --------------------------------------------------------------------- base.gin


def test_every_knob_fills_a_setting_and_every_setting_has_a_knob():
    macros, pairs = macros_of_base(), settings_and_macros()
    assert len(macros) == len(set(macros))
    assert {macro for _, macro in pairs} == set(macros)
    assert {setting for setting, _ in pairs} == fields_of_settings().keys()


def test_rules_name_knobs_and_sections_that_exist():
    knobs, titles = set(macros_of_base()), set(places.sections().values())
    named = diff._FREE | diff._FIXED | diff._OF_A_LIFE | set(reader._PATHS)
    assert named | set(macros.RENAMED.values()) <= knobs
    assert not knobs & {*macros.RENAMED, *macros.T5X}
    assert {*diff._FIXED_SECTIONS, *itertools.chain(*reader._KINDS.values())} <= titles
    settings = {setting for setting, _ in settings_and_macros()}
    assert macros._NAMES.keys() <= settings


def test_defaults_of_base_are_those_of_the_records():
    values = {
        knob.macro: (knob.value, knob.origin)
        for knob in reader.read([TINY]).knobs
        if "(default)" in knob.origin and not knob.same_as
    }
    fields = fields_of_settings()
    required = set(re.findall(r"^([A-Z_]+) = %gin.REQUIRED$", BASE, re.MULTILINE))
    compared = 0
    for setting, macro in settings_and_macros():
        default = fields[setting].default
        if (make := fields[setting].default_factory) is not dataclasses.MISSING:
            default = make()
        assert (default is dataclasses.MISSING) == (macro in required), macro
        if macro in values:
            assert values[macro][0] == default, macro
            compared += 1
    assert compared > 30


def test_every_knob_of_base_stands_under_a_comment():
    lines = BASE.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[A-Z][A-Z0-9_]* = ", line):
            above = number - 1
            while re.match(r"[A-Z][A-Z0-9_]* = ", lines[above]):
                above -= 1
            assert lines[above].startswith("# "), line


# ----------------------------------------------------------------------- leaves


# Those that are only for some models, with such a one.
SUITED = {
    "data/here_spans.gin": ("runs/t5_small.gin", ("VOCABULARY=some/tokenizer.json",)),
    "data/here_masked.gin": (
        "runs/demo_bert.gin",
        ("VOCABULARY=some/tokenizer.json", "MAX_POSITIONS=1024", "MOE_EVERY=0"),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_config_is_read_without_a_fault(name):
    large = name.startswith("hardware/") and "cpu" not in name
    run = name
    if not name.startswith("runs/"):
        run = "runs/glam_64b_64e.gin" if large else "runs/demo.gin"
        own = name.replace("models/", "runs/")
        run = own if own != name and own in LEAVES else run
    run, bindings = SUITED.get(name, (run, ()))
    config = reader.read([run] if run == name else [run, name], bindings)
    assert config.settings.train.batch_size >= 1
    assert config.where.endswith(name)


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_begins_with_a_header(name):
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    is_recipe = name in WHOLE and re.match("runs/|models/(?!demo_base)", name)
    if is_recipe:
        for entry in ("Paper: ", "Parameters: ", "Command: ", "Expected: "):
            assert f"# {entry}" in text, entry


def values_after(*files):
    """What every knob was given when these files have been read, fit or not."""
    read = reader._Reader()
    read.read_base()
    for name in files:
        read.read_leaf(name)
    return {macro: given.value for macro, given in read._assigned.items()}


@pytest.mark.parametrize("folder", ["models", "hardware"])
def test_a_file_of_a_kind_leaves_nothing_of_any_other(folder, monkeypatch):
    known = functools.cache(lambda text: tuple(statements(text)))
    monkeypatch.setattr(reader, "statements", known)
    files = [name for name in LEAVES if name.startswith(f"{folder}/")]
    assert len(files) > 15
    alone = {name: values_after(name) for name in files}
    default = values_after()
    # Of files that set the same knobs one comes first for all.
    sets = {
        frozenset(macro for macro in default if values[macro] != default[macro]): name
        for name, values in alone.items()
    }
    assert len(sets) > 5
    for first in sets.values():
        for second in files:
            assert values_after(first, second) == alone[second], (first, second)


def test_a_model_over_a_run_leaves_the_run_what_is_its_own(leaf):
    run = leaf("ATTENTION_WINDOWS = (8,)", "DTYPE = 'float32'", "SEED = 3", include="")
    files = ["runs/glam_64b_64e.gin", run, "models/mixtral_8x7b.gin"]
    config = reader.read(files, ["VOCAB_SIZE=256000"])
    alone = values_after("models/mixtral_8x7b.gin")
    for macro in (
        "MOE_POSITION",
        "EXPERT_ACTIVATION",
        "SLOT_ORDER",
        "CAPACITY_ROUNDING",
    ):
        assert knob(config, macro).value == alone[macro]
    assert config.settings.train.seed == 3
    assert config.settings.execution.dtype == "float32"
    assert config.settings.model.attention_windows == ()
    assert config.notes == (
        "configs/models/mixtral_8x7b.gin says all of its models: ATTENTION_WINDOWS of "
        "the files before it no longer hold",
    )


def test_of_steps_and_tokens_what_is_later_holds(leaf):
    # 8 rows of 64 tokens a step.
    read = reader.read([TINY], ["TRAIN_TOKENS=4097"])
    assert read.settings.train.train_steps == 9
    assert knob(read, "TRAIN_STEPS").origin == "TRAIN_TOKENS, --gin.TRAIN_TOKENS"
    again = reader.read([leaf(read.operative, include="")])
    assert again.settings == read.settings
    steps = reader.read([leaf(read.operative, include="")], ["TRAIN_STEPS=7"])
    assert steps.settings.train.train_steps == 7
    assert steps.settings.train.train_tokens == 0


def test_a_pod_s_run_is_read_for_one_device():
    pod = ["runs/glam_64b_64e.gin", "hardware/v4_8x8x16.gin"]
    assert reader.read(pod).settings.platform.num_processes != 1
    alone = reader.read([*pod, "hardware/cpu1.gin"]).settings
    assert alone.platform.num_processes == 1
    assert alone.platform.libtpu_init_args == ()
    assert (alone.partition.fsdp, alone.mesh.num_devices) == ("none", 1)


def test_the_demo_models_take_the_same_arithmetic_per_token():
    def expert_width(name):
        settings = reader.read(["runs/demo.gin", f"models/{name}.gin"]).settings
        if not settings.model.moe_every:
            return settings.model.mlp_dim
        return settings.model.expert_mlp_dim * settings.router.num_selected

    assert expert_width("demo_switch") == expert_width("demo_glam") == 512
    assert expert_width("demo_dense") == 512


def test_the_demo_is_what_it_says():
    settings = reader.read(["runs/demo.gin"]).settings
    assert settings.mesh.num_devices == settings.platform.simulated_devices == 4
    assert settings.model.num_experts == 8
    assert settings.router.num_selected == 1
    assert settings.execution.dtype == "float32"
    assert settings.data.task_feature_lengths == {"targets": 256}


def test_a_leaf_in_another_directory_includes_installed_files(leaf):
    config = reader.read([leaf("NUM_LAYERS = 4", name="deep/er/mine.gin")])
    assert config.settings.model.num_layers == 4
    assert config.settings.model.model_dim == 32
    assert knob(config, "NUM_LAYERS").origin == "deep/er/mine.gin:2"
    assert knob(config, "EMBED_DIM").origin.startswith("configs/runs/tiny.gin:")


def test_an_include_is_sought_beside_its_file_then_here_then_in_configs(leaf):
    main = leaf("", name="a/main.gin", include="runs/tiny.gin")
    assert reader.read([main]).settings.train.seed == 0
    leaf("SEED = 1", name="runs/tiny.gin", include="configs/runs/tiny.gin")
    assert reader.read([main]).settings.train.seed == 1
    leaf("SEED = 2", name="a/runs/tiny.gin", include="configs/runs/tiny.gin")
    assert reader.read([main]).settings.train.seed == 2


def test_our_files_include_ours_and_not_what_lies_here(leaf):
    before = reader.read(["configs/runs/demo.gin"]).settings.model
    leaf("EMBED_DIM = 8", name="models/demo_switch.gin", include="")
    assert reader.read(["configs/runs/demo.gin"]).settings.model == before


def test_what_is_later_wins_and_its_origin_is_told(leaf):
    first = leaf("SEED = 1", "LEARNING_RATE = 1")
    second = leaf("SEED = 2", name="second.gin", include="")
    config = reader.read([first, second], ["SEED=3"])
    assert config.settings.train.seed == 3
    assert knob(config, "SEED").origin == "--gin.SEED"
    config = reader.read([first, second])
    assert knob(config, "SEED") == ("SEED", 2, "second.gin:1", "")
    assert reader.read([second, first]).settings.train.seed == 1
    line = BASE.splitlines().index("MICROBATCHES = 1") + 1
    assert knob(config, "MICROBATCHES").origin == f"configs/base.gin:{line} (default)"
    assert config.where == "mine.gin, second.gin"


def test_an_integer_stands_for_a_number_and_a_list_for_a_tuple(leaf):
    settings = reader.read(
        [leaf("LEARNING_RATE = 1", 'XLA_FLAGS = ["--a=1", "--b"]')]
    ).settings
    assert isinstance(settings.optimizer.learning_rate, float)
    assert settings.platform.xla_flags == ("--a=1", "--b")


def test_a_macro_may_be_another_one_even_inside_a_dict(leaf):
    config = reader.read(
        [leaf("GROUP_SIZE = 32", "TASK_FEATURE_LENGTHS = {'targets': %GROUP_SIZE}")],
        ["SAMPLE_SEED=%GROUP_SIZE", "GROUP_SIZE=128"],
    )
    assert config.settings.data.length == 128
    assert config.settings.sample.seed == 128


@pytest.mark.parametrize(
    ("binding", "value"),
    [
        ("MODEL_DIR=runs/it's", "runs/it's"),
        ("MODEL_DIR='quoted'", "quoted"),
        ("MODEL_DIR=2024", "2024"),
        ("MODEL_DIR=%STORE_DIR", "runs/stores/python_topics_small_bytes"),
        ("MODEL_DIR=a=b", "a=b"),
        ("MODEL_DIR=@home ", "@home "),
    ],
)
def test_text_on_the_command_line_needs_no_quotes(binding, value):
    assert reader.read([TINY], [binding]).settings.loop.model_dir == value


# ------------------------------------------------------------------- round trip


def test_operative_text_reads_back_as_the_same_settings(leaf):
    text = 'tab\t "quote" \\ line\nSEED = 7\u2028 %SEED é'
    config = reader.read(
        [leaf('XLA_FLAGS = ("--a",)', "LEARNING_RATE = 1e-5", "SHUFFLE = False")],
        [f"SAMPLE_PROMPT={text!r}", "SAMPLE_SEED=%SAMPLE_TOKENS"],
    )
    assert config.settings.sample.prompt == text
    Path("config.gin").write_text(config.operative, encoding="utf-8")
    again = reader.read(["config.gin"])
    assert again.settings == config.settings
    assert [k[:2] for k in again.knobs] == [k[:2] for k in config.knobs]
    assert len(config.knobs) == len(macros_of_base())
    # It depends on no default, and so not on the version of base.gin.
    assert not any("(default)" in k.origin for k in again.knobs)
    assert reader.read(["config.gin"], ["SEED=5"]).settings.train.seed == 5


def test_reading_leaves_nothing_behind():
    before = reader.read([TINY])
    reader.read(["runs/demo.gin"], ["SEED=9"])
    with pytest.raises(ConfigError):
        reader.read([TINY], ["SEED='x'"])
    assert reader.read([TINY]) == before
