import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from corpus import settings

from tasks import arrays
from tasks.arrays import Array, write_array
from tasks.folders import appearing
from tasks.manifest import MANIFEST
from tasks.store import StoreError, open_store


def change_manifest(folder, **fields):
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64"])
def test_an_array_returns_what_was_appended(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 16)
    monkeypatch.setattr(arrays, "SHARD", 64)
    values = np.random.default_rng(0).integers(0, 250, 1000).astype(dtype)
    values[100:200] = 0  # a chunk of nothing but zeros is also a chunk
    writer = arrays.ArrayWriter(tmp_path / "a", values.dtype)
    for part in np.split(values, [1, 70, 70, 500, 999]):
        writer.append(part)
    writer.close()
    array = Array(tmp_path / "a", 1000)
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
        Array(tmp_path / "a", 1000)


@pytest.mark.fast
def test_tokens_take_the_smallest_type(own_store):
    spec = json.loads((own_store / "train" / "tokens" / "zarr.json").read_text())
    assert spec["data_type"] == "uint16"  # 259 ids
    assert spec["shape"] == [open_store(own_store).manifest.splits["train"].tokens]


@pytest.mark.fast
def test_a_missing_store_says_how_to_make_it(tmp_path):
    with pytest.raises(StoreError, match=r"switchyard prepare --gin_file=\.\.\."):
        open_store(tmp_path / "store")
    (tmp_path / "store").mkdir()
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path / "store")


@pytest.mark.fast
def test_a_manifest_of_another_time_is_refused(own_store):
    change_manifest(own_store, format_version=2)
    with pytest.raises(StoreError, match=r"format 2, and this version .* format 1"):
        open_store(own_store)
    (own_store / MANIFEST).write_text('{"format_ver')
    with pytest.raises(StoreError, match="cannot be read"):
        open_store(own_store)
    (own_store / MANIFEST).write_text('{"format_version": 1}')
    with pytest.raises(StoreError, match="lacks what it should say"):
        open_store(own_store)


@pytest.mark.fast
def test_an_array_of_another_length_is_refused(own_store):
    splits = json.loads((own_store / MANIFEST).read_text())["splits"]
    splits["train"]["tokens"] += 1
    change_manifest(own_store, splits=splits)
    with pytest.raises(StoreError, match=r"train/tokens holds .* the manifest says"):
        open_store(own_store)


@pytest.mark.fast
def test_a_missing_array_is_refused(own_store):
    shutil.rmtree(own_store / "validation" / "offsets")
    with pytest.raises(StoreError, match="validation/offsets is missing"):
        open_store(own_store)


@pytest.mark.fast
@pytest.mark.parametrize("place", [0.1, 0.5, 0.97])
def test_a_damaged_file_is_named_wherever_it_is_damaged(own_store, place):
    path = own_store / "train" / "tokens" / "c" / "0"
    whole = bytearray(path.read_bytes())
    whole[int(place * len(whole))] ^= 0x10
    path.write_bytes(whole)
    store = open_store(own_store)
    with pytest.raises(StoreError, match=r"damaged between 0 and 100: .*tokens/c/0"):
        store.read("train", [0], [100])


@pytest.mark.fast
def test_a_truncated_file_is_named(own_store):
    path = own_store / "train" / "tokens" / "c" / "0"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"tokens/c/0 cannot be read or fails"):
        open_store(own_store).read("train", [0], [100])


@pytest.mark.fast
def test_a_damaged_pack_index_says_what_to_delete(own_store):
    pieces = own_store / "train" / "pack-32" / "pieces"
    values = Array(pieces).read_all()
    shutil.rmtree(pieces)
    write_array(pieces, values[:-1])
    with pytest.raises(StoreError, match="Delete that folder"):
        open_store(own_store).pack("train", 32)


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
        quick_store.pack("test", 32)


@pytest.mark.fast
def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "store"

    def fail_halfway():
        with appearing(target) as folder:
            (folder / MANIFEST).write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(target.parent.iterdir()) == []
    for content in ("old", "new"):
        with appearing(target) as folder:
            (folder / MANIFEST).write_text(content)
        assert (target / MANIFEST).read_text() == content
        assert list(target.parent.iterdir()) == [target]
        assert list(target.iterdir()) == [target / MANIFEST]


@pytest.mark.fast
def test_what_is_no_store_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="holds files but no"), appearing(tmp_path):
        pass
    with pytest.raises(StoreError, match="is a file"):
        appearing(tmp_path / "thesis.txt").__enter__()
    with pytest.raises(StoreError, match="cannot be made"):
        appearing(tmp_path / "thesis.txt" / "store").__enter__()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tasks.folders import appearing
from tasks.split_writer import SplitWriter
from tasks.vocabularies import ByteVocabulary
with appearing(Path(sys.argv[1])) as folder:
    writer = SplitWriter(folder / "train", ByteVocabulary())
    writer.add(np.full(100, 9), b"x" * 100)
    writer.close(32)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path):
    target = tmp_path / "store"
    done = subprocess.run([sys.executable, "-c", KILLED, target], check=False)
    assert done.returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "train" / "tokens").is_dir()
    with pytest.raises(StoreError, match=f"{leftover.name} is of a preparation"):
        open_store(target)
    running = tmp_path / f"store.incomplete-{os.getppid()}"
    running.mkdir()
    (running / "writer").write_text((leftover / "writer").read_text())
    with appearing(target) as folder:
        (folder / MANIFEST).write_text("{}")
    assert sorted(tmp_path.iterdir()) == sorted([target, running])


READS = """
import sys
from tasks import batches, objectives, store, vocabularies, prepare
opened = store.open_store(sys.argv[1])
data = batches.Batches(opened, "train", length=32, batch_size=4)
opened.vocabulary.decode(data.read(0, 0, 4)["decoder_target_tokens"][0])
heavy = {"tensorflow", "seqio", "jax"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.mark.fast
def test_reading_batches_imports_neither_tensorflow_nor_seqio(quick_store):
    command = [sys.executable, "-c", READS, quick_store.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
