"""Sizes that do not divide over a mesh: what is said of each."""

import dataclasses

import pytest

from launch.config.division import problems
from moe.settings import (
    ExecutionSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)
from partitioning.settings import MeshSettings, PartitionSettings

pytestmark = pytest.mark.fast

MODEL = ModelSettings(
    vocab_size=64,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=48,
    num_experts=8,
    expert_mlp_dim=40,
)
GROUPS = RouterSettings(group_size=16)


def faults(mesh, model=MODEL, length=128, router=GROUPS, vocab_chunks=1, **partition):
    return problems(
        MeshSettings(**mesh),
        PartitionSettings(**partition),
        model,
        {"GROUP_SIZE": (router, length)},
        ExecutionSettings(vocab_chunks=vocab_chunks),
        TrainSettings(batch_size=32),
    )


@pytest.mark.parametrize(
    ("mesh", "partition"),
    [
        ({}, {}),
        ({"data": 4, "expert": 8}, {"fsdp": "data_expert"}),
        ({"context": 2, "model": 4}, {"fsdp": "data"}),
        ({"model": 4}, {"expert_tensor_parallel": False, "fsdp": "data"}),
    ],
)
def test_what_divides_is_accepted(mesh, partition):
    assert faults(mesh, **partition) == []


@pytest.mark.parametrize(
    ("mesh", "model", "partition", "said"),
    [
        ({"data": 3}, {}, {}, "BATCH_SIZE = 32 does not divide over 3 batch shards"),
        ({"expert": 3, "data": 1}, {}, {}, "set MESH_EXPERT to 2 or 4"),
        ({"context": 3}, {}, {}, "a row of 128 tokens does not divide over MESH_CONT"),
        (
            {"context": 4, "model": 4},
            {},
            {},
            "the 8 tokens of a row of 128 that each device of MESH_CONTEXT 4 × "
            "MESH_MODEL 4 routes: use 4 or 8",
        ),
        (
            {"data": 8},
            {"attention": "latent", "kv_latent_dim": 24, "query_latent_dim": 12},
            {"fsdp": "data"},
            "QUERY_LATENT_DIM = 12 does not divide over the 8 pieces of MESH_DATA 8",
        ),
        ({"model": 8}, {}, {}, "NUM_HEADS = 4 does not divide over MESH_MODEL = 8"),
        (
            {"model": 4},
            {"expert_mlp_dim": 42},
            {},
            "EXPERT_MLP_DIM = 42 does not divide over MESH_MODEL = 4: nearest are 40 "
            "and 44",
        ),
        (
            {"model": 4},
            {},
            {"vocab_chunks": 32},
            "VOCAB_SIZE = 64 does not divide over MESH_MODEL = 4 × VOCAB_CHUNKS = 32",
        ),
        (
            {"data": 8, "expert": 8},
            {},
            {"fsdp": "data_expert"},
            "EMBED_DIM = 32 does not divide over the 64 pieces of MESH_DATA 8 × "
            "MESH_EXPERT 8 that FSDP = 'data_expert' cuts dense weights into",
        ),
    ],
)
def test_what_does_not_divide_is_said_with_what_would(mesh, model, partition, said):
    found = faults(mesh, dataclasses.replace(MODEL, **model), **partition)
    assert any(said in line for line in found), found


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6, 12])
def test_any_number_of_heads_of_keys_will_do(kv_heads):
    model = dataclasses.replace(MODEL, num_heads=12, num_kv_heads=kv_heads)
    assert faults({"model": 4}, model) == []


def test_experts_that_are_not_cut_over_model_need_not_divide():
    model = dataclasses.replace(MODEL, expert_mlp_dim=42)
    assert faults({"model": 4}, model, expert_tensor_parallel=False) == []


def test_a_dense_model_has_no_groups_to_divide():
    dense = dataclasses.replace(MODEL, moe_every=0)
    assert faults({"model": 4}, dense, length=8) == []
