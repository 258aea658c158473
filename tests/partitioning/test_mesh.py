"""Meshes: six axes whatever the sizes, and errors that name the numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from partitioning.links import fastest_first
from partitioning.mesh import SplitAxesWarning, describe, make_mesh
from partitioning.settings import AXES, BATCH_AXES, MeshSettings, problems

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    "settings",
    [MeshSettings(), MeshSettings(data=2, expert=4), MeshSettings(replica=2, data=2)],
)
def test_all_six_axes_are_there_whatever_their_sizes(settings):
    mesh = make_mesh(settings)
    assert mesh.axis_names == AXES
    assert len(AXES) == 6
    assert dict(mesh.shape) == {axis: getattr(settings, axis) for axis in AXES}
    assert mesh.axis_types == (AxisType.Auto,) * 6
    assert mesh.size == settings.num_devices
    assert len({device.id for device in mesh.devices.flat}) == mesh.size


def test_a_small_mesh_takes_the_first_devices():
    mesh = make_mesh(MeshSettings(data=2))
    assert set(mesh.devices.flat) == set(jax.devices()[:2])
    last = jax.devices()[-2:]
    assert set(make_mesh(MeshSettings(data=2), last).devices.flat) == set(last)


def test_too_few_devices_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="data 4 × expert 4 needs 16 devices"):
        make_mesh(MeshSettings(data=4, expert=4))  # of the 8 that are here
    with pytest.raises(ValueError, match="needs 2 devices, and 1 are"):
        make_mesh(MeshSettings(expert=2), jax.devices()[:1])


def test_a_mesh_is_described_by_its_axes_larger_than_one():
    assert describe(MeshSettings()) == "one device"
    assert describe(MeshSettings(expert=4, data=2)) == "data 2 × expert 4"


def test_the_batch_is_split_over_the_product_of_its_axes():
    assert BATCH_AXES == ("replica", "data", "expert")
    settings = MeshSettings(replica=2, data=3, expert=5)
    assert settings.batch_shards == settings.num_devices == 30
    assert MeshSettings(stage=2, context=2, model=2).batch_shards == 1


def test_sizes_below_one_and_axes_not_built_yet_are_all_listed():
    assert problems(MeshSettings(replica=2, data=2, expert=2)) == []
    assert problems(MeshSettings(context=4, model=2)) == []
    found = problems(MeshSettings(data=0, expert=-1, stage=2))
    assert [fault.partition(":")[0] for fault in found] == [
        "MESH_DATA = 0",
        "MESH_EXPERT = -1",
        "MESH_STAGE = 2",
    ]


@dataclasses.dataclass(frozen=True)
class _Chip:
    """What mesh_utils reads of a described TPU v4."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    platform = "tpu"
    device_kind = "TPU v4"
    core_on_chip = 0


def _slices(shape, number=1):
    return [
        _Chip(slice_ * 1000 + place, tuple(map(int, coords)), slice_)
        for slice_ in range(number)
        for place, coords in enumerate(np.ndindex(shape))
    ]


def test_axes_that_fit_the_torus_are_laid_out_without_a_word(recwarn):
    chips = _slices((4, 4, 8))
    mesh = make_mesh(MeshSettings(data=8, expert=16), chips)
    assert mesh.devices.shape == (1, 1, 8, 1, 16, 1)
    # An expert axis of 16 lies on the plane of 4 × 4, data on the other dimension.
    assert len({chip.coords[2] for chip in mesh.devices[0, 0, 0].flat}) == 1
    assert not recwarn.list


def test_a_mesh_that_cuts_the_torus_is_made_and_said():
    with pytest.warns(SplitAxesWarning, match="expert 64 does not fit.*4×4×8"):
        mesh = make_mesh(MeshSettings(data=2, expert=64), _slices((4, 4, 8)))
    assert len({chip.id for chip in mesh.devices.flat}) == 128


def test_slices_are_joined_by_the_replica_axis():
    chips = _slices((4, 4, 4), number=2)
    mesh = make_mesh(MeshSettings(replica=2, data=4, expert=16), chips)
    for replica, part in enumerate(mesh.devices):
        assert {chip.slice_index for chip in part.flat} == {replica}
    with pytest.raises(ValueError, match="lies over 2 slices: set MESH_REPLICA = 2"):
        make_mesh(MeshSettings(data=8, expert=16), chips)
    # One slice of the two is no matter.
    assert make_mesh(MeshSettings(data=4, expert=16), chips).size == 64


@pytest.mark.parametrize(
    ("sizes", "order"),
    [
        # Two rings of 8, and one of 16; then the other way round.
        ({"data": 16, "expert": 64}, ["expert", "data"]),
        ({"data": 64, "expert": 16}, ["data", "expert"]),
        # A ring each: the longer one.
        ({"data": 16, "context": 8, "expert": 8}, ["data", "expert", "context"]),
    ],
)
def test_the_axis_with_the_most_links_of_the_torus_is_the_fastest(sizes, order):
    mesh = make_mesh(MeshSettings(**sizes), _slices((8, 8, 16)))
    found = fastest_first(mesh)
    assert sorted(found) == sorted(AXES)
    assert list(found[: len(order)]) == order
    two = make_mesh(MeshSettings(replica=2, **sizes), _slices((8, 8, 16), number=2))
    assert [axis for axis in fastest_first(two) if axis in sizes] == order


def test_neighbours_on_a_ring_are_faster_than_every_fourth_of_its_devices():
    # Neighbours: a line with a link of its own. Every fourth: four rings share two.
    ring = np.array(_slices((16, 1, 1))).reshape(4, 4)
    for devices, order in ((ring, ("expert", "data")), (ring.T, ("data", "expert"))):
        mesh = Mesh(devices.reshape(1, 1, 4, 1, 4, 1), AXES)
        assert fastest_first(mesh)[:2] == order


def test_elsewhere_the_last_axes_are_the_fastest():
    for settings in (MeshSettings(data=4, expert=2), MeshSettings(data=2, expert=4)):
        assert fastest_first(make_mesh(settings)) == AXES[::-1]
    small = make_mesh(MeshSettings(data=4, expert=2), _slices((2, 4, 1)))
    assert fastest_first(small) == AXES[::-1]
