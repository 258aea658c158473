"""Gin files become settings, or one error that names every fault."""

import contextlib
import dataclasses
import re
import typing
from pathlib import Path

import pytest

import configs
from launch import gin_files
from launch.errors import ConfigError
from launch.settings import Settings

pytestmark = pytest.mark.fast

CONFIGS = Path(configs.__file__).parent
BASE = (CONFIGS / "base.gin").read_text(encoding="utf-8")
LEAVES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.gin")
    if path.name != "base.gin"
)
TINY = "runs/tiny.gin"


@pytest.fixture
def leaf(tmp_path, monkeypatch):
    """Writes a leaf that includes the tiny run, in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def write(*lines: str, name: str = "mine.gin", include: str = TINY) -> str:
        head = [f'include "{include}"'] if include else []
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        return name

    return write


def problems_of(files, *bindings) -> list[str]:
    """The faults of a configuration; it fails if there are none."""
    with pytest.raises(ConfigError) as raised:
        gin_files.read([files] if isinstance(files, str) else files, bindings)
    return list(raised.value.problems)


def only_problem_of(files, *bindings) -> str:
    (problem,) = problems_of(files, *bindings)
    return problem


def knob(config, macro):
    (found,) = [knob for knob in config.knobs if knob.macro == macro]
    return found


# --------------------------------------------------------------------- base.gin


def macros_of_base() -> list[str]:
    return re.findall(r"^([A-Z][A-Z0-9_]*) = ", BASE, re.MULTILINE)


def bindings_of_base() -> list[tuple[str, str]]:
    return re.findall(r"^([a-z_]+\.[a-z_0-9]+) = %([A-Z0-9_]+)$", BASE, re.MULTILINE)


def fields_of_settings() -> dict[str, dataclasses.Field]:
    return {
        f"{record}.{field.name}": field
        for record, kind in typing.get_type_hints(Settings).items()
        for field in dataclasses.fields(kind)
    }


def test_base_binds_every_setting_once_and_nothing_else():
    bound = [setting for setting, _ in bindings_of_base()]
    assert sorted(bound) == sorted(fields_of_settings())


def test_base_has_no_macro_without_a_binding_and_no_binding_without_a_macro():
    macros = macros_of_base()
    assert len(macros) == len(set(macros))
    assert set(macros) == {macro for _, macro in bindings_of_base()}


def test_defaults_of_base_are_those_of_the_records():
    values = {
        knob.macro: (knob.value, knob.origin)
        for knob in gin_files.read([TINY]).knobs
        if "(default)" in knob.origin
    }
    fields = fields_of_settings()
    required = set(re.findall(r"^([A-Z_]+) = %gin.REQUIRED$", BASE, re.MULTILINE))
    compared = 0
    for setting, macro in bindings_of_base():
        default = fields[setting].default
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


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_is_read_without_a_fault(name):
    run = "runs/demo.gin" if "models" in name or "hardware" in name else name
    config = gin_files.read([run] if run == name else [run, name])
    assert config.settings.train.batch_size >= 1
    assert config.where.endswith(name)


@pytest.mark.parametrize("name", LEAVES)
def test_every_config_begins_with_a_header(name):
    text = (CONFIGS / name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    if name.startswith("runs/") or re.search("switch|glam|dense", name):
        for entry in ("Paper: ", "Parameters: ", "Command: ", "Expected: "):
            assert f"# {entry}" in text, entry


@pytest.mark.parametrize("folder", ["models", "hardware"])
def test_files_of_one_kind_replace_all_that_another_sets(folder):
    runs = {
        name: {
            knob.macro
            for knob in gin_files.read(["runs/demo.gin", name]).knobs
            if f"configs/{folder}/" in knob.origin
        }
        for name in LEAVES
        if name.startswith(folder) and not name.endswith("base.gin")
    }
    assert len(runs) >= 3
    sets = list(runs.values())
    assert all(macros == sets[0] for macros in sets)
    for name in runs:
        origins = {
            knob.origin.partition(":")[0]
            for knob in gin_files.read(["runs/demo.gin", name]).knobs
        }
        others = {f"configs/{other}" for other in runs if other != name}
        assert not origins & others


def test_the_demo_models_take_the_same_arithmetic_per_token():
    def expert_width(name):
        settings = gin_files.read(["runs/demo.gin", f"models/{name}.gin"]).settings
        if not settings.model.moe_every:
            return settings.model.mlp_dim
        return settings.model.expert_mlp_dim * settings.router.num_selected

    assert expert_width("demo_switch") == expert_width("demo_glam") == 512
    assert expert_width("demo_dense") == 512


def test_the_demo_is_what_it_says():
    settings = gin_files.read(["runs/demo.gin"]).settings
    assert settings.mesh.num_devices == settings.platform.simulated_devices == 4
    assert settings.model.num_experts == 8
    assert settings.router.num_selected == 1
    assert settings.model.dtype == "float32"
    assert settings.data.task_feature_lengths == {"targets": 256}


def test_a_leaf_in_another_directory_includes_installed_files(leaf):
    config = gin_files.read([leaf("NUM_LAYERS = 4", name="deep/er/mine.gin")])
    assert config.settings.model.num_layers == 4
    assert config.settings.model.model_dim == 32
    assert knob(config, "NUM_LAYERS").origin == "deep/er/mine.gin:2"
    assert knob(config, "EMBED_DIM").origin.startswith("configs/runs/tiny.gin:")


def test_a_file_is_sought_here_then_beside_its_includer_then_in_configs(leaf):
    main = leaf("", name="a/main.gin", include="runs/tiny.gin")
    assert gin_files.read([main]).settings.train.seed == 0
    leaf("SEED = 2", name="a/runs/tiny.gin", include="configs/runs/tiny.gin")
    assert gin_files.read([main]).settings.train.seed == 2
    leaf("SEED = 1", name="runs/tiny.gin", include="configs/runs/tiny.gin")
    assert gin_files.read([main]).settings.train.seed == 1


def test_what_is_later_wins_and_its_origin_is_told(leaf):
    first = leaf("SEED = 1", "LEARNING_RATE = 1")
    second = leaf("SEED = 2", name="second.gin", include="")
    config = gin_files.read([first, second], ["SEED=3"])
    assert config.settings.train.seed == 3
    assert knob(config, "SEED").origin == "--gin.SEED"
    config = gin_files.read([first, second])
    assert knob(config, "SEED") == ("SEED", 2, "second.gin:1")
    assert gin_files.read([second, first]).settings.train.seed == 1
    line = BASE.splitlines().index("MICROBATCHES = 1") + 1
    assert knob(config, "MICROBATCHES").origin == f"configs/base.gin:{line} (default)"
    assert config.where == "mine.gin, second.gin"


def test_an_integer_stands_for_a_number_and_a_list_for_a_tuple(leaf):
    settings = gin_files.read(
        [leaf("LEARNING_RATE = 1", 'XLA_FLAGS = ["--a=1", "--b"]')]
    ).settings
    assert isinstance(settings.optimizer.learning_rate, float)
    assert settings.platform.xla_flags == ("--a=1", "--b")


def test_a_macro_may_be_another_one_even_inside_a_dict(leaf):
    config = gin_files.read(
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
    assert gin_files.read([TINY], [binding]).settings.loop.model_dir == value


# ------------------------------------------------------------------- round trip


def test_operative_text_reads_back_as_the_same_settings(leaf):
    text = 'tab\t "quote" \\ line\nSEED = 7\u2028 %SEED é'
    config = gin_files.read(
        [leaf('XLA_FLAGS = ("--a",)', "LEARNING_RATE = 1e-5", "SHUFFLE = False")],
        [f"SAMPLE_PROMPT={text!r}", "SAMPLE_SEED=%SAMPLE_TOKENS"],
    )
    assert config.settings.sample.prompt == text
    Path("config.gin").write_text(config.operative, encoding="utf-8")
    again = gin_files.read(["config.gin"])
    assert again.settings == config.settings
    assert [k[:2] for k in again.knobs] == [k[:2] for k in config.knobs]
    assert len(config.knobs) == len(macros_of_base())
    # It depends on no default, and so not on the version of base.gin.
    assert not any("(default)" in k.origin for k in again.knobs)
    assert gin_files.read(["config.gin"], ["SEED=5"]).settings.train.seed == 5


def test_reading_leaves_nothing_behind():
    before = gin_files.read([TINY])
    gin_files.read(["runs/demo.gin"], ["SEED=9"])
    with pytest.raises(ConfigError):
        gin_files.read([TINY], ["SEED='x'"])
    assert gin_files.read([TINY]) == before


# ---------------------------------------------------------------- faulty leaves


def test_an_unknown_macro_is_told_with_its_neighbours(leaf):
    problem = only_problem_of(leaf("NUM_EXPRTS = 8"))
    assert problem.startswith("mine.gin:2: NUM_EXPRTS is not a knob; nearest: ")
    assert "NUM_EXPERTS" in problem


def test_a_macro_in_lower_case_is_told_with_its_neighbours(leaf):
    assert "nearest: NUM_EXPERTS" in only_problem_of(leaf("num_experts = 8"))


def test_a_dotted_binding_is_told_with_its_macro(leaf):
    for line in ("model.model_dim = 64", "model:\n  model_dim = 64"):
        problem = only_problem_of(leaf(line, include=TINY))
        assert "model.model_dim: a gin file sets macros only" in problem
        assert "set the macro EMBED_DIM instead" in problem


def test_a_macro_that_a_dotted_binding_meant_is_not_missing_too(leaf):
    text = (CONFIGS / TINY).read_text(encoding="utf-8")
    line = "EMBED_DIM = 32"
    assert line in text
    name = leaf(text.replace(line, "model.model_dim = 32"), include="hardware/cpu1.gin")
    assert "set the macro EMBED_DIM instead" in only_problem_of(name)


def test_a_dotted_binding_of_another_system_is_told_with_near_macros(leaf):
    problem = only_problem_of(leaf("utils.Trainer.learning_rate = 0.1"))
    assert "nearest: LEARNING_RATE" in problem


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("NUM_EXPERTS = '8'", "must be an integer, without quotes"),
        ("NUM_EXPERTS = 8.0", "must be an integer"),
        ("NUM_EXPERTS = True", "must be an integer"),
        ("NUM_EXPERTS = None", "must be an integer"),
        ("LEARNING_RATE = '1e-3'", "must be a finite number, without quotes"),
        ("LEARNING_RATE = True", "must be a finite number"),
        ("LEARNING_RATE = 1e999", "must be a finite number"),
        ("SHUFFLE = 1", "must be True or False"),
        ("MODEL_DIR = 3", "must be text in quotes"),
        ("DTYPE = 'float16'", "must be one of 'float32', 'bfloat16'; nearest: "),
        ("REMAT = ['full']", "must be one of 'none', 'minimal', 'full'"),
        ("XLA_FLAGS = '--a'", "must be a tuple of texts, such as ('--flag=1',)"),
        ("XLA_FLAGS = (1,)", "must be a tuple of texts"),
        ("TASK_FEATURE_LENGTHS = 64", "must be a dict of integers"),
        ("TASK_FEATURE_LENGTHS = {'targets': '64'}", "must be a dict of integers"),
        ("TASK_FEATURE_LENGTHS = {'targets': True}", "must be a dict of integers"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_the_right_one(leaf, line, rule):
    problem = only_problem_of(leaf(line))
    macro, _, value = line.partition(" = ")
    shown = "inf" if value == "1e999" else value
    assert problem.startswith(f"mine.gin:2: {macro} = {shown} {rule}")


def test_a_macro_set_twice_in_one_file_is_a_fault(leaf):
    problem = only_problem_of(leaf("SEED = 1", "# twice", "SEED = 1"))
    assert problem == "mine.gin:4: SEED is set a second time, after line 2"


def test_an_include_does_not_silently_undo_what_stands_above_it(leaf):
    leaf("SEED = 2", name="other.gin", include="")
    problem = only_problem_of(leaf("SEED = 1", 'include "other.gin"'))
    assert problem.startswith("mine.gin:3: this include sets SEED again, after line 2")


def test_missing_macros_are_told_together(leaf):
    problem = only_problem_of(leaf("MODEL_DIR = 'x'", include="models/demo_glam.gin"))
    assert problem.startswith(
        "no value for BATCH_SIZE, MIXTURE_OR_TASK_NAME, MIXTURE_OR_TASK_MODULE, "
        "TASK_FEATURE_LENGTHS, STORE_DIR, which no default would suit"
    )
    assert "--gin.BATCH_SIZE=" in problem


def test_a_missing_file_is_told_with_the_places_and_near_names(leaf):
    problem = only_problem_of(leaf('include "models/demo_swich.gin"', name="a/b.gin"))
    assert problem.startswith(
        "a/b.gin:2: models/demo_swich.gin was not found; looked at "
        "models/demo_swich.gin, a/models/demo_swich.gin, "
        "configs/models/demo_swich.gin; nearest: models/demo_switch.gin"
    )


def test_a_file_that_includes_itself_is_a_fault(leaf):
    leaf('include "mine.gin"', name="other.gin", include="")
    problem = only_problem_of(leaf('include "other.gin"'))
    assert problem == "other.gin:1: mine.gin includes itself"


def test_base_cannot_be_included(leaf):
    problem = only_problem_of(leaf('include "base.gin"'))
    assert "base.gin is always read first" in problem


@pytest.mark.parametrize(
    "line",
    [
        "DTYPE = bfloat16",
        "NUM_LAYERS =",
        "NUM_LAYERS = 4 4",
        "NUM_LAYERS = 2 + 2",
        "XLA_FLAGS = ('--a',",
        "MODEL_DIR = 'unclosed",
        "MODEL_DIR = f'{1}'",
        "TASK_FEATURE_LENGTHS = {['targets']: 64}",
        "XLA_FLAGS = " + "(" * 5000,
    ],
)
def test_a_value_that_is_no_literal_is_one_fault_on_its_line(leaf, line):
    problem = only_problem_of(leaf("SEED = 1", line, "WARMUP_STEPS = 2"))
    macro = line.partition(" ")[0]
    assert problem.startswith(f"mine.gin:3: {macro}: its value is not one literal")


@pytest.mark.parametrize(
    "line",
    ["NUM_LAYERS", "NUM_LAYERS: 4", "$x = 3", "%SEED = 3", "4 = SEED", "include"],
)
def test_a_line_that_is_no_statement_is_one_fault(leaf, line):
    problem = only_problem_of(leaf("SEED = 1", line, "WARMUP_STEPS = 2"))
    assert problem.endswith("neither `MACRO = value` nor `include 'file.gin'`")
    assert problem.startswith("mine.gin:3: ")


def test_reading_goes_on_after_a_fault(leaf):
    problems = problems_of(
        leaf("DTYPE = bfloat16", "SEED = 'x'", "XLA_FLAGS = (", "NUM_EXPRTS = 2")
    )
    assert [p.partition(": ")[0] for p in sorted(problems)] == [
        "mine.gin:2",
        "mine.gin:3",
        "mine.gin:4",
        "mine.gin:5",
    ]


def test_a_macro_cannot_be_itself(leaf):
    name = leaf("SEED = %SAMPLE_SEED", "SAMPLE_SEED = %SEED")
    assert problems_of(name) == [
        "mine.gin:2: SEED: refers to itself: SEED -> SAMPLE_SEED -> SEED",
        "mine.gin:3: SAMPLE_SEED: refers to itself: SAMPLE_SEED -> SEED -> SAMPLE_SEED",
    ]


def test_a_reference_to_an_unknown_macro_is_a_fault(leaf):
    problem = only_problem_of(leaf("SEED = %SAMPLE_SEDE"))
    assert problem.startswith(
        "mine.gin:2: SEED: %SAMPLE_SEDE is not a knob; nearest: SAMPLE_SEED"
    )


@pytest.mark.parametrize(
    ("binding", "fault"),
    [
        ("SEED", "--gin.SEED: write --gin.SEED=value"),
        ("SEED=1 2", "--gin.SEED: its value is not one literal"),
        ("SEED=", "--gin.SEED: its value is not one literal"),
        ("SEED=1\nimport os", "--gin.SEED: this is not one value"),
        ("MODEL_DIR='x", "--gin.MODEL_DIR: its value is not one literal"),
        ("SEED='1'", "--gin.SEED: SEED = '1' must be an integer, without quotes"),
        ("SEDE=1", "--gin.SEDE: SEDE is not a knob; nearest: SEED"),
        ("model.num_layers=1", "--gin.model.num_layers: model.num_layers: "),
        ("DTYPE=float61", "--gin.DTYPE: DTYPE = 'float61' must be one of"),
    ],
)
def test_a_faulty_binding_of_the_command_line_is_told(binding, fault):
    assert only_problem_of(TINY, binding).startswith(fault)


# --------------------------------------------------------- a gin file is no program


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["import os"], "a gin file cannot import"),
        (["from os import system"], "a gin file cannot import"),
        (["import probe_of_gin_files as os"], "a gin file cannot import"),
        (["MODEL_DIR = @os.system()"], "MODEL_DIR: an @reference"),
        (["XLA_FLAGS = ('--a', @probe)"], "XLA_FLAGS: an @reference"),
        (["TASK_FEATURE_LENGTHS = {'targets': @probe()}"], "an @reference"),
        (["here/SEED = 1"], "a gin file here has no scopes"),
        (["SEED = %here/SEED"], "%here/SEED is not a knob"),
        (["macro.value = 1"], "a gin file sets macros only"),
        (["MODEL_DIR = __import__('os').getcwd()"], "not one literal"),
        (["SEED = (lambda: 1)()"], "not one literal"),
    ],
)
def test_a_gin_file_cannot_run_or_register_anything(leaf, lines, fault):
    Path("probe_of_gin_files.py").write_text("raise SystemExit('imported')")
    problem = only_problem_of(leaf(*lines))
    assert problem.startswith("mine.gin:2: ")
    assert fault in problem


def test_a_file_that_is_not_gin_is_refused_without_its_content(leaf):
    secret = "hunter2"
    lines = [f"{secret}:x:0:{n}:{secret}:/root:/bin/sh" for n in range(30)]
    lines += [f"password = {secret}", f"TOKEN='{secret}'", secret, f"import {secret}"]
    Path("system_file").write_text("\n".join(lines))
    Path("short_file").write_text("\n".join(lines[-4:]))
    Path("bytes_file").write_bytes(b"\xff\xfe" + secret.encode())
    for name in ("system_file", "short_file", "bytes_file"):
        problems = problems_of(leaf(f'include "{name}"'))
        assert secret not in "".join(problems), name
        assert len(problems) <= 6, name
    *first, last = problems_of("system_file")
    assert [p.split(":")[1] for p in first] == ["1", "2", "3", "4", "5"]
    assert "is it a gin file?" in last
    assert only_problem_of("bytes_file") == "bytes_file cannot be read: it is not text"


# ---------------------------------------------------------------------------- rules


def test_every_fault_is_in_one_error():
    with pytest.raises(ConfigError) as raised:
        gin_files.read(
            [TINY],
            [
                *("NUM_EXPRTS=8", "SEED='x'", "NUM_EXPERTS=6", "MESH_EXPERT=4"),
                *("SIMULATED_DEVICES=4", "GROUP_SIZE=48", "BATCH_SIZE=10"),
            ],
        )
    lines = str(raised.value).splitlines()
    assert lines[0] == "5 problems in runs/tiny.gin"
    assert all(line.startswith("  ") for line in lines[1:])
    assert [line.split()[0] for line in lines[1:]] == [
        "--gin.NUM_EXPRTS:",
        "--gin.SEED:",
        "GROUP_SIZE",
        "BATCH_SIZE",
        "NUM_EXPERTS",
    ]
    assert lines[-1] == (
        "  NUM_EXPERTS = 6 does not divide over the expert axis of size 4: use 4, 8 or "
        "12, or set MESH_EXPERT to 2, 3 or 6"
    )


def test_one_fault_is_one_problem():
    assert str(ConfigError("a.gin", ["X"])) == "1 problem in a.gin\n  X"


def test_rules_do_not_speak_of_values_that_were_never_given(leaf):
    problems = problems_of(leaf("TASK_FEATURE_LENGTHS = 64", "BATCH_SIZE = '9'"))
    assert len(problems) == 2
    assert all("must be" in problem for problem in problems)


@pytest.mark.parametrize(
    ("bindings", "problem"),
    [
        (
            ["BATCH_SIZE=10", "MESH_DATA=2", "MESH_EXPERT=2", "SIMULATED_DEVICES=4"],
            "BATCH_SIZE = 10 does not divide over 4 batch shards (MESH_DATA 2 × "
            "MESH_EXPERT 2) × MICROBATCHES = 1: nearest are 8 and 12",
        ),
        (
            ["BATCH_SIZE=8", "MICROBATCHES=16"],
            "BATCH_SIZE = 8 does not divide over 1 batch shard × MICROBATCHES = 16: "
            "the least is 16",
        ),
        (
            ["NUM_EXPERTS=3", "MESH_EXPERT=4", "SIMULATED_DEVICES=4"],
            "NUM_EXPERTS = 3 does not divide over the expert axis of size 4: use 4 or "
            "8, or set MESH_EXPERT to 3",
        ),
        (
            ["MESH_DATA=2", "MESH_EXPERT=2"],
            "SIMULATED_DEVICES = 1 are fewer than the 4 of the mesh (MESH_DATA 2 × "
            "MESH_EXPERT 2): set SIMULATED_DEVICES to 4, or an axis smaller",
        ),
        (
            ["PLATFORM=tpu"],
            "SIMULATED_DEVICES = 1 are CPU devices, but PLATFORM = 'tpu': set PLATFORM "
            "to 'cpu' or SIMULATED_DEVICES to 0",
        ),
        (
            ["WARMUP_STEPS=21"],
            "WARMUP_STEPS = 21 is longer than the run of TRAIN_STEPS = 20: the peak "
            "would never be reached",
        ),
        (
            ["VOCAB_SIZE=256"],
            "VOCAB_SIZE = 256 has no row for every one of the 259 pieces of VOCABULARY "
            "= 'bytes': use 259 or more",
        ),
        (
            ["MIXTURE_OR_TASK_MODULE=tasks/python_text.py"],
            "MIXTURE_OR_TASK_MODULE = 'tasks/python_text.py': must be the dotted name "
            "of a module, such as 'tasks.python_text'",
        ),
        (
            ["XLA_FLAGS=('--a --b',)"],
            "XLA_FLAGS holds '--a --b': each flag is one text that starts with -- and "
            "has no spaces",
        ),
        (["LIBTPU_INIT_ARGS=('a',)"], "LIBTPU_INIT_ARGS holds 'a': each flag is one"),
        (["STORE_DIR="], "STORE_DIR is empty"),
        (["EVAL_PERIOD=0"], "EVAL_PERIOD = 0: must be at least 1"),
        (["CLIP_NORM=-1"], "CLIP_NORM = -1.0: cannot be negative"),
        (["LEARNING_RATE=0"], "LEARNING_RATE = 0.0: must be above 0"),
        (["BETA2=1"], "BETA2 = 1.0: must be in [0, 1)"),
        (["SAMPLE_TOP_P=0"], "SAMPLE_TOP_P = 0.0: must be in (0, 1]"),
        (["SEED=-1"], "SEED = -1: must be in [0, 2**32)"),
        # One rule of each record's own list: they are all asked.
        (["HEAD_DIM=15"], "HEAD_DIM = 15: rotary positions turn pairs"),
        (["BAD_UTF8=skip"], "BAD_UTF8 = 'skip': use 'error' or 'replace'"),
        (["MESH_DATA=0"], "MESH_DATA = 0: every axis has a size of at least 1"),
    ],
)
def test_a_broken_rule_is_told_with_numbers(bindings, problem):
    assert only_problem_of(TINY, *bindings).startswith(problem)


def test_a_dense_model_has_no_experts_to_divide():
    bindings = ["MOE_EVERY=0", "NUM_EXPERTS=3", "MESH_EXPERT=2", "SIMULATED_DEVICES=2"]
    assert gin_files.read([TINY], bindings).settings.mesh.expert == 2


@pytest.mark.parametrize("number", [0, -1, 10**9])
def test_no_number_breaks_the_rules_themselves(number):
    numeric = [
        macro
        for setting, macro in bindings_of_base()
        if fields_of_settings()[setting].type in (int, float)
    ]
    assert len(numeric) > 40
    for macro in numeric:
        with contextlib.suppress(ConfigError):
            gin_files.read([TINY], [f"{macro}={number}"])


def test_a_negative_size_is_always_refused_by_name():
    sizes = [
        macro for macro in macros_of_base() if re.match("NUM_|MESH_|.*_DIM", macro)
    ]
    assert len(sizes) > 10
    for macro in sizes:
        setting = next(name for name, bound in bindings_of_base() if bound == macro)
        named = "".join(problems_of(TINY, f"{macro}=-1"))
        assert macro in named or setting in named
