"""Checkpoints restore on any mesh, and refuse what is damaged or of something else."""

import contextlib
import dataclasses
import gc
import json
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.checkpoints import digest, places, provenance
from launch.checkpoints.names import named_arrays
from launch.checkpoints.places import CheckpointError
from launch.checkpoints.store import Checkpoints
from launch.config import reader
from launch.run.assemble import Run, assemble
from tasks.manifest import Manifest, SplitManifest, TaskManifest


def of_split(fingerprint: str) -> dict[str, TaskManifest]:
    split = SplitManifest(1, {"targets": 2}, 3, fingerprint)
    return {"made_up": TaskManifest({"train": split}, 1.0, {})}


DATA = Manifest(
    name="made_up",
    vocabulary="bytes",
    vocabulary_size=259,
    vocabulary_fingerprint="of the vocabulary",
    train_split="train",
    heldout_split="validation",
    extra_ids=0,
    tasks=of_split("of the split"),
    filters={},
)
OTHER_DATA = dataclasses.replace(DATA, tasks=of_split("of another"))


def tiny(*bindings: str) -> Run:
    """The tiny run, on a mesh and with changes of one's own."""
    knobs = ["BATCH_SIZE=16", "SIMULATED_DEVICES=8", "TIE_EMBEDDINGS=False"]
    knobs += bindings
    return assemble(reader.read(["runs/tiny.gin"], knobs))


def random_state(run: Run, step: int = 3, skipped: int = 0):
    """A state of any numbers, placed as the run places it."""
    rng = np.random.default_rng(0)

    def draw(shape):
        if shape.dtype == np.int32:
            values = np.asarray(step, np.int32)
        else:
            values = rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)
        return jax.device_put(values, shape.sharding)

    state = jax.tree.map(draw, run.placed_shapes())
    none = jax.device_put(np.int32(skipped), state.step.sharding)
    return dataclasses.replace(state, skipped_in_a_row=none)


def arrays_of(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in named_arrays(tree).items()}


def assert_bit_equal(one, other) -> None:
    ours, theirs = arrays_of(one), arrays_of(other)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array.view("u4"), theirs[name].view("u4"), name)


PROVENANCE = provenance.provenance("SEED = 7\n", DATA)
OF_OTHER_DATA = provenance.provenance("SEED = 7\n", OTHER_DATA)


@pytest.fixture(scope="module")
def run() -> Run:
    return tiny("MESH_DATA=2", "MESH_EXPERT=2")


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of steps 3 and 5; tests only read it."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(str(folder), keep=2) as checkpoint:
        for step in (3, 5):
            checkpoint.save(random_state(run, step), run, PROVENANCE)
            checkpoint.wait()
    return folder


def opened(folder: Path) -> Checkpoints:
    return Checkpoints(str(folder), keep=1, read_only=True)


# -------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "mesh", [["MESH_DATA=2", "MESH_EXPERT=2"], ["MESH_DATA=2", "MESH_EXPERT=4"], []]
)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(run, saved, mesh):
    other = tiny(*mesh)
    with opened(saved) as checkpoint:
        state = checkpoint.restore(3, other, PROVENANCE)
    assert_bit_equal(state, random_state(run))
    wanted = jax.tree.leaves(other.shardings)
    for array, sharding in zip(jax.tree.leaves(state), wanted, strict=True):
        assert array.sharding == sharding


def test_parameters_come_back_alone(run, saved):
    other = tiny("MESH_EXPERT=4")
    with opened(saved) as checkpoint:
        params = checkpoint.restore_params(5, other)
    assert_bit_equal(params, random_state(run, 5).params)
    sharding = named_arrays(params)["decoder/layers/0/1/sparse/experts/up"].sharding
    assert sharding.shard_shape((1, 4, 32, 64)) == (1, 1, 32, 64)


def test_parameters_come_back_without_the_optimizer_that_made_them(run, saved):
    other = tiny("OPTIMIZER=adafactor")
    with opened(saved) as checkpoint:
        params = checkpoint.restore_params(3, other)
    assert_bit_equal(params, random_state(run).params)


# ------------------------------------------------------------ what is trained


FROZEN = ("*/experts/*", "embedding")


def test_a_run_that_freezes_goes_on_without_the_state_of_what_is_frozen(run, saved):
    other = tiny("MESH_EXPERT=4", f"FROZEN={FROZEN}")
    now = provenance.provenance(f"SEED = 7\nFROZEN = {FROZEN}\n", DATA)
    with opened(saved) as checkpoint:
        with pytest.raises(CheckpointError, match="FROZEN") as refused:
            checkpoint.restore(3, other, now)
        state = checkpoint.restore(3, other, now, allow_changes=True)
    assert "--allow_changes" in str(refused.value)
    assert "experts" not in str(refused.value).replace(str(FROZEN), "")
    arrays, before = arrays_of(state), arrays_of(random_state(run))
    gone = before.keys() - arrays.keys()
    assert gone == {
        name
        for name in before
        if name.startswith("opt_state")
        and ("/experts/" in name or name.endswith("/embedding"))
    }
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, before[name], name)


def test_what_is_trained_anew_begins_with_a_state_of_the_optimizer(tmp_path):
    frozen = tiny(f"FROZEN={FROZEN}", "PARAM_DTYPE=bfloat16", "ROUNDING=master")
    whole = tiny("MESH_EXPERT=2", "PARAM_DTYPE=bfloat16", "ROUNDING=master")
    given = provenance.provenance(f"FROZEN = {FROZEN}\n", DATA)
    now = provenance.provenance("FROZEN = ()\n", DATA)
    before = random_state(frozen)
    with Checkpoints(str(tmp_path), keep=1) as checkpoint:
        checkpoint.save(before, frozen, given)
        checkpoint.wait()
    with opened(tmp_path) as checkpoint:
        state = checkpoint.restore(3, whole, now, allow_changes=True)
    arrays, old = arrays_of(state), arrays_of(before)
    fresh = arrays.keys() - old.keys()
    assert any("/mu/" in name for name in fresh)
    for name, array in arrays.items():
        if name in old:
            np.testing.assert_array_equal(array, old[name], name)
        elif "master/" in name:  # what the next update starts from
            parameter = "params/" + name.partition("master/")[2]
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, arrays[parameter].astype(np.float32))
        else:
            assert not array.any(), name


def test_the_manifest_says_where_a_checkpoint_comes_from(run, saved):
    with opened(saved) as checkpoint:
        manifest = checkpoint.manifest(5)
    assert manifest["step"] == manifest["data_index"] == 5
    assert manifest["config"] == "SEED = 7\n"
    assert manifest["task"] == "made_up"
    assert manifest["data_fingerprint"] == DATA.fingerprint
    assert manifest["vocabulary_fingerprint"] == "of the vocabulary"
    assert manifest["parents"] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", manifest["code_version"])
    assert manifest["jax_version"] == jax.__version__
    assert manifest["mesh"] == dataclasses.asdict(run.settings.mesh)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", manifest["saved_at"])
    arrays = named_arrays(run.shapes)
    assert manifest["arrays"].keys() == arrays.keys()
    for name, array in manifest["arrays"].items():
        assert array["shape"] == list(arrays[name].shape), name
        assert array["dtype"] == str(arrays[name].dtype), name
        assert re.fullmatch("[0-9a-f]{8}", array["digest"])


def test_a_restored_state_can_be_saved(run, saved, tmp_path):
    # In one process, as a resumed run does it.
    folder = shutil.copytree(saved, tmp_path / "copy")
    with Checkpoints(str(folder), keep=2) as checkpoint:
        state = checkpoint.restore(5, run, PROVENANCE)
        later = dataclasses.replace(state, step=state.step + 1)
        checkpoint.save(later, run, PROVENANCE)
        checkpoint.wait()
        assert_bit_equal(checkpoint.restore(6, run, PROVENANCE), later)


def test_an_optimizer_s_state_in_the_host_s_memory_comes_back(run, tmp_path):
    there = random_state(run)
    places = jax.tree.map(
        lambda place: place.with_memory_kind("pinned_host"), run.shardings.opt_state
    )
    shardings = dataclasses.replace(run.shardings, opt_state=places)
    away = dataclasses.replace(run, shardings=shardings)
    there = dataclasses.replace(
        there, opt_state=jax.device_put(there.opt_state, places)
    )
    with Checkpoints(str(tmp_path), keep=1) as checkpoint:
        checkpoint.save(there, away, PROVENANCE)
        checkpoint.wait()
        back = checkpoint.restore(3, away, PROVENANCE)
    assert_bit_equal(back, there)
    for array, place in zip(
        jax.tree.leaves(back.opt_state), jax.tree.leaves(places), strict=True
    ):
        assert array.sharding == place


@pytest.mark.parametrize(
    "knobs",
    [
        ("PARAM_DTYPE=bfloat16",),
        ("PARAM_DTYPE=bfloat16", "ROUNDING=master"),
        ("PARAM_DTYPE=bfloat16", "MOMENT_DTYPE=bfloat16", "ROUNDING=stochastic"),
        ("OPTIMIZER=adafactor", "BETA2=0.95", "BETA1=0.5"),
    ],
    ids=" ".join,
)
def test_a_state_of_every_type_comes_back(tmp_path, knobs):
    run = tiny(*knobs)
    state = run.init_state()
    with Checkpoints(str(tmp_path), keep=1) as checkpoint:
        checkpoint.save(state, run, PROVENANCE)
        checkpoint.wait()
        back = checkpoint.restore(0, run, PROVENANCE)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# -------------------------------------------------------------- which steps there are


def test_the_newest_steps_are_kept(run, tmp_path):
    with Checkpoints(str(tmp_path), keep=2) as checkpoint:
        assert checkpoint.latest() is None
        for step in (1, 2, 3, 4):
            checkpoint.save(random_state(run, step), run, PROVENANCE)
        checkpoint.wait()
        assert checkpoint.latest() == 4
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["3", "4"]


def test_what_only_skipped_steps_led_to_pushes_no_other_out(run, tmp_path):
    def steps_after(step: int, skipped: int) -> list[str]:
        # Opened again: what was skipped before is known from the manifests.
        with Checkpoints(str(tmp_path), keep=2) as checkpoint:
            checkpoint.save(random_state(run, step, skipped), run, PROVENANCE)
        return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())

    assert steps_after(1, 0) == ["1"]
    assert steps_after(2, 0) == ["1", "2"]
    assert steps_after(3, 1) == ["1", "2", "3"]
    assert steps_after(4, 2) == ["1", "2", "4"]
    assert steps_after(5, 0) == ["2", "5"]


def test_the_best_by_the_metrics_of_the_run_is_kept(run, tmp_path):
    line = '{{"step": {}, "split": "heldout", "loss/nats_per_token": {}}}\n'
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text(line.format(1, 2.0) + line.format(2, 3.0))
    for step in (1, 2):
        with Checkpoints(str(tmp_path), keep=2) as checkpoint:
            checkpoint.save(random_state(run, step), run, PROVENANCE)
    with Checkpoints(str(tmp_path), keep=1, keep_best=1) as checkpoint:
        checkpoint.save(random_state(run, 3), run, PROVENANCE)
        assert checkpoint.steps() == [1, 3]
        checkpoint.scored(3, {"loss/nats_per_token": 1.0})
        checkpoint.save(random_state(run, 4), run, PROVENANCE)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_a_checkpoint_names_the_one_that_its_run_went_on_from(run, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    with Checkpoints(str(folder), keep=2) as checkpoint:
        state = checkpoint.restore(5, run, PROVENANCE)
        later = dataclasses.replace(state, step=state.step + 1)
        checkpoint.save(later, run, PROVENANCE)
        checkpoint.wait()
        parents = checkpoint.manifest(6)["parents"]
    assert parents == [{"path": str(folder / "checkpoints" / "5"), "step": 5}]


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_step_that_is_not_newer_is_not_saved(run, saved, tmp_path, step):
    folder = shutil.copytree(saved, tmp_path / "copy")
    with (
        Checkpoints(str(folder), keep=2) as checkpoint,
        pytest.raises(CheckpointError, match=f"step {step} was not saved.* as new, 5"),
    ):
        checkpoint.save(random_state(run, step), run, PROVENANCE)


def test_the_newest_step_is_taken_unless_one_is_named(saved, tmp_path):
    with opened(saved) as checkpoint:
        assert checkpoint.latest() == checkpoint.require(None) == 5
        assert checkpoint.require(3) == 3
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; .*: 3, 5"):
            checkpoint.manifest(4)
    (tmp_path / "checkpoints").mkdir()
    with opened(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
            checkpoint.require(None)
        with pytest.raises(CheckpointError, match="step 4; there are: none"):
            checkpoint.manifest(4)


def test_reading_changes_no_file_and_says_nothing(run, saved, capfd, caplog):
    before = {path: path.stat() for path in saved.rglob("*") if path.is_file()}
    with opened(saved) as checkpoint:
        checkpoint.restore_params(checkpoint.require(None), run)
    after = {path: path.stat() for path in saved.rglob("*") if path.is_file()}
    assert {p: (s.st_mtime_ns, s.st_size) for p, s in before.items()} == {
        p: (s.st_mtime_ns, s.st_size) for p, s in after.items()
    }
    assert not caplog.records
    assert capfd.readouterr().err == ""


def test_a_save_that_a_kill_cut_short_is_not_found_and_is_removed(run, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    torn = folder / "checkpoints" / "8.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / "5", torn)
    with opened(folder) as checkpoint:
        assert checkpoint.latest() == 5
    assert torn.exists()
    with Checkpoints(str(folder), keep=2) as checkpoint:
        assert checkpoint.latest() == 5
        checkpoint.save(random_state(run, 9), run, PROVENANCE)
        checkpoint.wait()
        assert checkpoint.latest() == 9
    assert not torn.exists()


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The nearest to a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        gc.collect()  # so that what was left unfinished is no later test's warning


def test_a_full_disk_is_said_and_what_was_there_stays(run, saved, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "copy")

    def save() -> None:
        with Checkpoints(str(folder), keep=2) as checkpoint:
            checkpoint.save(random_state(run, 6), run, PROVENANCE)
            checkpoint.wait()

    words = r"cannot write .*/checkpoints(/6)?: File too large$"
    with no_file_beyond(50_000), pytest.raises(CheckpointError, match=words):
        save()
    assert not caplog.records
    with opened(folder) as checkpoint:
        assert checkpoint.latest() == 5
        assert_bit_equal(checkpoint.restore(5, run, PROVENANCE), random_state(run, 5))


def test_what_went_wrong_first_is_not_hidden_by_a_full_disk(run, tmp_path):
    def save_and_fail() -> None:
        with Checkpoints(str(tmp_path), keep=2) as checkpoint:
            checkpoint.save(random_state(run, 1), run, PROVENANCE)
            raise KeyError("first")

    with no_file_beyond(50_000), pytest.raises(KeyError, match="first"):
        save_and_fail()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*File exists"):
        Checkpoints(str(tmp_path), keep=2)


# ------------------------------------------------------------------- what is refused


def test_every_difference_of_another_model_is_in_one_table(saved):
    other = tiny("NUM_EXPERTS=8", "MLP_DIM=48", "TIE_EMBEDDINGS=True")
    with opened(saved) as checkpoint:
        with pytest.raises(CheckpointError) as raised:
            checkpoint.restore(3, other, PROVENANCE)
        with pytest.raises(CheckpointError) as of_params:
            checkpoint.restore_params(3, other)
    first, header, *rows, remedy = str(raised.value).splitlines()
    assert header.split() == ["saved", "wanted"]
    assert str(saved / "config.gin") in remedy
    assert "another MODEL_DIR to start afresh" in remedy
    table = {}
    for row in rows:
        name, *shapes = re.split(r"\s{2,}", row.strip())
        table[name] = shapes
    blocks = "params/decoder/layers/0"
    of_model = {
        "params/head": ["float32[32, 384]", "–"],
        f"{blocks}/0/dense/down": ["float32[1, 64, 32]", "float32[1, 48, 32]"],
        f"{blocks}/0/dense/up": ["float32[1, 32, 64]", "float32[1, 32, 48]"],
        f"{blocks}/1/sparse/experts/down": [
            "float32[1, 4, 64, 32]",
            "float32[1, 8, 64, 32]",
        ],
        f"{blocks}/1/sparse/experts/up": [
            "float32[1, 4, 32, 64]",
            "float32[1, 8, 32, 64]",
        ],
        f"{blocks}/1/sparse/router": ["float32[1, 32, 4]", "float32[1, 32, 8]"],
    }
    assert {n: s for n, s in table.items() if n.startswith("params")} == of_model
    assert len(table) == 3 * len(of_model)  # and of two moments each
    assert f"in {len(table)} places" in first
    assert f"in {len(of_model)} places" in str(of_params.value)


def test_what_only_the_checkpoint_has_is_a_difference_too(saved):
    with opened(saved) as checkpoint, pytest.raises(CheckpointError) as raised:
        checkpoint.restore(3, tiny("OPTIMIZER=adafactor"), PROVENANCE)
    (row,) = [r for r in str(raised.value).splitlines() if "/mu/embedding" in r]
    assert row.split()[-1] == "–"


def test_other_data_are_refused(run, saved):
    with opened(saved) as checkpoint:
        with pytest.raises(CheckpointError, match="in 1 place:") as raised:
            checkpoint.restore(3, run, OF_OTHER_DATA)
        # Another text may well be scored with the same vocabulary.
        checkpoint.restore_params(3, run, OF_OTHER_DATA)
    row = str(raised.value).splitlines()[2].split()
    assert row == ["data_fingerprint", DATA.fingerprint, OTHER_DATA.fingerprint]


def of_config(*bindings: str) -> dict:
    config = reader.read(["runs/tiny.gin"], ["BATCH_SIZE=16", *bindings])
    return provenance.provenance(config.operative, DATA)


def test_another_model_or_order_of_the_same_arrays_is_refused(run, tmp_path):
    with Checkpoints(str(tmp_path), keep=1) as checkpoint:
        checkpoint.save(random_state(run), run, of_config())
        checkpoint.wait()
    learning = "LEARNING_RATE=0.5", "MESH_DATA=2", "SIMULATED_DEVICES=2"
    another = "SEED=1", "ACTIVATION=relu", "NUM_SELECTED_EXPERTS=2", "SHUFFLE=False"
    other = of_config(*another, *learning)
    with opened(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match="in 4 places:") as raised:
            checkpoint.restore(3, run, other)
        checkpoint.restore(3, run, of_config(*learning))
        checkpoint.restore(3, run, other, allow_changes=True)
        checkpoint.restore_params(3, run, other)
        changed = checkpoint.compare(3, run, other, allow_changes=True)
    _, header, *rows, remedy = str(raised.value).splitlines()
    assert header.split() == ["saved", "wanted"]
    assert [re.split(r"\s{2,}", row.strip()) for row in rows] == [
        ["SEED", "0", "1"],
        ["SHUFFLE", "True", "False"],
        ["ACTIVATION", "'gelu'", "'relu'"],
        ["NUM_SELECTED_EXPERTS", "1", "2"],
    ]
    assert "add --allow_changes" in remedy
    assert {c.macro for c in changed if not c.fixed} == {
        word.partition("=")[0] for word in learning
    }


def test_parameters_are_refused_for_another_vocabulary(run, saved):
    other = dataclasses.replace(OTHER_DATA, vocabulary_fingerprint="another")
    now = provenance.provenance("SEED = 7\n", other)
    with opened(saved) as checkpoint, pytest.raises(CheckpointError) as raised:
        checkpoint.restore_params(3, run, now)
    rows = str(raised.value).splitlines()[2:-1]
    assert [row.split()[0] for row in rows] == ["vocabulary_fingerprint"]


def test_an_array_that_is_not_what_was_saved_is_named(run, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "checkpoints" / "5" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    entry = manifest["arrays"]["params/embedding"]
    entry["digest"] = f"{int(entry['digest'], 16) ^ 1:08x}"
    path.write_text(json.dumps(places.sealed(manifest)))
    with opened(folder) as checkpoint, pytest.raises(CheckpointError) as raised:
        checkpoint.restore(5, run, PROVENANCE)
    words = "5 is damaged: what was read is not what was saved, in params/embedding. "
    assert words in str(raised.value)
    assert str(raised.value).endswith("The one before is of step 3")


def test_a_manifest_that_is_damaged_is_said(run, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    path = folder / "checkpoints" / "5" / "manifest" / "metadata"
    whole = path.read_bytes()
    torn = whole.replace(b'"digest"', b'"digesu"', 1)
    for content in (b"", whole[:100], b"\xff" + whole, b"{}", b"[]", torn):
        path.write_bytes(content)
        with opened(folder) as checkpoint, pytest.raises(CheckpointError, match="5"):
            checkpoint.restore(5, run, PROVENANCE)


@pytest.mark.parametrize("parts", [[], ["manifest"], ["state"]])
def test_a_folder_that_is_no_checkpoint_is_said(run, saved, tmp_path, parts):
    folder = shutil.copytree(saved, tmp_path / "copy")
    foreign = folder / "checkpoints" / "999"
    foreign.mkdir()
    for part in parts:
        shutil.copytree(folder / "checkpoints" / "5" / part, foreign / part)
    with opened(folder) as checkpoint, pytest.raises(CheckpointError, match="999"):
        checkpoint.restore(checkpoint.require(None), run, PROVENANCE)
    with opened(folder) as checkpoint:
        checkpoint.restore(5, run, PROVENANCE)


# ----------------------------------------------------------------------- the digest


def digest_of(values, sharding=None) -> int:
    array = jax.device_put(values, sharding)
    return int(digest.digests({"x": array})["x"], 16)


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8"])
def test_every_single_flipped_bit_changes_the_digest(dtype):
    word = {4: np.uint32, 2: np.uint16, 1: np.uint8}[jax.numpy.dtype(dtype).itemsize]
    rng = np.random.default_rng(1)
    bits = rng.integers(0, np.iinfo(word).max, (2, 3, 5), word, endpoint=True)
    whole = digest_of(bits.view(dtype))
    for place in np.ndindex(bits.shape):
        for bit in range(8 * bits.itemsize):
            flipped = bits.copy()
            flipped[place] ^= word(1 << bit)
            assert digest_of(flipped.view(dtype)) != whole, (place, bit)


def test_elements_that_change_places_change_the_digest():
    # A weighted sum would miss these: their difference is 2**23 and they stand 256
    # apart, or it is 2**31 and they stand anywhere.
    values = np.ones((4, 256), np.float32)
    values[0, 7], values[2, 9] = 2.0, -1.0
    whole = digest_of(values)
    for one, other in [((0, 7), (1, 7)), ((0, 7), (3, 200)), ((2, 9), (2, 11))]:
        swapped = values.copy()
        swapped[one], swapped[other] = values[other], values[one]
        assert digest_of(swapped) != whole
    assert digest_of(values.T.copy()) != whole
    assert digest_of(np.roll(values, 1, axis=0)) != whole


def test_the_digest_does_not_depend_on_the_sharding(meshes):
    values = np.random.default_rng(2).standard_normal((8, 6, 4), np.float32)
    mesh = meshes["d4e2"]
    places = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for spec in [(), ("data",), ("expert", None, "data"), (("data", "expert"),)]
    ]
    assert len({digest_of(values, place) for place in places}) == 1
    assert digest_of(values) == digest_of(values, places[0])


def test_the_digest_is_the_sum_it_says():
    # Oracle: Python's integers. Old checkpoints must stay readable.
    def mixed(word):
        word = ((word ^ (word >> 16)) * 0x85EBCA6B) % 2**32
        word = ((word ^ (word >> 13)) * 0xC2B2AE35) % 2**32
        return word ^ (word >> 16)

    values = np.random.default_rng(3).standard_normal((3, 4), np.float32)
    words = values.view(np.uint32).ravel().tolist()
    total = sum(mixed(word ^ mixed(index)) for index, word in enumerate(words))
    assert digest_of(values) == total % 2**32
