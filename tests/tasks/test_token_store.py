import contextlib
import dataclasses
import fcntl
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from corpus import settings

from tasks import arrays, files, owner, packing
from tasks.arrays import Array, ShardedArray, write_array
from tasks.manifest import MANIFEST
from tasks.preparation import folders
from tasks.store import StoreError, open_store, split_path


def change_manifest(folder, **fields):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def train_of(store):
    return store.split("made_up", "train")


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64"])
def test_an_array_returns_what_was_written(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 16)
    monkeypatch.setattr(arrays, "SHARD", 64)
    values = np.random.default_rng(0).integers(0, 250, 1000).astype(dtype)
    values[100:200] = 0  # a chunk of nothing but zeros is also a chunk
    path = str(tmp_path / "a")
    written = ShardedArray(path, values.dtype, len(values))
    for shard in reversed(range(written.num_shards)):  # in any order
        start, stop = written.bounds(shard)
        ShardedArray(path, values.dtype, len(values)).write(shard, values[start:stop])
    array = Array(path, 1000)
    assert array.read_all().dtype == dtype
    np.testing.assert_array_equal(array.read_all(), values)
    some = array.read([0, 990, 63, 5], [10, 1000, 65, 5])
    for got, (start, stop) in zip(
        some, [(0, 10), (990, 1000), (63, 65), (5, 5)], strict=True
    ):
        np.testing.assert_array_equal(got, values[start:stop])
    assert len(list((tmp_path / "a" / "c").iterdir())) == 16  # ceil(1000 / 64)
    (tmp_path / "a" / "c" / "7").unlink()
    with pytest.raises(StoreError, match="lacks its file"):
        Array(path, 1000)


@pytest.mark.fast
def test_tokens_take_the_smallest_type(own_store):
    folder = own_store / "made_up" / "train" / "targets"
    spec = json.loads((folder / "tokens" / "zarr.json").read_text())
    assert spec["data_type"] == "uint16"  # 259 ids
    assert spec["shape"] == [train_of(open_store(own_store)).num_tokens()]


@pytest.mark.fast
def test_a_missing_store_says_how_to_make_it(tmp_path):
    with pytest.raises(StoreError, match=r"switchyard prepare --gin_file=\.\.\."):
        open_store(tmp_path / "store")
    (tmp_path / "store.preparing").mkdir()
    (tmp_path / "store.preparing" / "plan.json").write_text("{}")
    with pytest.raises(StoreError, match="the same command goes on with it"):
        open_store(tmp_path / "store")


@pytest.mark.fast
def test_a_manifest_of_another_time_is_refused(own_store):
    change_manifest(own_store, format_version=1)
    with pytest.raises(StoreError, match=r"format 1, and this version .* format 2"):
        open_store(own_store)
    (own_store / MANIFEST).write_text('{"format_ver')
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(own_store)
    (own_store / MANIFEST).write_text('{"format_version": 2}')
    with pytest.raises(StoreError, match="lacks what it should say"):
        open_store(own_store)


@pytest.mark.fast
def test_an_array_of_another_length_is_refused(own_store):
    tasks = json.loads((own_store / MANIFEST).read_text())["tasks"]
    tasks["made_up"]["splits"]["train"]["tokens"]["targets"] += 1
    change_manifest(own_store, tasks=tasks)
    with pytest.raises(
        StoreError, match=r"train/targets/tokens holds .* the manifest says"
    ):
        open_store(own_store)


@pytest.mark.fast
def test_a_missing_array_is_refused(own_store):
    shutil.rmtree(own_store / "made_up" / "validation" / "targets" / "offsets")
    with pytest.raises(StoreError, match="validation/targets/offsets is missing"):
        open_store(own_store)


@pytest.mark.fast
@pytest.mark.parametrize("place", [0.1, 0.5, 0.97])
def test_a_damaged_file_is_named_wherever_it_is_damaged(own_store, place):
    path = own_store / "made_up" / "train" / "targets" / "tokens" / "c" / "0"
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 0x10
    path.write_bytes(whole)
    store = open_store(own_store)
    with pytest.raises(StoreError, match=r"damaged between 0 and 100: .*tokens/c/0"):
        train_of(store).read("targets", [0], [100])


@pytest.mark.fast
def test_a_truncated_file_is_named(own_store):
    path = own_store / "made_up" / "train" / "targets" / "tokens" / "c" / "0"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"tokens/c/0 cannot be read or fails"):
        train_of(open_store(own_store)).read("targets", [0], [100])


@pytest.mark.fast
def test_a_file_that_goes_while_it_is_read_is_no_zeros(own_store):
    store = open_store(own_store)
    (own_store / "made_up" / "train" / "targets" / "tokens" / "c" / "0").unlink()
    with pytest.raises(StoreError, match=r"tokens/c/0 cannot be read"):
        train_of(store).read("targets", [0], [100])


@pytest.mark.fast
def test_a_read_that_fails_for_a_while_is_tried_again_and_counted(
    own_store, monkeypatch
):
    monkeypatch.setattr(arrays, "_FIRST_PAUSE_SECONDS", 0.05)
    path = own_store / "made_up" / "train" / "targets" / "tokens" / "c" / "0"
    whole = path.read_bytes()
    data = settings(own_store, read_retries=6)
    store = open_store(own_store, data)
    path.write_bytes(whole[:-100])
    mended = threading.Timer(0.2, lambda: path.write_bytes(whole))
    mended.start()
    found = train_of(store).read("targets", [0], [100])[0]
    mended.join()
    wanted = train_of(open_store(own_store)).read("targets", [0], [100])[0]
    np.testing.assert_array_equal(found, wanted)
    assert 1 <= store.retries <= 4
    path.write_bytes(whole[:-100])
    fresh = open_store(own_store, dataclasses.replace(data, read_retries=2))
    with pytest.raises(StoreError, match=r"tokens/c/0 cannot .*, tried 3 times"):
        train_of(fresh).read("targets", [0], [100])
    assert fresh.retries == 2


@pytest.mark.fast
def test_a_damaged_pack_index_says_what_to_delete(own_store):
    split = train_of(open_store(own_store))

    def compute():
        return packing.pack(split.offsets(), 32)

    index = split.pack("next_fit-32", compute)
    kept = split.pack("next_fit-32", lambda: pytest.fail("it is kept"))
    np.testing.assert_array_equal(kept.rows, index.rows)
    pieces = own_store / "made_up" / "train" / "pack-next_fit-32" / "pieces"
    shutil.rmtree(pieces)
    write_array(str(pieces), index.pieces[:-1])
    with pytest.raises(StoreError, match="Delete that folder"):
        split.pack("next_fit-32", compute)


@pytest.mark.fast
def test_a_store_of_other_settings_is_refused(own_store):
    data = settings(own_store)
    open_store(own_store, data)
    for change, words in (
        ({"mixture_or_task_name": "other"}, "MIXTURE_OR_TASK_NAME = 'other', but"),
        ({"vocabulary": "sentencepiece"}, "prepared with 'bytes'"),
        ({"heldout_split": "test"}, "HELDOUT_SPLIT = 'test'"),
    ):
        with pytest.raises(StoreError, match=words):
            open_store(own_store, dataclasses.replace(data, **change))


@pytest.mark.fast
def test_another_vocabulary_in_the_folder_is_refused(own_store):
    (own_store / "vocabulary.json").write_text('{"kind": "bytes", "extra_ids": 5}')
    with pytest.raises(StoreError, match="not the one the tokens were made with"):
        open_store(own_store)


@pytest.mark.fast
def test_an_unknown_split_names_those_there_are(quick_store):
    with pytest.raises(StoreError, match="'train', 'validation'"):
        quick_store.split("made_up", "test")
    with pytest.raises(StoreError, match="no task 'other': it has 'made_up'"):
        quick_store.split("other", "train")


@pytest.mark.fast
def test_what_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    work = str(tmp_path / "work")
    with pytest.raises(StoreError, match="holds files but no"):
        folders.refuse_what_is_no_store(str(tmp_path), work)
    with pytest.raises(StoreError, match="is a file"):
        folders.refuse_what_is_no_store(str(tmp_path / "thesis.txt"), work)
    with (
        pytest.raises(StoreError, match="cannot be made"),
        folders.alone(str(tmp_path / "thesis.txt" / "store.preparing")),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.fast
def test_a_store_with_something_else_in_it_is_left_alone(own_store, tmp_path):
    work = str(tmp_path / "store.preparing")
    # As a writer leaves it that is killed before its file is whole.
    Path(work).mkdir()
    (Path(work) / "plan.json.__lock").touch()
    folders.refuse_what_is_no_store(str(own_store), work)
    (own_store / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match=r"not of a store \('thesis.txt'\)"):
        folders.refuse_what_is_no_store(str(own_store), work)
    other = tmp_path / "other"
    other.mkdir()
    (other / MANIFEST).write_text('{"name": "an app"}')
    (other / "app.js").write_text("")
    with pytest.raises(StoreError, match=r"\('app.js'\), and would be deleted"):
        folders.refuse_what_is_no_store(str(other), work)
    Path(work, "mine.txt").write_text("")
    with pytest.raises(StoreError, match=r"store.preparing holds .*\('mine.txt'\)"):
        folders.refuse_what_is_no_store(str(tmp_path / "store"), work)
    with pytest.raises(StoreError, match="is a whole bucket"):
        folders.refuse_what_is_no_store("s3://bucket", work)


@pytest.mark.fast
def test_a_place_that_cannot_be_made_is_said():
    with (
        pytest.raises(StoreError, match="STORE_DIR = '/proc/x/y' cannot be made"),
        folders.alone("/proc/x/y.preparing"),
    ):
        pass


@pytest.mark.fast
def test_two_preparations_of_one_store_exclude_each_other(tmp_path):
    work = str(tmp_path / "store.preparing")
    with (
        folders.alone(work),
        pytest.raises(StoreError, match=r"another process is preparing .*/store: wait"),
        folders.alone(work),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
def test_a_lock_that_its_owner_removed_keeps_nobody_out(tmp_path, monkeypatch):
    work = tmp_path / "store.preparing"
    flock, late = fcntl.flock, []

    def between(file, how):
        if not late:  # the first owner leaves, and a second comes, before we lock
            late.append(file)
            shutil.rmtree(work)
            late.append(open_stack.enter_context(folders.alone(str(work))))
        flock(file, how)

    with contextlib.ExitStack() as open_stack:
        monkeypatch.setattr(owner.fcntl, "flock", between)
        with (
            pytest.raises(StoreError, match="another process is preparing"),
            folders.alone(str(work)),
        ):
            pass


@pytest.mark.fast
def test_paths_of_buckets_become_those_of_tensorstore(monkeypatch):
    assert files.kvstore("gs://bucket/a/b/") == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "a/b/",
    }
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    place = {"driver": "s3", "bucket": "bucket", "path": ""}
    assert files.kvstore("s3://bucket") == place
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000/")
    monkeypatch.setenv("AWS_REGION", "here")
    assert files.kvstore("s3://bucket") == {
        **place,
        "endpoint": "http://minio:9000",
        "aws_region": "here",
    }
    with pytest.raises(StoreError, match="begins with gs:// or s3://"):
        files.kvstore("ftp://somewhere")


@pytest.mark.fast
def test_small_files_come_back_and_missing_ones_are_none(tmp_path):
    path = files.join(tmp_path, "a", "b.json")
    assert files.read(path) is None
    files.write(path, b"one")
    files.write(path, b"two")
    assert files.read(path) == b"two"
    assert files.names(tmp_path) == ["a/b.json"]
    with pytest.raises(StoreError, match=r"b.json/c cannot be written: "):
        files.write(files.join(path, "c"), b"")
    files.delete_folder(tmp_path / "a")
    assert files.names(tmp_path) == []


READS = """
import sys
from tasks import batches, scoring, settings, store, prepare
opened = store.open_store(sys.argv[1])
data = settings.DataSettings("made_up", "x", {"targets": 32}, sys.argv[1])
data = batches.training(opened, data, settings.MixtureSettings(), batch_size=4, seed=0)
opened.vocabulary.decode(data.read(0, 0, 4)["decoder_target_tokens"][0])
heavy = {"tensorflow", "seqio", "jax", "sklearn", "apache_beam"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.mark.fast
def test_reading_batches_imports_neither_tensorflow_nor_seqio(quick_store):
    command = [sys.executable, "-c", READS, quick_store.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.fast
def test_no_two_names_have_one_folder():
    names = [
        "a–b",
        "a 13b",
        "a%2013b",
        "ä",
        "..",
        "%2e%2e",
        "a/b",
        "a%2fb",
        "\x100",
        "Ā",
    ]
    places = [split_path("store", name, "train") for name in names]
    assert len({*places}) == len(names)
    assert all(place.count("/") == 2 for place in places)
