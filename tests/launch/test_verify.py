"""A small grid of configurations is the same on meshes as on one device, and `verify`
says clearly what it cannot do."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from commands import inline

from launch.config import edit, reader
from launch.verification import compare, examine, meshes
from launch.verification.compare import Row
from launch.verification.shrink import shrink
from moe.routing.capacity import capacity
from partitioning.settings import MeshSettings

DEVICES = 8  # of the tests

# Routers × transports × axes × placement × remat, each with others than elsewhere.
CASES = {
    "token_choice": (
        "data=2,expert=2,model=2",
        "NUM_SELECTED_EXPERTS=2 RENORMALIZE_GATES=before_drop JITTER_NOISE=0.05 "
        "SECOND_EXPERT_POLICY=random REMAT=minimal TRAIN_CAPACITY_FACTOR=1.0 "
        "DROPOUT_RATE=0.1 OPTIMIZER=adafactor",
        ("decisions", "evaluation"),
    ),
    "prototypes": (
        "replica=2,expert=4",
        "ROUTER=prototypes NUM_PROTOTYPES=2 TRANSPORT=ring REMAT=full NORM=layer "
        "POSITIONS=learned MAX_POSITIONS=64 ATTENTION_BIASES=True MLP_BIASES=True "
        "FSDP=data_expert MICROBATCHES=2 AUX_LOSS_SCOPE=global",
        ("decisions",),
    ),
    "selection_bias": (
        "context=2,expert=2,model=2",
        "NUM_SELECTED_EXPERTS=2 ROUTER_SCORES=sigmoid ROUTER_BIAS=True FSDP=data "
        "ROUTER_BIAS_UPDATE=quantile ROUTER_LOGIT_BIAS=True GATE_PLACE=input "
        "RENORMALIZE_GATES=after_drop EXPERT_TENSOR_PARALLEL=False EXPERT_BIASES=True "
        "SHARED_EXPERT_MLP_DIM=32 SHARED_EXPERT_GATE=True ACTIVATION=swiglu_clamped "
        "AUX_LOSS_SCOPE=sequence NORM=rms_plus_one NORM_PLACE=both EXTRA_MLP=after "
        "EMBED_SCALE=2.0 RESIDUAL_SCALE=0.5 LOGIT_SCALE=0.5 "
        # A pyramid: of both segments losses, ledger and biases count.
        "NUM_LAYERS=2 NUM_EXPERTS=16 EXPERTS_PER_LAYER=(8,16) ATTENTION_WINDOWS=(8,0) "
        "ROPE_FRACTION=0.5 ROPE_PAIRS=neighbours ROPE_SCALING=yarn ROPE_FACTOR=4.0 "
        "ROPE_ORIGINAL_LENGTH=32 QK_NORM=width ATTENTION_SINKS=True ATTENTION_CAP=2.0 "
        "ATTENTION_OUTPUT_GATE=True LOGIT_CAP=4.0",
        ("decisions",),
    ),
    "hashed": (
        "data=2,expert=4",
        "ROUTER=hashed NUM_SELECTED_EXPERTS=2 TRAIN_CAPACITY_FACTOR=0.0 "
        "HASH_GATES=scores ROUTER_SCORES=sqrt_softplus RENORMALIZE_GATES=before_drop "
        "TRANSPORT=ragged FSDP=optimizer MOE_POSITION=first TIE_EMBEDDINGS=True "
        "ACTIVATION=relu_squared",
        (),
    ),
    "sinkhorn": (
        "context=4,model=2",
        "ROUTER=sinkhorn ALLOW_FUTURE_LEAK=True CONTEXT_ATTENTION=ring "
        "POSITIONS=relative ATTENTION_BLOCK=16 REMAT=minimal FSDP=data "
        "VOCAB_CHUNKS=2 SEQUENCE_PARALLEL=False NUM_HEADS=4 NUM_KV_HEADS=2 "
        "NUM_LAYERS=4 ATTENTION_WINDOWS=(12,0) LAYER_SHARING=all NORM_PLACE=output",
        ("decisions",),
    ),
    "expert_choice": (
        "data=2,context=2,expert=2",
        "ROUTER=expert_choice ALLOW_FUTURE_LEAK=True TRANSPORT=einsum FSDP=data "
        "OBJECTIVE=prefix_lm PREFIX_ATTENTION=bidirectional REMAT=full "
        "POSITIONS=relative_per_layer Z_LOSS=0.0001",
        ("decisions", "evaluation", "accumulation"),
    ),
    "latent": (
        "data=2,context=2,model=2",
        "ATTENTION=latent KV_LATENT_DIM=32 QUERY_LATENT_DIM=48 ROPE_HEAD_DIM=16 "
        "VALUE_HEAD_DIM=24 FSDP=data ATTENTION_BLOCK=16 REMAT=minimal "
        "NUM_LAYERS=2 ATTENTION_WINDOWS=(8,0) PREDICT_AHEAD=2 MICROBATCHES=2 "
        "OPTIMIZER=muon QK_CLIP=100",
        ("decisions", "evaluation"),
    ),
    "dense": (
        "data=2,model=4",
        "MOE_EVERY=0 NUM_HEADS=4 NUM_KV_HEADS=2 FSDP=data ACTIVATION=geglu "
        "POSITIONS=alibi POSITION_LAYERS=(1,0) NUM_LAYERS=2 ATTENTION_CHUNKS=(9,0) "
        "ATTENTION_GROWTH=0.5 ATTENTION_GROWTH_LENGTH=8 OPTIMIZER=adafactor "
        "TIE_EMBEDDINGS=True",
        ("decisions", "evaluation"),
    ),
}
CASES["muon"] = (
    "data=2,expert=2,model=2",
    "OPTIMIZER=muon QK_CLIP=100 FSDP=data_expert ACTIVATION=swiglu NUM_KV_HEADS=2 "
    "NUM_HEADS=4",
    (),
)
DAILY = ("selection_bias",)


@functools.cache
def config(knobs: str = ""):
    given = ["NUM_LAYERS=1", "MOE_EVERY=1", *knobs.split()]
    return reader.read(["runs/tiny.gin"], given)


def shrunk(knobs: str, *words: str):
    asked = [edit.parse_mesh(word)[0] for word in words]
    return shrink(config(knobs).settings, asked, "runs/tiny.gin", DEVICES)


@pytest.mark.parametrize(
    "name",
    [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in CASES],
)
def test_a_mesh_computes_what_one_device_computes(name):
    mesh, knobs, parts = CASES[name]
    small = shrunk(knobs, mesh)
    (verdict,) = examine.examine(config(knobs), small, parts=parts)
    assert verdict.ok, examine.differing(verdict)
    quantities = {row.quantity for row in verdict.rows}
    assert len(quantities) == len(verdict.rows)
    assert {"loss/total", "optimizer/gradient_norm"} < quantities


def test_shrinking_keeps_choices_and_what_divides():
    knobs = (
        "NUM_LAYERS=24 MOE_EVERY=2 NUM_EXPERTS=64 NUM_SELECTED_EXPERTS=2 HEAD_DIM=64 "
        "NUM_HEADS=8 NUM_KV_HEADS=2 EMBED_DIM=1024 CAPACITY_ROUNDING=floor "
        "TRAIN_CAPACITY_FACTOR=2.0 REMAT=full FSDP=data MICROBATCHES=4 BATCH_SIZE=512"
    )
    small = shrunk(knobs, "data=16,expert=8", "expert=2,model=2,context=2")
    given, settings = config(knobs).settings, small.settings
    first, second = (mesh.small for mesh in small.meshes)
    assert first == MeshSettings(data=2, expert=4)
    assert second == MeshSettings(expert=2, model=2, context=2)
    assert (settings.model.num_layers, settings.train.microbatches) == (4, 2)
    assert settings.train.batch_size % (8 * 2) == 0
    assert settings.model.num_experts % 4 == 0
    assert settings.model.num_heads == 2 * settings.model.num_kv_heads == 4
    assert settings.data.length % (4 * settings.router.group_size) == 0
    assert settings.partition == given.partition
    for kept in ("num_selected", "capacity_factor", "capacity_rounding", "family"):
        assert getattr(settings.router, kept) == getattr(given.router, kept)
    assert settings.execution.remat == "full"
    names = {change.name: change for change in small.changes}
    assert (names["NUM_EXPERTS"].before, names["NUM_EXPERTS"].after) == (64, 8)
    # With 2 of 8 experts for each token, 2.0 · 2 · 8 / 8 slots would be enough.
    assert capacity(settings.router, 8, train=True) == 4


@pytest.mark.parametrize(
    ("kv_heads", "asked", "heads"),
    [
        (8, 8, (8, 4)),  # each device has its own
        (4, 8, (4, 2)),  # two devices share one
        (1, 8, (4, 2)),
        (12, 8, (12, 3)),  # one and a half on each
    ],
)
def test_shrinking_keeps_how_devices_share_heads_of_keys(kv_heads, asked, heads):
    knobs = f"NUM_HEADS=48 NUM_KV_HEADS={kv_heads} MOE_EVERY=0"
    small = shrunk(knobs, f"model={asked}").settings.model
    assert (small.num_heads, small.num_kv_heads) == heads


def test_the_transport_is_that_of_the_run_and_not_of_simulated_devices():
    knobs = "TRAIN_CAPACITY_FACTOR=0.0 PLATFORM=tpu SIMULATED_DEVICES=0"
    small = shrunk(knobs, "expert=4", "data=2")
    assert [mesh.transport for mesh in small.meshes] == ["ragged", "ragged"]
    assert small.on_one_device().execution.transport == "einsum"


def test_a_mesh_is_shrunk_to_two_to_four_devices_per_axis():
    assert meshes.shrink(MeshSettings(data=64, expert=64)) == MeshSettings(
        data=4, expert=4
    )
    assert meshes.shrink(MeshSettings(expert=480)) == MeshSettings(expert=4)
    large = MeshSettings(replica=4, data=32, expert=64, model=3)
    assert meshes.shrink(large) == MeshSettings(replica=2, data=2, expert=2, model=2)


def test_every_fault_of_the_meshes_is_in_one_message():
    done = inline(
        "verify",
        "--gin_file=runs/tiny.gin",
        "--mesh=date=2",
        "--mesh=expert=3",
        "--mesh=replica=2,data=2,context=2,expert=2,model=2",
        "--mesh=data",
    )
    assert done.code == 1
    assert "'date' is not an axis of the mesh; nearest: data" in done.err
    assert "NUM_EXPERTS = 4 does not divide over the expert axis of size 3" in done.err
    assert "5 axes larger than 1, which are 32 devices" in done.err
    assert "'data' has no size: write data=2" in done.err


def test_one_device_has_nothing_to_compare():
    done = inline("verify", "--gin_file=runs/tiny.gin")
    assert done.code == 1
    assert "--mesh=data=2,expert=4" in done.err


def test_sizes_of_the_run_that_do_not_divide_are_refused_though_small_ones_would():
    done = inline(
        "verify", "--gin_file=runs/tiny.gin", "--gin.MLP_DIM=62", "--mesh=model=4"
    )
    assert done.code == 1
    assert "MLP_DIM = 62 does not divide over MESH_MODEL = 4" in done.err


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path: Path):
    file = tmp_path / "verified.json"
    done = inline(
        "verify",
        "--gin_file=runs/tiny.gin",
        "--gin.NUM_LAYERS=1",
        "--gin.MOE_EVERY=1",
        "--mesh=expert=2",
        f"--json={file}",
    )
    assert done.code == 0, done.err
    assert "same: expert 2 (as expert 2)" in done.out
    found = json.loads(file.read_text())
    assert found["same"]
    assert len(found["meshes"][0]["rows"]) > 30


def test_a_difference_that_is_not_a_number_is_a_difference():
    nan = np.array([1.0, np.nan])
    row = Row("loss", compare.relative(np.ones(2), nan), 1.0)
    assert not row.ok
    assert not compare.collapsed([row, Row("x", 0.0, 1.0)], "all").ok


def test_a_gradient_that_is_zero_but_for_rounding_is_measured_by_the_others():
    expected = {"bias": np.full(3, 1e-9), "matrix": np.ones(3), "other": np.ones(3)}
    actual = {**expected, "bias": np.full(3, -2e-9)}
    assert all(row.ok for row in compare.gradients(expected, actual))
    wrong = {**expected, "bias": np.full(3, 1e-4)}
    assert [row.ok for row in compare.gradients(expected, wrong)] == [False, True, True]


def test_only_entries_whose_gradient_has_a_sign_are_held_against_the_optimizer():
    def step(after, gradient):
        rate = {"optimizer/learning_rate": np.float32(0.1)}
        return examine.Step(rate, {"w": gradient}, None, {"w": after})

    one = step(np.array([0.9, 0.9]), np.array([1.0, 1e-6]))
    turned = dataclasses.replace(one, params={"w": np.array([0.9, 1.1])})
    assert compare._own(one, turned).ok
    wrong = dataclasses.replace(one, params={"w": np.array([0.91, 0.9])})
    assert not compare._own(one, wrong).ok
