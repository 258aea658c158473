"""What is wrong with a configuration is one error that names every fault."""

import contextlib
import re
from pathlib import Path

import pytest
from base_gin import CONFIGS, fields_of_settings, macros_of_base, settings_and_macros

from launch.config import reader
from launch.errors import ConfigError

pytestmark = pytest.mark.fast

TINY = "runs/tiny.gin"


def problems_of(files, *bindings) -> list[str]:
    """The faults of a configuration; it fails if there are none."""
    with pytest.raises(ConfigError) as raised:
        reader.read([files] if isinstance(files, str) else files, bindings)
    return list(raised.value.problems)


def only_problem_of(files, *bindings) -> str:
    (problem,) = problems_of(files, *bindings)
    return problem


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


def test_a_folder_or_nothing_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert only_problem_of("mine") == "mine is a folder: name a gin file that is in it"
    assert only_problem_of("") == "a file has no name: write --gin_file=FILE"


def test_a_missing_file_is_told_with_the_places_and_near_names(leaf):
    problem = only_problem_of(leaf('include "models/demo_swich.gin"', name="a/b.gin"))
    assert problem.startswith(
        "a/b.gin:2: models/demo_swich.gin was not found; looked at "
        "a/models/demo_swich.gin, models/demo_swich.gin, "
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
    "line",
    [r"SAMPLE_PROMPT = 'a\udcff'", r"MODEL_DIR = '\ud83d'", r"XLA_FLAGS = ('\ud800',)"],
)
def test_text_that_no_file_could_hold_is_a_fault(leaf, line):
    problem = only_problem_of(leaf(line))
    assert problem.startswith(f"mine.gin:2: {line} is not UTF-8: ")


def test_a_file_whose_name_is_not_utf8_is_a_fault(leaf):
    problem = only_problem_of([TINY, "\udcff.gin"])
    assert problem == r"'\udcff.gin' is not UTF-8: rename that file"


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
        (
            "MODEL_DIR=",
            "--gin.MODEL_DIR: MODEL_DIR = '' is empty: give the folder of the run",
        ),
        ("STORE_DIR=' '", "--gin.STORE_DIR: STORE_DIR = ' ' is empty: give the folder"),
        # As a byte that is not UTF-8 comes from the shell.
        ("SAMPLE_PROMPT=\udcff", r"--gin.SAMPLE_PROMPT: '\udcff' is not UTF-8"),
        ("SAMPLE_PROMPT='\udcff'", "--gin.SAMPLE_PROMPT: "),
        ("SEED=\udcff", r"--gin.SEED: '\udcff' is not UTF-8"),
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
        reader.read(
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
            ["SPIKE_STDDEVS=4.5"],
            "SPIKE_STDDEVS = 4.5 means nothing to SPIKE_ACTION = 'none': leave it at "
            "6, or set SPIKE_ACTION to 'skip' or 'rollback'",
        ),
        (
            ["WARMUP_STEPS=21"],
            "WARMUP_STEPS = 21 is longer than the run of TRAIN_STEPS = 20: the peak "
            "would never be reached",
        ),
        (
            ["VOCAB_SIZE=256"],
            "VOCAB_SIZE = 256 has no row for every one of the 259 ids of VOCABULARY "
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
        (["TRAIN_SPLIT="], "TRAIN_SPLIT is empty"),
        (["EVAL_PERIOD=0"], "EVAL_PERIOD = 0: must be at least 1"),
        (["CLIP_NORM=-1"], "CLIP_NORM = -1.0: cannot be negative"),
        (["LEARNING_RATE=0"], "LEARNING_RATE = 0.0: must be above 0"),
        (["BETA2=1"], "BETA2 = 1.0: must be in [0, 1)"),
        (["SAMPLE_TOP_P=0"], "SAMPLE_TOP_P = 0.0: must be in (0, 1]"),
        (
            ["SAMPLE_TOP_K=3000000000"],
            "SAMPLE_TOP_K = 3000000000: must be below 2**31",
        ),
        (
            ["SAMPLE_TOKENS=3000000000"],
            "SAMPLE_TOKENS = 3000000000: must be below 2**31",
        ),
        (
            ["OPTIMIZER=adafactor", "BETA2=0.99"],
            "BETA2 = 0.99 means nothing to OPTIMIZER = 'adafactor', only to 'adamw' "
            "and 'muon': leave it at 0.95",
        ),
        (
            ["MUON_RMS=0.4"],
            "MUON_RMS = 0.4 means nothing to OPTIMIZER = 'adamw', only to 'muon': "
            "leave it at 0.2",
        ),
        (
            ["DECAY_SHAPE=sqrt"],
            "DECAY_SHAPE = 'sqrt' means nothing to SCHEDULE = 'cosine', only to 'wsd': "
            "leave it at 'linear'",
        ),
        (
            ["SCHEDULE=wsd", "DECAY_FRACTION=0.8"],
            "WARMUP_STEPS = 5 and DECAY_FRACTION = 0.8 of 20 steps, 16, leave none at "
            "the peak: one of them must be smaller",
        ),
        (["SCHEDULE=wsd", "DECAY_FRACTION=0"], "DECAY_FRACTION = 0.0: must be in (0, "),
        (
            ["BATCH_RAMP=((0,4),(5,6))"],
            "BATCH_RAMP = ((0, 4), (5, 6)) ends with 6 rows: that must be BATCH_SIZE = "
            "8",
        ),
        (
            ["BATCH_RAMP=((0,2),(5,8))", "MICROBATCHES=4"],
            "BATCH_RAMP from batch 0 = 2 does not divide over 1 batch shard × "
            "MICROBATCHES = 4: ",
        ),
        (["BATCH_RAMP=((0,),)"], "--gin.BATCH_RAMP: BATCH_RAMP = ((0,),) must be a "),
        (["QK_CLIP=-1"], "QK_CLIP = -1.0: cannot be negative"),
        (
            ["QK_CLIP=100", "QK_NORM=head"],
            "QK_CLIP = 100 means nothing to QK_NORM = 'head', which undoes what it "
            "does: leave one of them out",
        ),
        (["OPTIMIZER=muon", "MUON_BETA=1"], "MUON_BETA = 1.0: must be in [0, 1)"),
        (["OPTIMIZER=muon", "MUON_STEPS=0"], "MUON_STEPS = 0: must be at least 1"),
        (
            ["OPTIMIZER=adafactor", "EPSILON=1e-6"],
            "EPSILON = 1e-06 means nothing to OPTIMIZER = 'adafactor'",
        ),
        (
            ["SCHEDULE=constant", "FINAL_LEARNING_RATE_FRACTION=0.5"],
            "FINAL_LEARNING_RATE_FRACTION = 0.5 means nothing to SCHEDULE = 'constant'",
        ),
        (
            ["NOISE_DENSITY=0.3"],
            "NOISE_DENSITY = 0.3 means nothing to OBJECTIVE = 'causal_lm', only to "
            "'span_corruption', 'masked_lm' and 'masked_entities': leave it at 0.15",
        ),
        (
            ["START_TOKEN=<s>", "VOCABULARY=bytes"],
            "START_TOKEN = '<s>' is no piece of VOCABULARY = 'bytes', only of a "
            "tokenizer's file: set it to ''",
        ),
        (
            ["MEAN_NOISE_SPAN_LENGTH=4.0"],
            "MEAN_NOISE_SPAN_LENGTH = 4.0 means nothing to OBJECTIVE = 'causal_lm'",
        ),
        (
            ["GROUP_ROWS=3", "GROUP_SIZE=192"],
            "BATCH_SIZE = 8 does not divide over 1 batch shard × MICROBATCHES = 1 × "
            "GROUP_ROWS = 3: nearest are 6 and 9",
        ),
        (["SEED=-1"], "SEED = -1: must be in [0, 2**32)"),
        # One rule of each record's own list: they are all asked.
        (["HEAD_DIM=15"], "HEAD_DIM = 15: rotary positions turn pairs"),
        (["READ_RETRIES=-1"], "READ_RETRIES = -1: cannot be negative"),
        (["NEAR_DUPLICATE_SIMILARITY=2.0"], "NEAR_DUPLICATE_SIMILARITY = 2.0: "),
        (["MIXTURE_RATES={'a': -1}"], "MIXTURE_RATES = {'a': -1}: rates "),
        (["OBJECTIVE=seq2seq"], "TASK_FEATURE_LENGTHS = {'targets': 64}: OBJECTIVE = "),
        (
            ["TASK_METRICS_PERIOD=5"],
            "TASK_METRICS_PERIOD = 5: targets are predicted fr",
        ),
        (
            ["PREFIX_ATTENTION=bidirectional"],
            "PREFIX_ATTENTION = 'bidirectional' has no",
        ),
        (["MESH_DATA=0"], "MESH_DATA = 0: every axis has a size of at least 1"),
    ],
)
def test_a_broken_rule_is_told_with_numbers(bindings, problem):
    assert only_problem_of(TINY, *bindings).startswith(problem)


def test_a_dense_model_has_no_experts_to_divide():
    bindings = ["MOE_EVERY=0", "NUM_EXPERTS=3", "MESH_EXPERT=2", "SIMULATED_DEVICES=2"]
    assert reader.read([TINY], bindings).settings.mesh.expert == 2


@pytest.mark.parametrize("number", [0, -1, 10**9])
def test_no_number_breaks_the_rules_themselves(number):
    numeric = [
        macro
        for setting, macro in settings_and_macros()
        if fields_of_settings()[setting].type in (int, float)
    ]
    assert len(numeric) > 40
    for macro in numeric:
        with contextlib.suppress(ConfigError):
            reader.read([TINY], [f"{macro}={number}"])


def test_a_negative_size_is_always_refused_by_name():
    sizes = [
        macro for macro in macros_of_base() if re.match("NUM_|MESH_|.*_DIM", macro)
    ]
    assert len(sizes) > 10
    for macro in sizes:
        setting = next(name for name, bound in settings_and_macros() if bound == macro)
        named = "".join(problems_of(TINY, f"{macro}=-1"))
        assert macro in named or setting in named


@pytest.mark.fast
@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("ROUNDING='master'", "ROUNDING = 'master' means nothing to PARAM_DTYPE"),
        ("ROUNDING='stochastic'", "or set PARAM_DTYPE to 'bfloat16'"),
        ("OFFLOAD_OPTIMIZER=True", "there is no other memory to keep the optimizer"),
    ],
)
def test_precision_and_offload_that_would_do_nothing_are_refused(binding, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        reader.read(["runs/tiny.gin"], [binding])


def test_a_binding_that_sets_something_else_is_refused():
    with pytest.raises(ConfigError, match="this is not one value"):
        reader.read(["runs/tiny.gin"], ["#NUM_LAYERS=1\nNUM_EXPERTS = 8"])


@pytest.mark.parametrize("macro", ["MODEL_DIR", "STORE_DIR", "TRAIN_SPLIT"])
def test_a_path_or_name_with_a_nul_is_refused(macro):
    with pytest.raises(ConfigError, match=rf"{macro} = 'a\\x00b' holds a NUL"):
        reader.read(["runs/tiny.gin"], [f"{macro}='a\\0b'"])
