"""Boundaries of large stores: mapped, shared, and never other ones than stored."""

import tracemalloc

import numpy as np
import pytest

from tasks import flat, packing
from tasks.arrays import Array, write_array
from tasks.errors import StoreError
from tasks.settings import DataSettings
from tasks.store import open_store

pytestmark = pytest.mark.fast


@pytest.fixture
def boundaries(tmp_path, monkeypatch):
    """An array that counts as large, and its numbers."""
    monkeypatch.setattr(flat, "_WHOLE", 10)
    numbers = np.cumsum(np.random.default_rng(0).integers(1, 99, 5000))
    write_array(str(tmp_path / "offsets"), numbers)
    return Array(str(tmp_path / "offsets")), numbers


def maps(path) -> bool:
    return str(path) in open("/proc/self/maps").read()


def test_a_large_array_is_mapped_and_a_small_one_read(boundaries, tmp_path):
    array, numbers = boundaries
    found = flat.opened(array, "data 1")
    assert np.array_equal(found, numbers)
    assert maps(tmp_path / "offsets.flat")
    assert not found.flags.writeable
    assert np.array_equal(flat.released(found[:-1]), numbers[:-1])
    write_array(str(tmp_path / "small"), numbers[:9])
    assert np.array_equal(flat.opened(Array(str(tmp_path / "small")), ""), numbers[:9])
    assert not (tmp_path / "small.flat").exists()


def test_a_file_that_is_there_is_taken_and_one_of_other_data_is_not(
    boundaries, tmp_path
):
    array, numbers = boundaries
    path = tmp_path / "offsets.flat"
    flat.opened(array, "data 1")
    inode = path.stat().st_ino
    flat.opened(array, "data 1")
    assert path.stat().st_ino == inode
    # The array is not asked again, so what lies there is what counts.
    write_array(str(tmp_path / "offsets"), numbers + 1)
    assert np.array_equal(flat.opened(array, "data 1"), numbers)
    again = Array(str(tmp_path / "offsets"))
    assert np.array_equal(flat.opened(again, "data 2"), numbers + 1)


@pytest.mark.parametrize("change", ["flip", "cut", "empty"])
def test_a_damaged_file_is_made_again(boundaries, tmp_path, change):
    array, numbers = boundaries
    flat.opened(array, "data 1")
    path = tmp_path / "offsets.flat"
    content = bytearray(path.read_bytes())
    content[1234] ^= 1
    cut = {"flip": content, "cut": content[:-100], "empty": b""}
    path.write_bytes(cut[change])
    assert np.array_equal(flat.opened(array, "data 1"), numbers)
    assert [p.name for p in tmp_path.iterdir() if "flat" in p.name] == [path.name]


def test_where_nothing_can_be_written_a_process_keeps_its_own(
    boundaries, tmp_path, monkeypatch
):
    array, numbers = boundaries

    def refused(*given, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(flat.tempfile, "mkstemp", refused)
    assert np.array_equal(flat.opened(array, "data 1"), numbers)
    assert [p.name for p in tmp_path.iterdir()] == ["offsets"]


def test_a_full_disk_keeps_no_half_of_a_file(boundaries, tmp_path, monkeypatch):
    array, numbers = boundaries

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flat.os, "replace", full)
    assert np.array_equal(flat.opened(array, "data 1"), numbers)
    assert [p.name for p in tmp_path.iterdir()] == ["offsets"]


@pytest.mark.parametrize("kind", ["next_fit", "stream"])
def test_rows_of_mapped_boundaries_are_those_of_read_ones(own_store, monkeypatch, kind):
    from tasks.rows import TaskRows

    data = DataSettings(
        "made_up", "", {"targets": 32}, str(own_store), vocabulary="bytes", packing=kind
    )

    def batch():
        part = open_store(own_store).split("made_up", "train")
        rows = TaskRows("made_up", part, data)
        number = np.arange(rows.num_rows)
        return rows.read(number, np.zeros_like(number), 0)

    wanted = batch()
    monkeypatch.setattr(flat, "_WHOLE", 10)
    for _ in range(2):  # what the first one wrote, the second one maps
        for name, values in batch().items():
            assert np.array_equal(values, wanted[name]), name
    assert list(own_store.rglob("*.flat"))


def test_a_pack_index_that_does_not_fit_is_refused_when_it_is_mapped(
    own_store, monkeypatch
):
    monkeypatch.setattr(flat, "_WHOLE", 1)
    part = open_store(own_store).split("made_up", "train")
    index = packing.pack(part.offsets(), 32)
    part.pack("next_fit-32", lambda: index)
    (folder,) = own_store.rglob("pack-*")
    write_array(str(folder / "pieces"), index.pieces[::-1].copy())
    for path in folder.glob("*.flat"):
        path.unlink()
    with pytest.raises(StoreError, match="not the one that was prepared, in c/0"):
        part.pack("next_fit-32", lambda: index)
    (folder / "length").write_text("32")  # as before samples were kept
    with pytest.raises(StoreError, match="its boundaries do not rise"):
        part.pack("next_fit-32", lambda: index)


def test_packing_in_blocks_is_packing_at_once(monkeypatch):
    rng = np.random.default_rng(1)
    for _ in range(50):
        lengths = rng.integers(0, 40, rng.integers(1, 60))
        lengths[rng.integers(len(lengths))] = 7
        more = rng.integers(0, 40, len(lengths))
        offsets = {
            "targets": np.cumsum([0, *lengths]),
            "inputs": np.cumsum([0, *more]),
        }
        limits = {"targets": 9, "inputs": 13}

        def packed(offsets=offsets, limits=limits):
            whole = packing.pack(offsets["targets"], 16)
            pairs = packing.pack_pairs(offsets, limits, joined=False)
            return whole, pairs, packing.truncation(offsets, limits)

        wanted = packed()
        with monkeypatch.context() as patched:
            patched.setattr(packing, "_BLOCK", 5)
            found = packed()
            assert packing.faults(found[0], int(lengths.sum())) == []
        for one, other in zip(wanted[:2], found[:2], strict=True):
            assert np.array_equal(one.pieces, other.pieces)
            assert np.array_equal(one.rows, other.rows)
        assert wanted[2] == found[2]


def test_faults_are_looked_for_a_block_at_a_time(monkeypatch):
    monkeypatch.setattr(packing, "_BLOCK", 1000)
    index = packing.pack(np.arange(0, 3_000_000, 3), 30)
    tracemalloc.start()
    assert packing.faults(index, 2_999_997) == []
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < index.pieces.nbytes / 50
    # Faults between two blocks and within the last one are found.
    for place in (999, 1000, 1001, len(index.pieces) - 2):
        pieces = index.pieces.copy()
        pieces[place] = pieces[place - 1]
        faulty = packing.Pack(30, pieces, index.rows)
        assert packing.faults(faulty) == ["its boundaries do not rise"]
    rows = np.delete(index.rows, 50_000)
    assert packing.faults(packing.Pack(30, index.pieces, rows)) == [
        "a row holds more than 30 tokens"
    ]
