"""Damage is refused or gone round, said in one line, and never learnt from."""

import dataclasses
import os
import shutil
from pathlib import Path

import damage
import jax
import numpy as np
import pytest
from test_checkpoints import (
    PROVENANCE,
    assert_bit_equal,
    no_file_beyond,
    random_state,
    tiny,
)

from launch.checkpoints import arrays, faults, history, sums, writing
from launch.checkpoints.digest import digests
from launch.checkpoints.newest import from_newest
from launch.checkpoints.places import CheckpointError, DamagedError, steps_in
from launch.checkpoints.store import Checkpoints
from launch.run.assemble import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return tiny("MESH_DATA=2", "MESH_EXPERT=2")


def state_of(run: Run, step: int, factor: float = 1):
    """A state whose parameters tell runs and steps apart."""
    state = random_state(run, step)
    params = jax.tree.map(lambda x: x * (step + factor), state.params)
    return dataclasses.replace(state, params=params)


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one model, of steps 3 and 5; tests only read them."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    for factor, folder in enumerate(folders):
        with Checkpoints(str(folder), keep=2) as checkpoint:
            for step in (3, 5):
                checkpoint.save(state_of(run, step, factor), run, PROVENANCE)
    return folders


def newest(folder: Path, run: Run):
    """Goes on from a run as `train` does."""
    with Checkpoints(str(folder), keep=2) as saved:

        def use(step: int | None):
            assert step is not None
            return step, saved.restore(step, run, PROVENANCE)

        return from_newest(saved, use)


# Files that Orbax keeps beside the arrays: nothing of Switchyard reads them.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt", "_METADATA", "_sharding")


def assert_none_is_learnt_from(cases: list[damage.Case]) -> None:
    said = damage.table(cases)
    assert damage.LEARNT not in {case.outcome for case in cases}, said
    for case in cases:
        lines = case.said.splitlines()
        if case.outcome == damage.FELL_BACK:
            (line,) = lines
            assert "5 is damaged: " in line, line
            assert line.endswith("kept as 5.damaged, and the run goes on from step 3")
        else:
            assert case.outcome == damage.UNHARMED, said
            assert not lines, said
    for case in cases:
        name = Path(case.file).name
        if name == "metadata" or case.file in ("state/manifest.ocdbt",):
            assert case.outcome == damage.FELL_BACK, said
        if name in UNREAD:
            assert case.outcome == damage.UNHARMED, said


def test_no_fault_of_what_says_where_things_are_is_learnt_from(run, runs):
    names = ("manifest/metadata", "state/manifest.ocdbt", "state/d/")
    cases = damage.injected(*runs, run, is_wanted=lambda file: file.startswith(names))
    assert len(cases) >= 3 * len(damage.FAULTS)
    assert {case.outcome for case in cases} == {damage.FELL_BACK}, damage.table(cases)
    assert_none_is_learnt_from(cases)


@pytest.mark.slow
def test_no_fault_of_any_file_is_learnt_from(run, runs):
    cases = damage.injected(*runs, run)
    print(damage.table(cases))
    files = [p for p in (runs[0] / "checkpoints" / "5").rglob("*") if p.is_file()]
    assert len(cases) == len(files) * len(damage.FAULTS)
    assert_none_is_learnt_from(cases)


def test_the_table_counts_what_became_of_faults():
    case = damage.Case("state/d/1", "flip", damage.FELL_BACK, "")
    other = dataclasses.replace(case, fault="delete", outcome=damage.REFUSED)
    assert damage.table([case, other]).splitlines() == [
        "          flip           delete",
        "state/d/1 fell back      refused",
        "1 fell back, 1 refused, 0 same bits, 0 LEARNT FROM IT",
    ]


@pytest.mark.parametrize("part", ["manifest", "state", "state/ocdbt.process_0"])
def test_half_a_checkpoint_is_gone_round(run, runs, tmp_path, capfd, part):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "5" / part)
    step, state = newest(folder, run)
    assert step == 3
    assert_bit_equal(state, state_of(run, 3, 0))
    (line,) = capfd.readouterr().err.splitlines()
    assert "missing" in line


def test_what_is_damaged_is_kept_counts_as_none_and_meets_no_later_save(
    run, runs, tmp_path, capfd
):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    place = folder / "checkpoints"
    for again in ("5.damaged", "5.damaged.2"):
        (place / "5" / "state" / "manifest.ocdbt").write_bytes(b"")
        assert newest(folder, run)[0] == 3
        assert (place / again / "manifest" / "metadata").is_file()
        with Checkpoints(str(folder), keep=2) as saved:
            saved.save(state_of(run, 5), run, PROVENANCE)
        assert steps_in(place) == [3, 5]
    with Checkpoints(str(folder), keep=1) as saved:
        saved.save(state_of(run, 7), run, PROVENANCE)
    assert sorted(os.listdir(place)) == ["5.damaged", "5.damaged.2", "7"]


def test_without_an_older_one_damage_is_an_error_and_nothing_is_touched(
    run, runs, tmp_path
):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    shutil.rmtree(folder / "checkpoints" / "3")
    (folder / "checkpoints" / "5" / "manifest" / "metadata").unlink()
    with pytest.raises(DamagedError, match=r"no older one: take another MODEL_DIR"):
        newest(folder, run)
    assert os.listdir(folder / "checkpoints") == ["5"]


def test_who_only_reads_does_not_fall_back(run, runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    (folder / "checkpoints" / "5" / "state" / "manifest.ocdbt").unlink()
    with (
        Checkpoints(str(folder), keep=1, read_only=True) as saved,
        pytest.raises(DamagedError, match=r"ocdbt is missing.* before is of step 3$"),
    ):
        saved.restore_params(saved.require(None), run)
    assert steps_in(folder / "checkpoints") == [3, 5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("PERMISSION_DENIED: x [tensorstore_spec='{}']", "PERMISSION_DENIED"),
        ("RESOURCE_EXHAUSTED: Failed to allocate", "RESOURCE_EXHAUSTED"),
        ("UNAVAILABLE: the network", "UNAVAILABLE"),
        ("INTERNAL: y [source locations='os_error_code='5'']", "Input/output error"),
        ("FAILED_PRECONDITION: z os_error_code='13'", "Permission denied"),
    ],
)
def test_what_proves_no_damage_is_not_called_damage(runs, text, said):
    path = runs[0] / "checkpoints" / "5"
    error = arrays._explained(path, "params/embedding", ValueError(text))
    assert type(error) is CheckpointError
    assert said in str(error)
    assert "damaged" not in str(error)


def test_memory_that_runs_out_moves_nothing(run, runs, tmp_path, monkeypatch):
    folder = shutil.copytree(runs[0], tmp_path / "copy")

    def full(*given, **named):
        raise MemoryError("no room on the device")

    monkeypatch.setattr(jax, "device_put", full)
    with pytest.raises(MemoryError, match="no room"):
        newest(folder, run)
    assert sorted(os.listdir(folder / "checkpoints")) == ["3", "5"]


def test_other_digests_on_the_devices_alone_prove_no_damage(
    run, runs, tmp_path, monkeypatch
):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    monkeypatch.setattr(
        "launch.checkpoints.restoring.digests",
        lambda found: dict.fromkeys(found, "00000000"),
    )
    with pytest.raises(CheckpointError, match="as it was saved, but the devices"):
        newest(folder, run)
    assert steps_in(folder / "checkpoints") == [3, 5]


# --------------------------------------------------------------------- a full disk


# As a thread or a destructor says what nobody can catch.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence_and_leaves_no_half(run, runs, tmp_path, capfd):
    folder = shutil.copytree(runs[0], tmp_path / "copy")

    def save() -> None:
        with Checkpoints(str(folder), keep=2) as checkpoint:
            checkpoint.save(state_of(run, 6), run, PROVENANCE)

    with no_file_beyond(50_000), pytest.raises(CheckpointError) as raised:
        save()
    path = folder / "checkpoints" / "6"
    assert str(raised.value) == f"cannot write {path}: File too large"
    # TensorStore's threads wrote a page of tracebacks there.
    assert capfd.readouterr().err == ""
    assert sorted(os.listdir(folder / "checkpoints")) == ["3", "5"]


def test_orbax_runs_what_it_awaits_where_it_is_told_to():
    from orbax.checkpoint._src import asyncio_utils

    writing.prepare()

    async def work() -> int:
        return 7

    assert asyncio_utils.run_sync(work()) == 7
    assert asyncio_utils._run_sync_via_new_loop is writing._to_its_end


# ------------------------------------------------------------- deleted checkpoints


def test_a_run_whose_checkpoints_were_deleted_does_not_begin_again(run, runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "copy")
    metrics = folder / "metrics.jsonl"
    metrics.write_text('{"step": 1000, "split": "train"}\n')
    shutil.rmtree(folder / "checkpoints")
    words = "no checkpoint, but metrics.jsonl beside it goes to step 1,000"
    with pytest.raises(CheckpointError, match=words):
        Checkpoints(str(folder), keep=2)
    (folder / "checkpoints").mkdir()  # emptied
    with pytest.raises(CheckpointError, match=f"{words}; step 5 was saved"):
        Checkpoints(str(folder), keep=2)
    (folder / history.SAVED_FILE).unlink()  # it ended before it saved any
    with Checkpoints(str(folder), keep=2) as saved:
        assert saved.latest() is None
    metrics.unlink()
    shutil.rmtree(folder / "checkpoints")
    with Checkpoints(str(folder), keep=2) as saved:
        assert saved.latest() is None


# -------------------------------------------------------------------- verification


def test_verification_names_every_damaged_file_and_array(runs, tmp_path):
    path = shutil.copytree(runs[0] / "checkpoints" / "5", tmp_path / "5")
    assert faults.find(path).faults == ()
    largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    damage.FAULTS["flip"](largest, largest)
    (path / "state" / "_sharding").write_bytes(b"")
    orbax, *found = faults.find(path).faults
    assert orbax == "state/_sharding is not JSON (nothing reads it)"
    assert found
    name = str(largest.relative_to(path))
    assert all(name in fault for fault in found)
    largest.unlink()
    assert f"{name} is missing" in faults.find(path).faults


def test_the_host_digests_as_devices_do(runs):
    rng = np.random.default_rng(4)
    for kind in ("float32", "bfloat16", "int8"):
        values = np.asarray(jax.numpy.asarray(rng.normal(size=(6, 5, 4)) * 9, kind))
        cut = [
            (slice(0, 4), slice(0, 5), slice(0, 4)),
            (slice(4, 6),) + (slice(0),) * 2,
        ]
        cut[1] = (slice(4, 6), slice(0, 5), slice(0, 4))
        found = sums.digest_of(values.shape, [(place, values[place]) for place in cut])
        assert found == digests({"x": jax.numpy.asarray(values)})["x"], kind
