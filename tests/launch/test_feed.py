"""Batches arrive in order, whole, ahead of time, and no row is read in vain."""

import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch.run.feed import Feed, place_batch
from partitioning import rules
from tasks import layouts

pytestmark = pytest.mark.fast

SHAPE = (16, 4)
B, L = SHAPE


class Reader:
    """Rows that say which they are, and a log of what was read."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.seconds = seconds

    def __call__(self, index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        self.calls.append((index, start, stop))
        time.sleep(self.seconds)
        rows = np.arange(start, stop)[:, None] * L + np.arange(L)
        return {
            name: (1000 * index + 100 * number + rows).astype(np.int32)
            for number, name in enumerate(layouts.FEATURES)
        }

    @property
    def indices(self) -> list[int]:
        """The batches that were read, in order, each once."""
        return list(dict.fromkeys(index for index, _, _ in self.calls))


def feed(read, mesh, *, start=0, stop=5, **more) -> Feed:
    sharding = rules.sharding(mesh, ("batch", "length"))
    return Feed(read, start=start, stop=stop, shape=SHAPE, sharding=sharding, **more)


def wait_until(holds, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def test_batches_come_in_order_and_then_end(meshes):
    reader = Reader()
    with feed(reader, meshes["d4e2"], start=7, stop=12) as batches:
        firsts = [int(batch["decoder_target_tokens"][0, 0]) for batch in batches]
        with pytest.raises(StopIteration):
            next(batches)
    number = layouts.FEATURES.index("decoder_target_tokens")
    assert firsts == [1000 * index + 100 * number for index in range(7, 12)]
    assert reader.indices == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("name", ["d1", "d4e2", "e8"])
def test_the_arrays_on_every_mesh_are_those_of_the_reader(meshes, name):
    reader = Reader()
    with feed(reader, meshes[name], stop=2) as batches:
        for index, batch in enumerate(batches):
            wanted = Reader()(index, 0, B)
            assert batch.keys() == wanted.keys() == set(layouts.FEATURES)
            for feature, array in batch.items():
                assert array.shape == SHAPE
                assert array.sharding.mesh == meshes[name]
                np.testing.assert_array_equal(array, wanted[feature])
    shards = meshes[name].size
    assert sorted(reader.calls) == [
        (index, start, start + B // shards)
        for index in range(2)
        for start in range(0, B, B // shards)
    ]


def test_rows_that_several_devices_hold_are_read_once(meshes):
    reader = Reader()
    sharding = NamedSharding(meshes["d4e2"], PartitionSpec("data"))  # twice each
    batch = place_batch(reader, 3, SHAPE, sharding)
    assert len(batch["decoder_target_tokens"].addressable_shards) == 8
    assert sorted(reader.calls) == [(3, row, row + 4) for row in range(0, B, 4)]


def test_a_cut_of_the_length_cuts_what_was_read(meshes):
    reader = Reader()
    sharding = NamedSharding(meshes["d4e2"], PartitionSpec("expert", "data"))
    batch = place_batch(reader, 0, SHAPE, sharding)
    for feature, array in batch.items():
        assert array.addressable_shards[0].data.shape == (8, 1)
        np.testing.assert_array_equal(array, Reader()(0, 0, B)[feature])
    assert sorted(reader.calls) == [(0, 0, 8), (0, 8, 16)]


class _OneHostOfTwo:
    """Stands for a sharding of which this process holds the second half."""

    def __init__(self, sharding: NamedSharding) -> None:
        self._whole = sharding

    def addressable_devices_indices_map(self, shape):
        pieces = self._whole.devices_indices_map(shape)
        return {d: i for d, i in pieces.items() if i[0].start >= shape[0] // 2}


def test_a_host_reads_only_rows_of_its_own_devices(meshes, monkeypatch):
    host = _OneHostOfTwo(rules.sharding(meshes["d4e2"], ("batch", "length")))

    def on_my_devices(shape, sharding, piece):
        mine = sharding.addressable_devices_indices_map(shape)
        return {device.id: piece(index) for device, index in mine.items()}

    monkeypatch.setattr(jax, "make_array_from_callback", on_my_devices)
    reader = Reader()
    place_batch(reader, 0, SHAPE, host)
    assert sorted(reader.calls) == [(0, row, row + 2) for row in range(8, 16, 2)]


def test_reading_ahead_stops_at_the_depth(meshes):
    reader = Reader()
    with feed(reader, meshes["d1"], stop=10, depth=2) as batches:
        wait_until(lambda: len(reader.indices) == 2)
        time.sleep(0.05)
        assert reader.indices == [0, 1]
        next(batches)
        wait_until(lambda: len(reader.indices) == 3)
        time.sleep(0.05)
        assert reader.indices == [0, 1, 2]


def test_the_wait_is_for_what_was_not_read_ahead(meshes):
    gate = threading.Event()

    def slow(index, start, stop):
        assert gate.wait(10)
        return Reader()(index, start, stop)

    with feed(slow, meshes["d1"], stop=2) as batches:
        threading.Timer(0.3, gate.set).start()
        next(batches)
        waited = batches.wait_seconds
        assert waited > 0.1
        wait_until(lambda: batches._pending[0].done())
        next(batches)
        assert batches.wait_seconds < waited / 2


def test_what_reading_raises_surfaces_where_the_batch_is_taken(meshes):
    def read(index, start, stop):
        if index == 2:
            raise OSError("no disk today")
        return Reader()(index, start, stop)

    with feed(read, meshes["d1"]) as batches:
        next(batches)
        next(batches)
        with pytest.raises(OSError, match="no disk today"):
            next(batches)


def test_leaving_early_reads_no_more(meshes):
    reader = Reader(seconds=0.05)
    with feed(reader, meshes["d1"], stop=1000, depth=8) as batches:
        next(batches)
    read = reader.indices
    assert len(read) < 6  # what was being read, and none of what was to follow
    time.sleep(0.05)
    assert reader.indices == read
    assert "feed" not in [t.name.partition("_")[0] for t in threading.enumerate()]
