"""What is said of a run before it is compiled."""

import re

import jax
import pytest
from commands import ROOT, TINY, Place, inline

from launch.config import reader
from launch.run.describe import sparse_facts
from moe.testing import MESHES
from partitioning.mesh import describe, make_mesh

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


# ------------------------------------------------------ for hardware that is elsewhere

HARDWARE = sorted(path.stem for path in (ROOT / "configs" / "hardware").glob("*.gin"))
# Divides over the mesh of every hardware file; and nothing drops.
DIVIDES = ("NUM_EXPERTS=64", "BATCH_SIZE=1024", "TRAIN_CAPACITY_FACTOR=0.0")
KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5p",
    "v6e": "TPU v6 lite",
    "7x": "TPU7x",
    "a100": "A100-80G",
    "h100": "H100",
    "v100": "V100-32G",
}


def dry_run(*words: str) -> str:
    """What is printed, one space between words."""
    done = inline("train", *words, "--dry_run")
    assert done.code == 0, done.err
    return re.sub(r"[│\s]+", " ", done.out)


ON_CPU = {name for name in HARDWARE if "cpu" in name or name == "here"}


@pytest.fixture
def no_devices(monkeypatch):
    """Fails where jax is asked for devices."""
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device was sought"))


@pytest.mark.parametrize("name", sorted(set(HARDWARE) - ON_CPU))
def test_a_dry_run_needs_no_accelerator(name, no_devices):
    mesh = reader.read(["runs/tiny.gin", f"hardware/{name}.gin"], DIVIDES).settings.mesh
    knobs = [f"--gin.{knob}" for knob in DIVIDES]
    text = dry_run(TINY, f"--gin_file=hardware/{name}.gin", *knobs)
    chip = name.partition("_")[0]
    assert f" devices {mesh.num_devices:,} × {KINDS[chip]} of " in text
    assert f" by the name of configs/hardware/{name}.gin " in text
    is_gpu = name.startswith(("a100", "h100", "v100"))
    assert f" mesh {describe(mesh)} ({'gpu' if is_gpu else 'tpu'}) " in text
    # 64 experts of 32 × 64 in float32, cut over `expert`, and over `data` by FSDP.
    size = 4 * 64 * 32 * 64 // mesh.expert // mesh.data
    assert "experts/up 1×64×32×64 " in text
    cut = "context×data" if is_gpu else "data×context"  # by the links of a torus
    assert f" –, expert, {cut}, model {size:,} " in text
    # Sorted rows, where they can be exchanged: beyond 16 chips a v5e cannot.
    assert f" transport {'ring' if chip == 'v5e' else 'ragged'} (nothing drops" in text
    products = "batched" if is_gpu else "tpu (ragged_dot"
    assert f" expert products {products}" in text
    assert re.search(r" state and batch [\d.]+ [kMG]?B on each device ", text)


@pytest.mark.parametrize("name", sorted(ON_CPU))
def test_a_dry_run_for_cpus_takes_those_that_are_here(name):
    mesh = reader.read(["runs/tiny.gin", f"hardware/{name}.gin"]).settings.mesh
    text = dry_run(TINY, f"--gin_file=hardware/{name}.gin")
    assert f" mesh {describe(mesh)} (cpu) " in text
    assert " attention with all scores held (kernels are for TPU and GPU) " in text


def test_a_trillion_parameters_for_1024_chips_are_described_at_once(no_devices):
    text = dry_run(
        "--gin_file=runs/glam_64b_64e.gin", "--gin_file=hardware/v4_8x8x16.gin"
    )
    assert " devices 1,024 × TPU v4 of v4:8x8x16, " in text
    assert " transport all_to_all (capacity bounds every expert's rows); held-out " in (
        text
    )
    assert " 1,161,756,418,048 total" in text


def test_gpus_that_are_elsewhere_choose_their_own_kernels(no_devices):
    files = "--gin_file=runs/mixtral_8x7b.gin", "--gin_file=hardware/h100_64.gin"
    text = dry_run(*files)
    assert " expert products hopper (a grouped kernel of jax for H100) " in text
    assert "too large for 32768 tokens" in text
    text = dry_run(*files, "--gin.TASK_FEATURE_LENGTHS={'targets': 4096}")
    assert " attention cudnn (cuDNN's attention" in text


def test_the_optimizers_state_may_lie_in_the_memory_of_a_host_that_is_elsewhere():
    text = dry_run(
        *("--gin_file=runs/mixtral_8x7b.gin", "--gin_file=hardware/h100_8.gin"),
        *("--gin.OFFLOAD_OPTIMIZER=True", "--gin.BATCH_SIZE=8"),
    )
    assert " devices 8 × H100 of h100:8, " in text


def test_what_no_file_name_tells_of_devices_is_said(leaf, no_devices):
    name = leaf('PLATFORM = "cuda"', "SIMULATED_DEVICES = 0", "MESH_DATA = 4")
    text = dry_run(f"--gin_file={name}", "--gin.TRAIN_CAPACITY_FACTOR=0.0")
    assert " devices 4 of a kind that no file is named for" in text
    assert "is for Hopper, this is GPU of unknown kind) " in text
    # Half the slice, and another mesh: the kind is known, the places are not.
    text = dry_run(
        *(TINY, "--gin_file=hardware/v5e_4x8.gin", "--gin.NUM_EXPERTS=16"),
        *("--gin.MESH_DATA=2", "--gin.BATCH_SIZE=64"),
    )
    assert " devices 16 × TPU v5 lite, by the name of configs/hardware/v5e_4x8" in text
    assert " where they lie is not known" in text


def test_a_dry_run_refuses_slices_that_the_mesh_does_not_join():
    done = inline(
        *("train", TINY, "--gin_file=hardware/v5e_2x16x16.gin", "--dry_run", "--quiet"),
        *("--gin.MESH_REPLICA=1", "--gin.MESH_DATA=32", "--gin.NUM_EXPERTS=16"),
        "--gin.BATCH_SIZE=512",
    )
    assert done.code == 1
    assert "MESH_REPLICA = 1, and 2*v5e:16x16 has 2 slices" in done.err


def test_a_dry_run_starts_no_accelerator(tmp_path):
    # jax would fail at its first device: the CPU is not asked for, and no TPU is here.
    done = Place(tmp_path).run(
        *("train", TINY, "--gin_file=hardware/v4_4x4x4.gin", "--dry_run"),
        *("--gin.NUM_EXPERTS=16", "--gin.BATCH_SIZE=64"),
        JAX_PLATFORMS="tpu",
    )
    assert done.code == 0, done.err
    assert "dry run for 64 TPU devices, data 4 × expert 16" in done.err
    assert "devices " in done.out
