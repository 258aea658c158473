"""Names of topologies, the meshes that lie on them, and what links are left."""

import dataclasses
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from jax.experimental import mesh_utils

from launch.planning.hardware import topologies, torus
from launch.planning.hardware.chips import CHIPS, GIB
from launch.planning.hardware.topologies import TopologyError, axis_bandwidth, parse
from partitioning.links import fastest_first
from partitioning.mesh import make_mesh
from partitioning.settings import AXES, MeshSettings

pytestmark = pytest.mark.fast


def test_a_name_reads_back_as_itself():
    for name in ["v4:8x8x16", "2*v5e:16x16", "7x:4x4x4", "h100:64", "v100-32g:480"]:
        assert parse(name).name == name
    assert parse("V5P:4x4x8") == parse("v5p:4x4x8")


def test_chips_and_devices_are_counted():
    assert parse("v4:8x8x16").num_chips == 8 * 8 * 16
    assert parse("3*v5e:4x8").num_chips == 3 * 4 * 8
    described = parse("7x:4x4x4")  # two devices in each chip
    assert (described.num_chips, described.num_devices) == (64, 128)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5x:4x4", "unknown chip 'v5x'.*nearest: v5e:4x4, v5p:…"),
        ("v5e:4x5", "no slice of 4x5; nearest: v5e:2x4, v5e:4x4, v5e:4x8"),
        ("v5e", "write CHIP:SHAPE"),
        ("h100:12", "not whole nodes of 8; nearest: h100:8, h100:16"),
        ("h100:2x4", "write their number, such as 'h100:8'"),
        ("99*v4:2x2x1", "slices are 1 to 64"),
    ],
)
def test_a_name_that_cannot_be_read_is_told_the_nearest(name, said):
    with pytest.raises(TopologyError, match=said):
        parse(name)


def test_every_offered_slice_can_be_read_and_grows():
    for chip in CHIPS:
        sizes = [described.num_chips for described in topologies.standard(chip)]
        assert sizes == sorted(set(sizes))
        for described in topologies.standard(chip):
            assert parse(described.name) == described


def test_every_chip_says_where_its_numbers_are_from():
    for chip in CHIPS.values():
        assert chip.sources
        # From 2017 to 2025: 0.9 to 8 TB/s, 16 to 192 GiB, 125 to 2,307 teraflops.
        assert 0.8e12 < chip.memory_bandwidth < 9e12
        assert 16 * GIB <= chip.memory_bytes <= 192 * GIB
        assert 100e12 < chip.peak_flops < 2500e12
    assert CHIPS["7x"].device().memory_bytes == 96 * GIB


def test_a_mesh_of_another_size_is_told_which_axis_would_fit():
    described = parse("v4:4x4x4")
    assert topologies.problems(described, MeshSettings(data=16, expert=4)) == []
    (fault,) = topologies.problems(described, MeshSettings(data=4, expert=4))
    assert fault == (
        "the mesh (data 4 × expert 4) has 16 devices and v4:4x4x4 has 64: set "
        "MESH_DATA to 16"
    )


def test_slices_are_joined_by_replica_only():
    two = parse("2*v5e:4x4")
    assert topologies.problems(two, MeshSettings(replica=2, data=4, expert=4)) == []
    (fault,) = topologies.problems(two, MeshSettings(data=8, expert=4))
    assert "MESH_REPLICA = 1, and 2*v5e:4x4 has 2 slices" in fault


def test_axes_that_cut_a_dimension_are_named_with_sizes_that_do_not():
    described = parse("v4:8x8x16")
    assert topologies.warnings(described, MeshSettings(data=16, expert=64)) == []
    (said,) = topologies.warnings(described, MeshSettings(data=32, expert=32))
    assert "MESH_EXPERT = 32 and MESH_DATA = 32 cut" in said
    assert "8, 16, 64, 128, 1024" in said  # products of 8, 8 and 16


@dataclasses.dataclass(frozen=True)
class _Device:
    coords: tuple[int, int, int]
    slice_index = 0
    platform = "tpu"
    device_kind = "TPU v4"
    core_on_chip = 0


@pytest.mark.parametrize("sizes", [(16, 64), (64, 16), (128, 8), (8, 128), (1, 1024)])
def test_whole_dimensions_are_given_out_as_jax_does(sizes):
    shape = (8, 8, 16)
    devices = [_Device(tuple(map(int, at))) for at in np.ndindex(shape)]
    grid = mesh_utils.create_device_mesh((1, 1, sizes[0], 1, sizes[1], 1), devices)
    mesh = MeshSettings(data=sizes[0], expert=sizes[1])
    named = dict(zip(AXES, dataclasses.astuple(mesh), strict=True))
    cuts = torus.lay_out(named, shape, (True,) * 3)
    for axis, parts in cuts.items():
        line = np.moveaxis(grid, AXES.index(axis), 0).reshape(named[axis], -1)[:, 0]
        extent = np.ptp([device.coords for device in line], axis=0) + 1
        assert sorted(n for n in extent if n > 1) == sorted(c.size for c in parts)


@pytest.mark.parametrize("shape", [(4, 4, 8), (8, 8, 16), (2, 4, 4)])
def test_a_plan_knows_the_fastest_axis_of_the_mesh_that_will_run(shape):
    described = parse(f"v4:{'x'.join(map(str, shape))}")
    devices = [_Device(tuple(map(int, at))) for at in np.ndindex(shape)]
    number, tried = math.prod(shape), 0
    for expert, model in itertools.product((2**n for n in range(11)), (1, 2, 4, 8)):
        if number % (expert * model):
            continue
        mesh = MeshSettings(data=number // expert // model, expert=expert, model=model)
        if topologies.warnings(described, mesh):
            continue  # jax may cut dimensions in another way
        order = topologies.fastest_first(described, mesh)
        assert order == fastest_first(make_mesh(mesh, devices))
        rates = axis_bandwidth(described, mesh)
        found = [rates[axis] for axis in order if axis in rates]
        assert found == sorted(found, reverse=True)
        tried += 1
    assert tried > 5


def test_every_mesh_lies_on_a_torus_by_cutting_it():
    shape = (4, 8, 8)
    for data in (1, 2, 4, 32, 128):
        for expert in (1, 2, 64 // min(data, 64)):
            model = 256 // data // expert
            sizes = {"data": data, "expert": expert, "model": model}
            cuts = torus.lay_out(sizes, shape, (True,) * 3)
            for axis, size in sizes.items():
                assert math.prod(cut.size for cut in cuts.get(axis, ())) == size


def test_bandwidth_of_a_torus_is_that_of_the_links_of_an_axis():
    # 64 = 8 × 8: two rings, two links of 50 GB/s each; 16: one ring.
    mesh = MeshSettings(data=16, expert=64)
    assert axis_bandwidth(parse("v4:8x8x16"), mesh) == {"data": 100e9, "expert": 200e9}
    # v5e closes only sides of 16, and its other lines have one link of 50 GB/s.
    mesh = MeshSettings(data=8, expert=16)
    assert axis_bandwidth(parse("v5e:8x16"), mesh) == {"data": 50e9, "expert": 100e9}


def test_an_exchange_over_a_long_ring_is_slower_than_a_gather():
    # 4 places: distances 1, 1, 2, each a quarter of B, over two links: B/2 per link.
    # So 3/4 B leave in the time of B/2: 1.5 links.
    ring_of_4 = (torus.Cut(4, 1, 4, True),)
    assert torus.spread(ring_of_4) == pytest.approx(1.5)
    assert torus.ring(ring_of_4) == 2
    # A line of 2: half of B over one link.
    assert torus.spread((torus.Cut(2, 1, 2, False),)) == pytest.approx(1)
    mesh = MeshSettings(data=16, expert=64)
    gathers = axis_bandwidth(parse("v4:8x8x16"), mesh)
    exchanges = axis_bandwidth(parse("v4:8x8x16"), mesh, "all_to_all")
    assert exchanges["expert"] < gathers["expert"]


def test_slices_and_nodes_meet_over_the_slow_network():
    mesh = MeshSettings(replica=2, data=16, expert=16)
    found = axis_bandwidth(parse("2*v5e:16x16"), mesh)
    assert found["replica"] == pytest.approx(3.125e9)  # 25 Gbit/s
    # 2 × 8: model within a node; expert has 4 of each node's adapters of 50 GB/s;
    # data has one each.
    mesh = MeshSettings(data=4, expert=8, model=2)
    found = axis_bandwidth(parse("h100:64"), mesh)
    assert found == {"data": 50e9, "expert": 200e9, "model": 450e9}


def test_planning_a_topology_needs_no_jax():
    program = (
        "import sys, launch.planning.hardware.topologies as t; t.parse('v4:8x8x16');"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"False\s*", done.stdout)
