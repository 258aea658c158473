"""Every configuration of `configs/runs` is the same on three meshes as on one device.

Slow: an hour on one core. What passed is kept in pytest's cache until code or
configurations change, so that a second run goes on where the first one ended.
"""

import dataclasses
import hashlib
import importlib.resources
import json
from pathlib import Path

import jax
import pytest
from every_run import on_eight_devices

from benchmarks.ladder.rows import is_shared
from launch.config import edit
from launch.config.rules import problems
from launch.config.settings import PlatformSettings
from launch.verification import examine
from launch.verification.shrink import shrink

CONFIGS = Path(str(importlib.resources.files("configs")))
# Sizes of one family shrink to the same: one of each is enough.
LIKE = ("t5_small", "t5_base", "t5_3b", "t5_11b", "t5_1_1_small", "t5_1_1_base")
LIKE += ("t5_1_1_large", "t5_1_1_xl", "switch_base_8", "switch_base_16", "bert_large")
LIKE += ("switch_base_32", "switch_base_64", "switch_base_256", "switch_large")
LIKE += ("gpt2_355m", "gpt2_774m", "gpt2_1_5b", "megatron_8_3b", "turing_nlg_17b")
LIKE += ("mt_nlg_530b", "pangu_alpha_2_6b", "pangu_alpha_13b", "pangu_alpha_200b")
LIKE += ("pangu_nlp_100b_proxy", "yuan_1_245b", "ernie_3_10b", "ernie_3_titan_260b")
LIKE += ("m6_dense_10b", "cpm_2_11b", "qwen3_235b_a22b", "gpt_oss_120b", "st_moe_32b")
LIKE += ("glm_4_5_air",)
RUNS = sorted(
    path.stem
    for path in (CONFIGS / "runs").glob("*.gin")
    if not is_shared(path) and path.stem not in LIKE
)
# Where, drawn from 0, an input of a ReLU is 0 but for rounding, and so on one side of
# its kink on one device and on the other on a mesh: gradients differ there alone.
SEEDS = {"gshard_600b": 1}
# Groups small enough for rows that are cut in four; a few knobs of placement each.
MESHES = {
    "data=2,expert=2,model=2": ("FSDP=data",),
    "context=2,expert=2,model=2": ("FSDP=data_expert", "CONTEXT_ATTENTION=ring"),
    "replica=2,data=2,expert=2": ("FSDP=optimizer", "MICROBATCHES=2"),
}


@pytest.fixture(scope="session")
def passed(pytestconfig) -> Path:
    """A folder for what this code and these configurations have passed."""
    root = CONFIGS.parent
    files = [
        path
        for folder in ("moe", "partitioning", "launch", "configs")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".gin")
    ]
    digest = hashlib.sha256(jax.__version__.encode())
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return pytestconfig.cache.mkdir(f"verified-{digest.hexdigest()[:16]}")


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mesh", MESHES)
def test_the_meshes_suit_every_run(run, mesh):
    settings = on_eight_devices(run, *MESHES[mesh]).settings
    on_mesh = dataclasses.replace(
        settings, mesh=edit.parse_mesh(mesh)[0], platform=PlatformSettings()
    )
    assert problems(on_mesh) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_run_is_the_same_on_a_mesh(run, mesh, passed):
    file = passed / f"{run}-{mesh}.json"
    if file.exists():
        return  # with this very code
    config = on_eight_devices(run, *MESHES[mesh])
    small = shrink(config.settings, [edit.parse_mesh(mesh)[0]], run, 8)
    (verdict,) = examine.examine(
        config, small, parts=("decisions",), seed=SEEDS.get(run, 0)
    )
    assert verdict.ok, examine.differing(verdict)
    rows = {row.quantity: row.difference for row in verdict.rows}
    file.write_text(json.dumps({"seconds": verdict.seconds, "differences": rows}))
