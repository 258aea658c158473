"""A run begins with a part of another run's checkpoint."""

import functools
import itertools
import re
import shutil
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from test_checkpoints import DATA, arrays_of, assert_bit_equal, random_state

from launch.checkpoints import beginning, provenance
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import CheckpointError, DamagedError, read_manifest
from launch.checkpoints.store import Checkpoints
from launch.config import reader
from launch.config.reader import ResolvedConfig
from launch.errors import EXIT_FAULT, ConfigError
from launch.records import events
from launch.report import happened
from launch.run.assemble import assemble
from launch.training import loop, start

VOCABULARY = DATA.vocabulary_fingerprint
BLOCKS = "decoder/layers/0"


def config_of(*knobs: str) -> ResolvedConfig:
    given = ["BATCH_SIZE=16", "SIMULATED_DEVICES=8", "TIE_EMBEDDINGS=False"]
    return reader.read(["runs/tiny.gin"], [*given, *knobs])


def save(folder: Path, *knobs: str, steps: tuple[int, ...] = (3,)) -> Path:
    """A run's folder with checkpoints of any numbers."""
    config = config_of(*knobs)
    run = assemble(config)
    with Checkpoints(str(folder), keep=2) as saved:
        for step in steps:
            now = provenance.provenance(config.operative, DATA)
            saved.save(random_state(run, step), run, now)
            saved.wait()
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Steps 3 and 5 of the tiny run on four devices; tests only read it."""
    folder = tmp_path_factory.mktemp("other")
    return save(folder, "MESH_DATA=2", "MESH_EXPERT=2", steps=(3, 5))


def source_of(
    config: ResolvedConfig, *, allow_changes: bool = False
) -> beginning.Source:
    return beginning.source_of(config, VOCABULARY, allow_changes=allow_changes)


def faults(*knobs: str, vocabulary: str = VOCABULARY) -> list[str]:
    config = config_of(*knobs)
    with pytest.raises(ConfigError) as refused:
        beginning.source_of(config, vocabulary, allow_changes=False)
    return list(refused.value.problems)


# --------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("mesh", [[], ["MESH_DATA=2", "MESH_EXPERT=4"]])
def test_what_is_taken_is_the_other_s_and_the_rest_is_as_drawn(
    other, mesh, monkeypatch
):
    knobs = ["TIE_EMBEDDINGS=True", "ROUTER_BIAS=True", f"START_FROM={other}"]
    patterns = "START_PATTERNS=('*/attention/*','*/sparse/*','params/embedding')"
    config = config_of(*knobs, patterns, *mesh)
    run, source = assemble(config), source_of(config)
    with jax.set_mesh(run.mesh):
        drawn = run.init_state()  # which compiles each time
        copies = functools.partial(jax.tree.map, jax.numpy.copy, drawn)
        monkeypatch.setattr(type(run), "init_state", lambda run: copies())
        state = source.first_state(run)
        again, kept = start._newest(
            run, NoCheckpoints(), {}, itertools.count(1), source
        )
    made, before = arrays_of(state.params), arrays_of(drawn.params)
    arrays = Arrays(other / "checkpoints/5", read_manifest(other / "checkpoints/5"))
    fates = {fate.name: fate.what for fate in source.part.fates}
    assert fates.keys() == made.keys() | {"head"}
    for name, array in made.items():
        taken = "/attention/" in name or "/sparse/" in name or name == "embedding"
        taken &= not name.endswith("selection_bias")
        assert fates[name] == ("loaded" if taken else "new"), name
        wanted = before[name]
        if taken:
            wanted = arrays.opened(f"params/{name}").read().result()
            if "scale" not in name:
                assert (wanted != before[name]).all(), name
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array.view("u4"), wanted.view("u4"), name)
    assert fates["head"] == "ignored"
    assert any("dense" in name and fate == "new" for name, fate in fates.items())
    for ours, theirs in zip(
        jax.tree.leaves(state), jax.tree.leaves(run.placed_shapes()), strict=True
    ):
        assert ours.sharding == theirs.sharding
    assert_bit_equal(state.opt_state, drawn.opt_state)
    assert int(state.step) == int(state.data_index) == 0
    # A run that goes back before its first checkpoint begins so again.
    assert_bit_equal(again, state)
    assert kept is None


class NoCheckpoints:
    """Those of a run that has saved none."""

    def latest(self) -> None:
        return None


def test_parameters_of_another_type_are_rounded_and_copies_of_them_follow(other):
    knobs = ["PARAM_DTYPE=bfloat16", "ROUNDING=master", f"START_FROM={other}"]
    config = config_of(*knobs, "START_PATTERNS=('*/attention/*',)", "MESH_EXPERT=4")
    run, source = assemble(config), source_of(config)
    with jax.set_mesh(run.mesh):
        state = source.first_state(run)
    path = other / "checkpoints/5"
    saved = Arrays(path, read_manifest(path))
    made, masters = arrays_of(state.params), arrays_of(state.opt_state.master)
    compared = 0
    for name in source.part.loaded:
        wanted = saved.opened(f"params/{name}").read().result()
        rounded = np.asarray(jax.numpy.asarray(wanted).astype("bfloat16"))
        np.testing.assert_array_equal(made[name].view("u2"), rounded.view("u2"), name)
        compared += 1
    assert compared == 10
    for name, array in made.items():
        np.testing.assert_array_equal(masters[name], array.astype(np.float32), name)
    assert any(
        fate.note == "float32 → bfloat16" for fate in source.part.fates if fate.note
    )


@pytest.mark.fast
def test_every_fate_is_told_one_line_for_each_kind(other):
    config = config_of("TIE_EMBEDDINGS=True", f"START_FROM={other}/checkpoints/3")
    part = source_of(config).part
    first, _, *rows, last = part.lines()
    assert first == f"START_FROM: {other}/checkpoints/3"
    told = {tuple(row.split()) for row in rows}
    assert ("loaded", "2", "2,048", "decoder/layers/*/*/attention/key") in told
    assert ("loaded", "1", "8,192", "decoder/layers/*/*/sparse/experts/up") in told
    assert ("ignored", "1", "12,288", "head") in told
    assert len(told) == len(rows) == 15
    assert part.counts() == {"loaded": 41_248, "new": 0, "ignored": 12_288}
    assert last.split()[:4] == ["loaded", "41,248", "of", "41,248"]
    assert last.endswith("0 are new; 12,288 of the checkpoint are ignored")
    assert part.step == 3
    assert part.digest == read_manifest(part.path)["manifest_digest"]
    (warning,) = part.warnings
    assert warning.endswith("of another model: TIE_EMBEDDINGS False → True")
    dry = beginning.described(config, allow_changes=False)
    assert dry[:-1] == part.lines()
    nowhere = config_of(f"START_FROM={other}/nowhere")
    (line,) = beginning.described(nowhere, allow_changes=False)
    assert "is not here" in line
    knobs = f"START_FROM={other}/nowhere", f"MODEL_DIR={other}"
    assert beginning.described(config_of(*knobs), allow_changes=False) == []


@pytest.mark.fast
def test_other_arithmetic_of_equal_arrays_is_a_warning_and_learning_is_none(other):
    knobs = ["ACTIVATION=relu", "ROPE_BASE=500.0", "NORM_EPSILON=1e-3", "DTYPE=float32"]
    free = ["LEARNING_RATE=1", "TRAIN_CAPACITY_FACTOR=9", "SEED=3", "JITTER_NOISE=0.1"]
    part = source_of(config_of(*knobs, *free, f"START_FROM={other}")).part
    (warning,) = part.warnings
    for knob in knobs[:3]:
        assert f"{knob.partition('=')[0]} " in warning
    for knob in free:
        assert knob.partition("=")[0] not in warning
    assert source_of(config_of(*free, f"START_FROM={other}")).part.warnings == ()


# --------------------------------------------------------------------- what is refused


@pytest.mark.fast
def test_all_that_does_not_fit_is_one_error(other):
    found = faults(
        f"START_FROM={other}",
        "START_PATTERNS=('*','*/sparse/ruoter','*/selection_bias','head')",
        "MLP_DIM=48",
        "ROUTER_BIAS=True",
        "TIE_EMBEDDINGS=True",
        vocabulary="another",
    )
    ours, theirs = "matches no parameter; the", f"no parameter of {other}"
    words = [
        (f"'*/sparse/ruoter' {ours}", f"{BLOCKS}/1/sparse/router"),
        (f"'head' {ours}",),
        ("'*/sparse/ruoter' matches ", theirs),
        ("'*/selection_bias' matches ", theirs),
        (f"{BLOCKS}/0/dense/down is [1, 48, 32] here and [1, 64, 32]", "or leave it"),
        (f"{BLOCKS}/0/dense/up is [1, 32, 48] here and [1, 32, 64] in",),
        ("embedding of ", f"{VOCABULARY}, than this run's, another", "EXTRA_IDS"),
    ]
    assert len(found) == len(words)
    for fault, parts in zip(found, words, strict=True):
        assert all(part in fault for part in parts), (fault, parts)


@pytest.mark.fast
def test_another_vocabulary_is_refused_where_its_rows_are_taken(other):
    from_there = f"START_FROM={other}"
    (fault,) = faults(from_there, vocabulary="another")
    assert fault.startswith("embedding and head of")
    without = config_of(from_there, "START_PATTERNS=('decoder/*',)")
    part = beginning.source_of(without, "another", allow_changes=False).part
    assert part.warnings == ()
    config = config_of(from_there)
    part = beginning.source_of(config, "another", allow_changes=True).part
    (warning,) = part.warnings
    assert "of another vocabulary" in warning


@pytest.mark.fast
def test_experts_that_are_new_and_frozen_are_refused(other):
    from_there, part = f"START_FROM={other}", "START_PATTERNS=('*/attention/*','head')"
    (fault,) = faults(from_there, part, "TRAINABLE=('*/attention/*',)")
    sparse = f"{BLOCKS}/1/sparse"
    assert fault.startswith(
        f"experts untrained: {sparse}/experts/down, {sparse}/experts/up, "
        f"{sparse}/router: "
    )
    assert "TRAINABLE = ('*/attention/*',) and FROZEN = ()" in fault
    # Frozen and taken is how to tune the rest; what is random elsewhere is said.
    frozen = config_of(from_there, "FROZEN=('*/sparse/*',)")
    assert source_of(frozen).part.warnings == ()
    dense = config_of(from_there, "START_PATTERNS=('*/sparse/*',)", "FROZEN=('*/key',)")
    (warning,) = source_of(dense).part.warnings
    assert warning.startswith("random and untrained: ")
    assert f"{BLOCKS}/0/attention/key, {BLOCKS}/1/attention/key: " in warning


@pytest.mark.fast
def test_arrays_of_other_layers_are_refused_though_their_shapes_are_equal(tmp_path):
    # Two periods of a dense and a sparse layer; and a dense layer twice, then a sparse.
    folder = save(tmp_path / "other", "NUM_LAYERS=4", "MOE_EVERY=2")
    knobs = ["NUM_LAYERS=4", "FIRST_DENSE_LAYERS=2", "MOE_EVERY=1"]
    found = faults(f"START_FROM={folder}", *knobs)
    assert found == [
        f"{BLOCKS}/0/ is of layers 0, 1 here and 0, 2 in {folder}/checkpoints/3: make "
        "the models alike, or leave it out of START_PATTERNS"
    ]


def test_a_checkpoint_that_is_not_there_or_is_damaged_is_said(other, tmp_path):
    for knob, words in [
        (f"{other}/checkpoints/4", "no checkpoint of step 4; there are: 3, 5"),
        (f"{tmp_path}/nowhere", "there is no checkpoint; there are: none"),
    ]:
        with pytest.raises(CheckpointError, match=words) as refused:
            source_of(config_of(f"START_FROM={knob}"))
        assert f"START_FROM = {knob!r}" in str(refused.value)
    folder = shutil.copytree(other, tmp_path / "copy")
    config = config_of(f"START_FROM={folder}")
    source, run = source_of(config), assemble(config)
    for file in (folder / "checkpoints/5/state").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.unlink()
    with jax.set_mesh(run.mesh), pytest.raises(DamagedError) as damaged:
        source.first_state(run)
    assert str(damaged.value).endswith("names: name another checkpoint")
    (folder / "checkpoints/5/manifest/metadata").unlink()
    with pytest.raises(DamagedError, match=r"START_FROM names"):
        source_of(config)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (["START_PATTERNS=('head',)"], "means nothing to START_FROM = ''"),
        (
            ["START_FROM=runs/x", "START_PATTERNS=()"],
            "() takes nothing",
        ),
        (["START_FROM=s3://bucket/x"], "must be a run's folder on this machine"),
        (["START_FROM='  '"], "names nothing"),
        (["INITIAL_CHECKPOINT_PATH=x"], "here T5X's is START_FROM"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs, words):
    with pytest.raises(ConfigError) as refused:
        config_of(*knobs)
    assert words in str(refused.value)


# ----------------------------------------------------------------------- a whole life


def test_a_run_begins_from_there_until_it_has_a_checkpoint(
    trained, tmp_path, monkeypatch
):
    source, folder = tmp_path / "source", tmp_path / "run"
    shutil.copytree(trained.folder, source)
    knobs = {
        "START_FROM": source,
        "START_PATTERNS": "('decoder/*','embedding')",
        "SEED": 1,
        "TRAIN_STEPS": 3,
        "WARMUP_STEPS": 1,
        "CHECKPOINT_PERIOD": 2,
        "EVAL_PERIOD": 9,
        "COMPILE_AHEAD": "train_step",
        "SELF_CHECK": "off",
    }
    begun = []

    def train(run, state, *others, original=loop.train, **named):
        begun.append(arrays_of(state.params))
        original(run, state, *others, **named)
        killed()  # and neither scores nor draws

    def killed(*given, **named):
        raise RuntimeError("killed")

    words = ["train", *trained.knobs(folder, **knobs)]
    with monkeypatch.context() as patch:
        patch.setattr(start, "_learn", killed)
        assert commands.inline(*words).code == EXIT_FAULT
    assert not list((folder / "checkpoints").iterdir())
    monkeypatch.setattr(loop, "train", train)
    done = commands.inline(*words)
    assert "RuntimeError: killed" in done.err
    assert re.search("new +1 +12,288  head +the checkpoint's is left out by", done.err)
    assert "loaded 32,992 of 45,280 parameters, 12,288 are new; 0 of" in done.err
    path = source / "checkpoints/20"
    saved = Arrays(path, read_manifest(path))
    for name, array in begun[0].items():
        theirs = saved.opened(f"params/{name}").read().result()
        assert np.array_equal(array, theirs) == (name != "head"), name

    first = read_manifest(folder / "checkpoints/2")
    digest = read_manifest(path)["manifest_digest"]
    assert first["parents"] == [{"path": str(path), "step": 20}]
    assert first["start_from"] == {
        "path": str(path),
        "step": 20,
        "digest": digest,
        "patterns": ["decoder/*", "embedding"],
    }
    (taken,) = [e for e in events.read(folder)[0] if e["event"] == "taken"]
    assert taken["digest"] == digest
    assert taken["parameters"]["new"] == 12_288
    look = ["checkpoint", "inspect", f"--model_dir={folder}", "--step=2"]
    looked = commands.inline(*look)
    assert f"began with  {path}, decoder/*, embedding" in looked.out

    # It goes on from its own, and asks for nothing that is gone.
    shutil.rmtree(source)
    shutil.rmtree(folder / "checkpoints/3")
    words.append("--gin.START_FROM=nowhere")
    done = commands.inline(*words)
    assert "RuntimeError: killed" in done.err
    assert "goes on from its own step 2, and takes nothing from there" in done.err
    last = read_manifest(folder / "checkpoints/3")
    assert last["start_from"] == first["start_from"]
    assert last["parents"] == [{"path": str(folder / "checkpoints/2"), "step": 2}]
    assert sum(e["event"] == "taken" for e in events.read(folder)[0]) == 1
    rows = happened.happened(folder).rows
    assert [row[2] for row in rows if "began with parameters of" in row[2]] == [
        f"began with parameters of {path}"
    ]
