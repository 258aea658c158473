"""Memory predicted without compiling: exact for the state, by hand for the rest."""

import dataclasses
import math

import jax
import pytest

from launch.config import reader
from launch.planning.cost import local, memory
from launch.run.assemble import assemble

GIB = 2**30
# A model of two layers, the second sparse: V 384, L 64, M 32, N 2, D 16, F 64, E 4,
# K 1, groups of 64, batches of 8.
TINY = "runs/tiny.gin"


def settings_of(*bindings, name=TINY):
    devices = ("SIMULATED_DEVICES=8",) if name == TINY else ()
    return reader.read([name], [*devices, *bindings]).settings


TPU = ("PLATFORM='tpu'", "SIMULATED_DEVICES=0")
MESHES = {
    "one": (),
    "data": ("MESH_DATA=2", "MESH_EXPERT=2"),
    "optimizer": ("MESH_DATA=4", "FSDP='optimizer'"),
    "fsdp": ("MESH_DATA=2", "MESH_EXPERT=2", "FSDP='data'"),
    "all": (
        *("MESH_DATA=2", "MESH_EXPERT=2", "MESH_MODEL=2", "FSDP='data_expert'"),
        "GROUP_SIZE=32",
    ),
    "whole_experts": (
        *("MESH_DATA=2", "MESH_MODEL=2", "FSDP='data'"),
        *("EXPERT_TENSOR_PARALLEL=False", "GROUP_SIZE=32"),
    ),
    "context": ("MESH_DATA=2", "MESH_CONTEXT=2", "FSDP='data'", "GROUP_SIZE=32"),
    "muon": ("MESH_DATA=2", "MESH_EXPERT=2", "FSDP='data'", "OPTIMIZER='muon'"),
    "adafactor": ("MESH_EXPERT=4", "OPTIMIZER='adafactor'", "BETA1=0.0"),
    "latent": (
        *("MESH_DATA=2", "MESH_MODEL=2", "FSDP='data'", "GROUP_SIZE=32"),
        *("ATTENTION='latent'", "KV_LATENT_DIM=24", "ROPE_HEAD_DIM=6"),
        *("QUERY_LATENT_DIM=40", "VALUE_HEAD_DIM=10", "PREDICT_AHEAD=2"),
    ),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_arguments_are_those_of_the_assembled_run_to_the_byte(mesh):
    config = reader.read([TINY], [*MESHES[mesh], "SIMULATED_DEVICES=8"])
    run = assemble(config)
    state = sum(
        math.prod(place.shard_shape(array.shape)) * array.dtype.itemsize
        for array, place in zip(
            jax.tree.leaves(run.shapes), jax.tree.leaves(run.shardings), strict=True
        )
    )
    batch = sum(
        math.prod(run.batch_sharding.shard_shape(array.shape)) * 4
        for array in run.batch_shapes().values()
    )
    plan = memory.predict(config.settings, "cpu")
    assert plan.arguments == state + batch + 4  # the number of the batch


# Shapes and the bytes of an argument that libtpu 0.0.42 reports for v5e.
TILED = [
    ((), 4, 512),
    ((100,), 4, 512),
    ((256,), 4, 1024),
    ((1500,), 4, 8192),
    ((5000,), 4, 20480),
    ((3, 64), 4, 2048),
    ((64, 8), 4, 4096),
    ((12, 100), 2, 4096),
    ((256, 16, 16), 4, 262144),
    ((4, 100, 300), 4, 614400),
    ((6, 1, 2080), 4, 52224),
    ((5, 3, 2, 3, 64), 4, 46080),
    ((24, 1024, 8, 64), 2, 25165824),
]


@pytest.mark.parametrize(("shape", "itemsize", "told"), TILED)
def test_small_arrays_are_padded_as_the_tpu_compiler_pads_them(shape, itemsize, told):
    assert local.tiled_bytes(shape, itemsize) == told


def test_what_layers_keep_is_what_the_formulas_say():
    settings = settings_of(
        *("MESH_DATA=2", "MESH_MODEL=2", "DTYPE='bfloat16'", "MICROBATCHES=2"),
        *("GROUP_SIZE=32", "TRANSPORT='all_to_all'", "MIN_EXPERT_CAPACITY=1"),
    )
    sizes = local.local(settings, "tpu")
    # 8 rows on 2 × 2 chips in 2 microbatches: 2 rows of 64, of which a chip routes 32.
    assert (sizes.rows, sizes.length, sizes.piece) == (2, 64, 32)
    dense_layer, sparse_layer = sizes.stack.kinds_of_layers
    stream = 64 * 32 * 2  # p·T·M·d
    assert memory.saved_per_layer(sizes, "full", dense_layer) == stream
    # Queries, keys, values: T = 128 tokens of 3 · 1 head · 16; the output 32 wide; half
    # of the 64 hidden, of gelu, which has no gate.
    dense = stream + 128 * (48 + 32 + 32) * 2
    assert memory.saved_per_layer(sizes, "minimal", dense_layer) == dense
    # Two groups of 32 · 1.25 / 4 = 10 slots for 4 experts: 80 rows, gathered to 160.
    rows = 80
    sparse = stream + 128 * (48 + 32) * 2 + 64 * 4 * 4  # and the router
    sparse += (rows + rows + 2 * rows) * 32 * 2 + 2 * rows * 32 * 2
    assert memory.saved_per_layer(sizes, "minimal", sparse_layer) == sparse
    assert memory.saved_per_layer(sizes, "none", sparse_layer) > sparse
    assert memory.saved(sizes) == sum(
        memory.saved_per_layer(sizes, settings.execution.remat, layer)
        for layer in (dense_layer, sparse_layer)
    )


def test_the_total_is_the_fullest_moment_and_its_categories():
    for bindings in MESHES.values():
        plan = memory.predict(settings_of(*bindings))
        assert plan.total == plan.arguments + plan.temporaries
        assert plan.total == sum(plan.categories.values())
        most = max(sum(moment.values()) for moment in plan.moments.values())
        assert plan.temporaries == most > 0


def test_full_sharding_remat_and_pieces_of_the_vocabulary_save_memory():
    wide = ("EMBED_DIM=512", "MLP_DIM=2048", "EXPERT_MLP_DIM=2048", "REMAT='none'")
    plan = memory.predict(settings_of(*wide, "MESH_DATA=8"))
    sharded = memory.predict(settings_of(*wide, "MESH_DATA=8", "FSDP='data'"))
    assert sharded.arguments < plan.arguments / 7
    logits = memory.predict(settings_of("VOCAB_SIZE=65536")).moments["logits"]
    pieces = memory.predict(settings_of("VOCAB_SIZE=65536", "VOCAB_CHUNKS=8"))
    # Without pieces, the gradient of the table is there as well.
    assert pieces.moments["logits"]["logits"] < logits["logits"] / 8
    full = memory.predict(settings_of("REMAT='full'"))
    none = memory.predict(settings_of("REMAT='none'"))
    assert full.categories["activations"] < none.categories["activations"]


def test_evaluation_counts_where_its_rows_are_more_than_those_of_training():
    tokens = ("BATCH_SIZE=256", "MICROBATCHES=2", "MIN_EXPERT_CAPACITY=1")
    on_mesh = ("MESH_DATA=2", "MESH_EXPERT=4", "NUM_EXPERTS=32", *tokens)
    padded = settings_of(*on_mesh, "TRANSPORT='all_to_all'")
    sizes = local.local(padded, "tpu")
    scoring = dataclasses.replace(sizes, train=False)
    # 256 rows on 8 chips in 2 microbatches: 16 groups of 64 tokens and 32 experts, of
    # ⌈64 · 1.25 / 32⌉ = 3 slots each in training; where nothing drops, of 64.
    (layer,) = set(sizes.stack.settings("sparse"))
    assert sizes.expert_rows(layer) == 16 * 32 * 3
    assert scoring.expert_rows(layer) == 16 * 32 * 64
    plan = memory.predict(padded)
    assert plan.fullest == "evaluation of a sparse layer"
    # Rows in and out, 32 wide, float32, and 64 wide between; no gradient, and nothing
    # kept for one.
    assert plan.categories["dispatch"] == 2 * 16 * 32 * 64 * 32 * 4
    assert plan.categories["experts"] == 16 * 32 * 64 * 64 * 4
    assert not {"gradients", "activations"} & set(plan.categories)
    # Left to itself the run takes another transport there: rows of choices alone.
    assert "evaluation" not in memory.predict(settings_of(*on_mesh)).fullest
    dropping = settings_of(
        *on_mesh, "TRANSPORT='all_to_all'", "EVAL_CAPACITY_FACTOR=1.25"
    )
    assert "evaluation" not in memory.predict(dropping).fullest


def test_offloaded_moments_are_the_hosts():
    here = memory.predict(settings_of())
    away = memory.predict(settings_of("OFFLOAD_OPTIMIZER=True", *TPU))
    assert away.host == here.optimizer
    assert away.arguments == here.arguments - here.optimizer


def test_a_trillion_parameters_fit_480_v100_with_8_bytes_each_but_not_with_16():
    bindings = ("MESH_EXPERT=480", "REMAT='full'")
    room = 32 * GIB
    adafactor, adam = (
        memory.predict(
            settings_of(*bindings, f"OPTIMIZER={name!r}", name="runs/m6_t_1t.gin"),
            "gpu",
        )
        for name in ("adafactor", "adamw")
    )
    # Each of 24 layers has 960 experts of 2 · 1,024 · 21,248. Each GPU has 2 of them,
    # and all of the rest of 1,002,753,042,432 parameters: 146,614,272.
    experts = 24 * 2 * 1024 * 21248
    parameters = 2 * experts + 1_002_753_042_432 - 960 * experts
    assert adafactor.parameters == 4 * parameters
    gradients = adafactor.moments["optimizer"]["gradients"]
    assert gradients == adafactor.parameters
    # Parameters and gradients, 8 bytes: 16.7 GiB. The factored moments are vectors.
    assert adafactor.arguments + gradients < 17.1 * GIB
    assert adafactor.total < room
    # Two moments more, 16 bytes: 33.3 GiB before any activation.
    assert adam.arguments + gradients > 33 * GIB > room
