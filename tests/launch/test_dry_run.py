"""What is said of a run before it is compiled."""

import pytest

from launch.config import reader
from launch.run.describe import sparse_facts
from moe.testing import MESHES
from partitioning.mesh import make_mesh

pytestmark = pytest.mark.fast


def test_a_run_with_two_slots_per_expert_says_what_it_drops_and_computes():
    settings = reader.read(["runs/switch_c_decoder.gin"]).settings
    facts = dict(sparse_facts(settings, make_mesh(MESHES["e8"])))
    assert facts["expected drops"].startswith("10.4%")
    assert facts["few slots"].startswith("2 per expert and group")
    for macro in ("GROUP_SIZE = 16384", "NUM_EXPERTS", "TRAIN_CAPACITY_FACTOR"):
        assert macro in facts["few slots"]
    # 4,096 slots for 2,048 tokens of two rows.
    assert "computes 2 rows for each token, of which 1 were" in facts["few slots"]


def test_a_run_whose_experts_have_many_slots_is_not_warned():
    settings = reader.read(["runs/glam_64b_64e.gin"]).settings
    facts = dict(sparse_facts(settings, make_mesh(MESHES["e8"])))
    # 64 experts share 2,048 choices: 32 slots, as many as an even load.
    assert facts["capacity"].startswith("32 slots per expert in groups of 1024 tokens")
    assert facts["expected drops"].startswith("6.9%")
    assert "few slots" not in facts


def test_a_dropless_run_expects_no_drops():
    settings = reader.read(["runs/mixtral_8x7b.gin"]).settings
    facts = dict(sparse_facts(settings, make_mesh(MESHES["d1"])))
    assert facts["capacity"].startswith("nothing drops")
    assert "expected drops" not in facts


def test_a_run_over_sorted_rows_says_how_its_experts_are_computed():
    settings = reader.read(["runs/mixtral_8x7b.gin"]).settings
    facts = dict(sparse_facts(settings, make_mesh(MESHES["d1"])))
    assert facts["expert products"] == "blocked (loops over the experts that have rows)"
    padded = reader.read(["runs/glam_64b_64e.gin"], ["EVAL_CAPACITY_FACTOR = 2.0"])
    facts = dict(sparse_facts(padded.settings, make_mesh(MESHES["e8"])))
    assert facts["transport"].startswith("all_to_all")
    assert "expert products" not in facts


def test_a_run_whose_layers_differ_is_described_by_its_largest():
    changes = ["EXPERTS_PER_LAYER = (16, 16, 32, 64)", "NUM_LAYERS = 8"]
    settings = reader.read(["runs/glam_64b_64e.gin"], changes).settings
    facts = dict(sparse_facts(settings, make_mesh(MESHES["e8"])))
    assert facts["experts"].startswith("16, 16, 32, 64 by layer")
    assert facts["capacity"].startswith("32 slots per expert")
