"""Checkpoints in a bucket: whole or not there, whoever is killed and whatever fails."""

import itertools
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import bucket_server
import commands
import pytest
from test_checkpoints import PROVENANCE, assert_bit_equal, random_state, tiny
from test_processes import start, words_of

from launch.checkpoints import beginning, faults, remote
from launch.checkpoints.bucket import Bucket, files_of, new_folder
from launch.checkpoints.newest import from_newest
from launch.checkpoints.places import CheckpointError
from launch.checkpoints.store import Checkpoints
from launch.checkpoints.there import There
from launch.config import reader
from launch.run.assemble import Run
from tasks import files
from tasks.errors import StoreError


@pytest.fixture(scope="module")
def module_server():
    """One address for this process: TensorStore asks its environment once."""
    with bucket_server.serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_server.environment(server).items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def server(module_server):
    """A server whose bucket is empty."""
    module_server.objects.clear()
    yield module_server
    module_server.faults, module_server.before_write = iter(()), lambda key: None


@pytest.fixture(params=["gs", "s3"])
def place(request, server) -> str:
    return f"{request.param}://bucket/runs/one"


@pytest.fixture(scope="module")
def run() -> Run:
    return tiny("MESH_DATA=2", "MESH_EXPERT=2")


def save(run: Run, folder: Path, place: str, *steps: int, keep: int = 2) -> None:
    with Checkpoints(str(folder), keep, bucket=place) as saved:
        for step in steps:
            saved.save(random_state(run, step), run, PROVENANCE)


def newest(run: Run, folder: Path, place: str):
    """Goes on from a run as `train` does."""
    with Checkpoints(str(folder), keep=2, bucket=place) as saved:

        def use(step: int | None):
            return step, step and saved.restore(step, run, PROVENANCE)

        return from_newest(saved, use)


def local(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "checkpoints"))


# ------------------------------------------------------------- what a bucket comes to


def test_a_bucket_keeps_what_the_folder_does_not(run, server, place, tmp_path):
    save(run, tmp_path / "a", place, 1, 2, 3)
    assert local(tmp_path / "a") == ["3"]
    folders = {name.split("/")[2] for name in server.objects} - {"index.json"}
    assert sorted(name.partition("-")[0] for name in folders) == ["2", "3"]
    # Another machine has none of it, and neither step nor bit is lost.
    step, state = newest(run, tmp_path / "b", place)
    assert step == 3
    assert_bit_equal(state, random_state(run, 3))
    with Checkpoints(str(tmp_path / "b"), 1, bucket=place, read_only=True) as saved:
        assert saved.steps() == [2, 3]
        params = saved.restore_params(2, run)
    assert_bit_equal(params, random_state(run, 2).params)
    assert json.loads((tmp_path / "a" / "newest_saved.json").read_text())["step"] == 3


@pytest.mark.parametrize("scheme", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_a_bucket_that_fails_now_and_then_keeps_checkpoints_all_the_same(
    run, server, scheme, tmp_path
):
    place = f"{scheme}://bucket/runs/one"
    told: list[str] = []
    server.faults = bucket_server.now_and_then(told)
    save(run, tmp_path / "a", place, 1, 2)
    shutil.rmtree(tmp_path / "a")
    step, state = newest(run, tmp_path / "a", place)
    assert step == 2
    assert_bit_equal(state, random_state(run, 2))
    assert set(told) == {"", *bucket_server.FAULTS}, "each kind happened"


def test_whatever_is_killed_between_two_writes_leaves_whole_checkpoints(
    server, tmp_path, monkeypatch
):
    """What the bucket holds before each write, and after the last, is looked at."""
    monkeypatch.setattr("launch.checkpoints.objects.PIECE_BYTES", 1000)
    place, moments = "gs://bucket/run", []
    server.before_write = lambda key: moments.append(dict(server.objects))
    contents = {}
    writer = Bucket(place)
    writer.look()
    writer.own("run")
    for step in (1, 2, 3):
        path = tmp_path / "written" / str(step)
        (path / "state").mkdir(parents=True)
        for name, size in (("a", 2500), ("state/b", 1000), ("empty", 0)):
            (path / name).write_bytes(os.urandom(size))
        contents[step] = {name: (path / name).read_bytes() for name in files_of(path)}
        folder = new_folder(step)
        listing = writer.upload(path, folder, files_of(path))
        stays = {step - 1}.__contains__
        writer.commit(step, folder, listing, stalled=False, keep=stays)
    moments.append(dict(server.objects))
    server.before_write = lambda key: None
    seen = set()
    for number, objects in enumerate(moments):
        server.objects.clear()
        server.objects |= objects
        reader = Bucket(place)
        reader.look()
        seen.add(tuple(sorted(reader.entries)))
        for step in reader.entries:
            path = tmp_path / "read" / str(number) / str(step)
            reader.fetch(step, path)
            found = {name: (path / name).read_bytes() for name in files_of(path)}
            assert found == contents[step]
    assert seen == {(), (1,), (1, 2), (2, 3)}
    assert len(moments) > 3 * 5


def test_what_was_cut_short_is_removed_and_finished(run, server, place, tmp_path):
    save(run, tmp_path, place, 1)
    whole = dict(server.objects)
    save(run, tmp_path, place, 2)
    kept = dict(server.objects)
    # Killed after the folder was whole, and half of it was in the bucket.
    late = [name for name in kept if "/2-" in name and name not in whole]
    server.objects.clear()
    leftovers = set(late[: len(late) // 2])
    assert leftovers
    server.objects |= whole | {name: kept[name] for name in leftovers}
    server.objects["runs/one/notes.txt"] = b"mine"
    step, state = newest(run, tmp_path, place)
    assert step == 2
    assert_bit_equal(state, random_state(run, 2))
    assert not leftovers & server.objects.keys(), "leftovers are gone"
    assert server.objects["runs/one/notes.txt"] == b"mine"
    assert local(tmp_path) == ["2"]


# ---------------------------------------------------------------------- two of them


def test_of_two_writers_the_later_one_wins_and_the_other_ends(run, place, tmp_path):
    first = Checkpoints(str(tmp_path / "a"), 2, bucket=place)
    first.save(random_state(run, 1), run, PROVENANCE)
    first.wait()
    save(run, tmp_path / "b", place, 2)
    assert_bit_equal(first.restore(1, run, PROVENANCE), random_state(run, 1))
    first.save(random_state(run, 3), run, PROVENANCE)
    with pytest.raises(CheckpointError, match=r"by process .* this run writes no more"):
        first.wait()
    step, state = newest(run, tmp_path / "c", place)
    assert step == 2
    assert_bit_equal(state, random_state(run, 2))


def test_no_index_is_written_over_one_that_was_not_read(place):
    one, other = Bucket(place), Bucket(place)
    one.look()
    other.look()
    one.own("a")
    with pytest.raises(CheckpointError, match="taken over"):
        other.own("b")
    again = Bucket(place)
    again.look()
    assert again.run == "a"


def test_the_checkpoints_of_another_run_are_refused(run, place, tmp_path):
    save(run, tmp_path / "a", place, 1)
    save(run, tmp_path / "b", f"{place}_b", 1)
    with pytest.raises(CheckpointError, match=r"of another run than .*b: take another"):
        Checkpoints(str(tmp_path / "b"), 2, bucket=place)
    save(run, tmp_path / "c", "", 1)
    with pytest.raises(CheckpointError, match="of another run"):
        Checkpoints(str(tmp_path / "c"), 2, bucket=place)


def test_a_run_takes_its_checkpoints_to_a_bucket_and_back(run, place, tmp_path):
    save(run, tmp_path, "", 1, 2)
    save(run, tmp_path, place, 3)
    assert There(tmp_path).steps == [2, 3]
    assert local(tmp_path) == ["3"]
    save(run, tmp_path, "", 4)
    assert There(tmp_path).steps == [3, 4]


def test_each_process_uploads_what_it_wrote():
    names = ["manifest/metadata", "state/d/a", "state/ocdbt.process_0/d/b"]
    names += ["state/ocdbt.process_1/d/c", "state/ocdbt.process_12/d/d"]
    assert remote.shares(names, 2) == [[*names[:3], names[4]], [names[3]]]


# --------------------------------------------------------------------------- damage


def spoilt(server, part: str, how) -> str:
    """Spoils the largest object of a folder; returns its name."""
    names = [name for name in server.objects if f"/{part}-" in name]
    name = max(names, key=lambda name: len(server.objects[name]))
    how(server.objects, name)
    return name


def cut(objects, name) -> None:
    objects[name] = objects[name][: len(objects[name]) // 2]


def flip(objects, name) -> None:
    objects[name] = objects[name][:-1] + bytes([objects[name][-1] ^ 1])


@pytest.mark.parametrize("how", [cut, flip, dict.pop], ids=["cut", "flip", "gone"])
def test_what_is_damaged_in_a_bucket_is_gone_round(run, server, tmp_path, capsys, how):
    place = "s3://bucket/run"
    save(run, tmp_path, place, 1, 2)
    name = spoilt(server, "2", how)
    shutil.rmtree(tmp_path)
    step, state = newest(run, tmp_path, place)
    assert step == 1
    assert_bit_equal(state, random_state(run, 1))
    (line,) = capsys.readouterr().err.splitlines()
    what = "missing" if how is dict.pop else "not what was written"
    assert f"2 is damaged: s3://bucket/{name} is {what}; it is kept as 2.dam" in line
    # It counts as none from then on, and its objects are left.
    assert There(tmp_path).steps == [1]
    save(run, tmp_path, place, 2)
    assert There(tmp_path).steps == [1, 2]
    assert len({n.split("/")[1] for n in server.objects if "/2-" in n}) == 2


def test_what_is_damaged_in_the_folder_is_read_from_the_bucket(
    run, place, tmp_path, capsys
):
    save(run, tmp_path, place, 1, 2)
    (file,) = (tmp_path / "checkpoints" / "2" / "manifest").glob("metadata")
    file.write_bytes(file.read_bytes()[:-9])
    step, state = newest(run, tmp_path, place)
    assert step == 2
    assert_bit_equal(state, random_state(run, 2))
    assert "manifest/metadata of" in capsys.readouterr().err
    assert local(tmp_path) == ["2"]


def test_an_index_that_leads_elsewhere_is_refused(server, tmp_path):
    writer, place = Bucket("gs://bucket/run"), "gs://bucket/run"
    writer.look()
    writer.own("run")
    writer.commit(1, new_folder(1), {"../../escaped": []}, stalled=False)
    reader = Bucket(place)
    reader.look()
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        reader.fetch(1, tmp_path / "a" / "1")
    for content in (b"", b"{}", b"[]", b'{"format": 1}', b'{"format": 9}', b"\xff"):
        server.objects["run/index.json"] = content
        with pytest.raises(CheckpointError, match=r"format 9|is not what Switch"):
            reader.look()


# ------------------------------------------------------------------------ no answer


def test_a_bucket_that_does_not_answer_is_said_and_given_up(
    monkeypatch, capsys, server
):
    monkeypatch.setattr(files, "NOTICE_SECONDS", 0.2)
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(
            StoreError, match=r"s3://bucket/x cannot be read: no answer in 1"
        ):
            files.read("s3://bucket/x")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"waiting for s3://bucket/x: no answer for {seconds} s; trying on"
        for seconds in ("0.2", "0.4", "0.8")
    ]


def test_a_bucket_that_refuses_names_the_credentials(server, monkeypatch):
    answer = bucket_server.Handler._answer

    def refuse(handler, *unused, **headers):
        answer(handler, 403)

    monkeypatch.setattr(bucket_server.Handler, "_answer", refuse)
    for place in ("s3://bucket/x", "gs://bucket/x"):
        with pytest.raises(StoreError, match=r"refuses it .*: look at the"):
            files.read(place)


# --------------------------------------------------------------------- whole commands


def dies(server, process_of, number: int):
    """Kills a process at its so-many-th write to the bucket."""
    count = itertools.count(1)

    def before_write(key: str) -> None:
        if next(count) == number:
            process_of[0].send_signal(signal.SIGKILL)
            process_of[0].wait()

    server.before_write = before_write


def arrays_of(folder: Path, step: int) -> dict:
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(path.read_text())["arrays"]


def test_a_run_killed_while_it_uploads_goes_on_bit_for_bit(trained, server, tmp_path):
    folder, place = tmp_path / "run", "s3://bucket/runs/mine"
    words = ["train", "--self_check=off", *trained.knobs(folder, CHECKPOINT_DIR=place)]
    process_of: list = []
    dies(server, process_of, 25)  # within the second checkpoint
    process_of.append(trained.start(*words))
    died = commands.finish(process_of[0])
    assert died.code == -signal.SIGKILL, died.err
    killed = Bucket(place)
    killed.look()
    assert sorted(killed.entries) == [10], list(server.objects)
    server.before_write = lambda key: None
    shutil.rmtree(folder)  # with its machine
    done = trained.run(*words)
    assert done.code == 0, done.err
    assert "resuming from" in done.err
    assert arrays_of(folder, 20) == arrays_of(trained.folder, 20)


@pytest.mark.slow
def test_a_run_killed_at_any_write_goes_on_bit_for_bit(trained, server, tmp_path):
    """Every life dies a little later than the last; the folder of the run stays."""
    folder, place = tmp_path / "run", "gs://bucket/runs/mine"
    words = ["train", "--self_check=off", *trained.knobs(folder, CHECKPOINT_DIR=place)]
    deaths = [1, 2, 9, 4, 15, 21, 3, 22]  # a checkpoint is about 20 writes
    for number in deaths:
        process_of: list = []
        dies(server, process_of, number)
        process_of.append(trained.start(*words))
        died = commands.finish(process_of[0])
        if died.code == 0:  # nothing was left to write
            break
        assert died.code == -signal.SIGKILL, died.err
        found = Bucket(place)
        found.look()
        for step in found.entries:
            path = tmp_path / "found" / str(number) / str(step)
            found.fetch(step, path)
            assert not faults.find(path).faults
    server.before_write = lambda key: None
    done = trained.run(*words)
    assert done.code == 0, done.err
    assert There(folder).steps == [10, 20]
    assert arrays_of(folder, 20) == arrays_of(trained.folder, 20)


@pytest.mark.slow
def test_two_processes_upload_each_its_own_and_one_goes_on(trained, server, tmp_path):
    told: list[str] = []
    server.faults = bucket_server.now_and_then(told)
    knobs = {"CHECKPOINT_DIR": "s3://bucket/runs/mine", "CHECKPOINT_PERIOD": 2}
    words = words_of(trained, tmp_path / "two", 1, **knobs)
    dones = [commands.finish(process) for process in start(trained, "train", 2, *words)]
    assert [done.code for done in dones] == [0, 0], dones[0].err + dones[1].err
    for process in (0, 1):
        part = f"state/ocdbt.process_{process}/d/"
        assert any("/4-" in name and part in name for name in server.objects)
    assert There(tmp_path / "two").steps == [2, 4]
    assert set(told) == {"", *bucket_server.FAULTS}, "each kind happened"
    shutil.rmtree(tmp_path / "two" / "checkpoints")
    for folder, number, steps in (("one", 1, 6), ("two", 2, 8)):
        knobs["TRAIN_STEPS"] = steps
        words = words_of(trained, tmp_path / folder, 2 // number, **knobs)
        job = [trained.start("train", *words)]
        if number > 1:
            job = start(trained, "train", number, *words)
        dones = [commands.finish(process) for process in job]
        assert {done.code for done in dones} == {0}, "".join(d.err for d in dones)
        assert (
            f"resuming from {tmp_path}/{folder}/checkpoints/{steps - 2}" in dones[0].err
        )
    assert There(tmp_path / "two").steps == [4, 6, 8]


@pytest.mark.slow
def test_the_tools_read_a_bucket(trained, server, tmp_path):
    folder, place = tmp_path / "run", "gs://bucket/runs/mine"
    words = ["train", *trained.knobs(folder, CHECKPOINT_DIR=place)]
    assert trained.run(*words).code == 0
    assert local(folder) == ["20"]
    of_run = f"--model_dir={folder}"
    listed = trained.run("checkpoint", "inspect", of_run)
    assert [line.split()[0] for line in listed.out.splitlines()] == ["step", "10", "20"]
    shown = trained.run("checkpoint", "inspect", of_run, "--step=10").out
    assert f"{place}/10-" in shown
    checked = trained.run("checkpoint", "verify", of_run)
    assert checked.out.count(": whole") == 2, checked
    copied = trained.run(
        "checkpoint", "copy", of_run, "--step=10", f"--to={tmp_path}/c"
    )
    assert copied.code == 0, copied.err
    differ = trained.run(
        *("checkpoint", "diff", of_run, "--step=10", f"--with_dir={tmp_path}/c")
    )
    assert differ.code == 0, differ
    asked: list[str] = []
    server.faults = iter(lambda: asked.append("") or "", None)
    scored = trained.run("evaluate", f"--model_dir={tmp_path}/c")
    assert scored.code == 0, scored.err
    assert not asked, "a copy is in its folder, whatever its configuration says"
    steps = [f"--checkpoint={folder}/checkpoints/{step}" for step in (10, 20)]
    made = trained.run("checkpoint", "average", *steps, f"--to={tmp_path}/mean")
    assert made.code == 0, made.err
    of_bucket = trained.run("evaluate", of_run, "--step=10")
    assert of_bucket.code == 0, of_bucket.err
    assert of_bucket.out == scored.out
    assert asked
    assert not list(folder.glob("fetched-*"))
    spoilt(server, "10", flip)
    shutil.rmtree(folder / "checkpoints" / "10")
    checked = trained.run("checkpoint", "verify", of_run)
    assert checked.code == 1, checked
    assert "not what was written" in checked.out
    refused = trained.run("evaluate", of_run, "--step=10")
    assert refused.code == 1
    assert "10 is damaged" in refused.err


def test_a_folder_of_a_bucket_is_asked_for():
    from launch.config import reader
    from launch.errors import ConfigError

    for text in ("here", "gs://bucket", "s3://", "http://b/x", "gs://b/", "s3:///x"):
        with pytest.raises(ConfigError, match=r"CHECKPOINT_DIR = .*a folder in"):
            reader.read(["runs/tiny.gin"], [f"CHECKPOINT_DIR={text!r}"])
    kept = reader.read(["runs/tiny.gin"], ["CHECKPOINT_DIR='gs://bucket/x/'"])
    assert kept.settings.loop.checkpoint_dir == "gs://bucket/x/"


def test_a_run_begins_with_what_another_has_in_a_bucket(run, server, tmp_path):
    other = tmp_path / "other"
    save(run, other, "s3://bucket/runs/one", 1, 2)
    assert local(other) == ["2"]
    knobs = [f"START_FROM={other}/checkpoints/1", "START_PATTERNS=('*/router',)"]
    given = ["BATCH_SIZE=16", "SIMULATED_DEVICES=8", "TIE_EMBEDDINGS=False"]
    config = reader.read(["runs/tiny.gin"], [*given, *knobs])
    vocabulary = PROVENANCE["vocabulary_fingerprint"]
    source = beginning.source_of(config, vocabulary, allow_changes=False)
    assert source.part.step == 1
    (array,) = beginning._taken(run, source).values()
    sparse = random_state(run, 1).params["decoder"]["layers"][0][1]["sparse"]
    assert_bit_equal({"": array}, {"": sparse["router"]})
