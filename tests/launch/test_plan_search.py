"""Meshes and knobs that a search finds."""

import math

import pytest

from launch.config import edit, reader
from launch.config.rules import problems as problems_of_settings
from launch.planning import search
from launch.planning.cost import memory
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import parse, problems, warnings

GIB = 2**30


def config_for(run, topology):
    return moving.moved(reader.read([f"runs/{run}.gin"]), parse(topology))


@pytest.mark.parametrize(
    ("run", "topology"),
    [
        ("glam_64b_64e", "v4:8x8x16"),
        ("mixtral_8x7b", "v5p:4x4x4"),
        ("gpt3_6_7b", "2*v5e:8x8"),
        ("m6_t_1b", "h100:8"),
    ],
)
def test_all_that_is_found_divides_fits_and_is_ranked(run, topology):
    where, config = parse(topology), config_for(run, topology)
    found = search.search(config.settings, where)
    assert found
    limit = search.MARGIN * where.chip.device().usable_bytes
    for one in found:
        assert not problems(where, one.settings.mesh)
        assert not problems_of_settings(one.settings)
        assert one.plan.total <= limit
        assert one.settings == edit.changed(config.settings, one.knobs)
        assert one.cuts == bool(warnings(where, one.settings.mesh))
    order = [(one.cuts, one.seconds) for one in found]
    assert order == sorted(order)


def test_what_does_not_fit_is_not_found_and_the_smallest_that_does_is_named():
    config = config_for("gpt3_6_7b", "v5e:2x2")
    # 6.7 billion parameters, their gradients and two moments: 16 bytes of each.
    least = search.least_bytes(config.settings, parse("v5e:2x2"))
    assert least == pytest.approx(6.66e9 * 16 / 4, rel=0.01)
    assert not search.search(config.settings, parse("v5e:2x2"))
    smallest = search.smallest(config.settings, parse("v5e:2x2"))
    assert smallest is not None
    topology, found = smallest
    assert topology.num_chips * 15.75 * GIB > 6.66e9 * 16
    assert found[0].plan.total <= 15.75 * GIB


@pytest.mark.fast
def test_the_least_bytes_are_a_lower_bound_of_every_prediction():
    config = config_for("tiny", "v5e:2x4")
    for one in search.search(config.settings, parse("v5e:2x4")):
        plan = memory.predict(one.settings, "tpu")
        assert search.least_bytes(config.settings, parse("v5e:2x4")) <= plan.total


@pytest.mark.fast
def test_every_mesh_of_the_devices_is_looked_at_once():
    config = config_for("tiny", "v5e:2x4")  # 4 experts
    found = list(search.meshes(config.settings, parse("v5e:2x4")))
    assert len(set(found)) == len(found)
    assert all(mesh.num_devices == 8 for mesh in found)
    # 8 devices: expert 1, 2 or 4, model 1, 2, 4 or 8, data the rest.
    by_hand = {(e, m) for e in (1, 2, 4) for m in (1, 2, 4, 8) if 8 % (e * m) == 0}
    assert {(mesh.expert, mesh.model) for mesh in found} == by_hand


@pytest.mark.fast
def test_what_is_written_reads_back_as_what_was_found(tmp_path):
    topology = parse("v5e:4x8")
    config = config_for("m6_t_1b", "v5e:4x8")
    one = search.search(config.settings, topology)[0]
    file = tmp_path / "found.gin"
    file.write_text(search.hardware_text(config.where, topology, one))
    again = reader.read(["runs/m6_t_1b.gin", str(file)]).settings
    assert again.mesh == one.settings.mesh
    assert again.partition == one.settings.partition
    assert again.model == one.settings.model
    assert again.train == one.settings.train
    assert again.platform.libtpu_init_args  # of hardware/v5e_4x8.gin
    assert math.prod((again.mesh.data, again.mesh.expert, again.mesh.model)) == 32


@pytest.mark.fast
def test_changed_knobs_are_in_settings_and_text_alike(tmp_path):
    config = reader.read(["runs/tiny.gin"])
    wanted = {"MICROBATCHES": 2, "REMAT": "full", "MESH_DATA": 2, "VOCAB_CHUNKS": 3}
    again = edit.reconfigured(moving.moved(config, parse("v5e:2x2")), wanted)
    file = tmp_path / "again.gin"
    file.write_text(again.operative)
    assert reader.read([str(file)]).settings == again.settings
    # Every place that a plan may set is where the knob is bound.
    for macro, (record, field) in edit.PLACES.items():
        assert hasattr(getattr(config.settings, record), field), macro
