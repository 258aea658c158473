"""Every array of the models of papers is in a sum that can be done by hand.

What the papers say is compared in tests/benchmarks/test_zoo.py.
"""

import dataclasses
import functools

import pytest

from benchmarks.zoo.published import PUBLISHED
from launch.config import reader
from moe import accounting
from moe.architecture import describe
from moe.routing.capacity import mean_choices
from moe.settings import ModelSettings, RouterSettings


@functools.cache
def sizes(name: str) -> tuple[ModelSettings, RouterSettings]:
    settings = reader.read([f"runs/{name}.gin"]).settings
    return settings.model, settings.router


def attention_by_hand(model: ModelSettings) -> int:
    """Parameters of the attention of one layer, but for the norm before it."""
    M, N, D = model.model_dim, model.num_heads, model.head_dim
    U = model.num_kv_heads or N
    if model.attention == "latent":
        R, V = model.rope_head_dim, model.value_head_dim or D
        Q, K = model.query_latent_dim, model.kv_latent_dim
        # Queries by way of Q numbers, keys and values by way of K, and a norm of each;
        # the key that turns is made at once, and all heads share it.
        queries = M * Q + Q + Q * N * (D + R) if Q else M * N * (D + R)
        return queries + M * (K + R) + K + K * N * (D + V) + N * V * M
    # Query and output, key and value; a bias beside each.
    found = 2 * M * N * D + 2 * M * U * D
    found += model.attention_biases * (N + 2 * U) * D
    found += model.attention_output_bias * M
    found += model.attention_output_gate * M * N * D
    found += model.attention_sinks * N
    return found + {"head": 2 * D, "width": (N + U) * D}.get(model.qk_norm, 0)


def by_hand(model: ModelSettings, router: RouterSettings) -> tuple[int, int]:
    """Total and active parameters, as a sum over the parts of a model."""
    if model.layer_sharing == "all":  # and all layers are alike
        assert model.moe_every == 1
        one = dataclasses.replace(model, layer_sharing="none", num_layers=1)
        return by_hand(one, router)
    M, N, F = model.model_dim, model.num_heads, model.mlp_dim
    V, E = model.vocab_size, model.num_experts
    sides = [(model.num_layers, model.moe_every)]
    if model.shape == "encoder_decoder":
        sides.append((model.num_encoder_layers, model.encoder_moe_every))
    layers = sum(number for number, _ in sides)
    first = model.first_dense_layers
    sparse = sum((number - first) // every for number, every in sides if every)
    crosses = model.num_layers if model.shape == "encoder_decoder" else 0

    attention = attention_by_hand(model)
    # Two in each layer, three where it looks across, twice as many if outputs have one
    # too, and the last one of each stack; a layer norm has a bias beside its scale.
    last = len(sides) if model.norm_place != "after" else 0
    last += model.embedding_norm + model.output_transform
    extra = sparse if model.extra_mlp != "none" else 0
    norms = 2 * layers + crosses + extra
    norms = norms * (2 if model.norm_place == "both" else 1) + last
    norms *= M * (2 if model.norm == "layer" else 1)
    # A gate has a matrix of its own.
    up = 2 if "glu" in model.activation else 1
    dense = (up + 1) * M * F
    if model.mlp_biases:
        dense += up * F + M
    of_experts = model.expert_activation
    of_experts = model.activation if of_experts == "same" else of_experts
    expert_up = 2 if "glu" in of_experts else 1
    expert = (expert_up + 1) * M * model.expert_mlp_dim
    if model.expert_biases:
        expert += expert_up * model.expert_mlp_dim + M
    positions = {
        "rotary": 0,
        "learned": model.max_positions * M,
        "relative": len(sides) * model.relative_buckets * N,
        "relative_per_layer": layers * model.relative_buckets * N,
    }[model.positions]
    vocabulary = V * M * (1 if model.tie_embeddings else 2)

    vocabulary += model.token_types * M + V * model.output_bias
    vocabulary += (M * M + M) * model.output_transform
    all_tokens = vocabulary + positions + norms + (layers + crosses) * attention
    all_tokens += (layers - sparse + extra) * dense
    # A router, its bias, and that which only chooses.
    all_tokens += sparse * E * (M + router.logit_bias + router.selection_bias)
    all_tokens += sparse * (up + 1) * M * model.shared_expert_mlp_dim
    all_tokens += sparse * M * model.shared_expert_gate
    visited = int(mean_choices(router, E))
    return all_tokens + sparse * E * expert, all_tokens + sparse * visited * expert


@pytest.mark.fast
def test_the_largest_glam_is_the_sum_that_its_paper_describes():
    # M = 8,192, 128 heads of 128, F = 32,768, 64 experts in 32 of 64 layers.
    attention = 4 * 8_192 * 16_384  # 536,870,912: twice as wide as the model
    dense = 3 * 8_192 * 32_768  # 805,306,368: gated
    expert = 2 * 8_192 * 32_768  # 536,870,912: not gated
    rest = 256_000 * 8_192  # tied embedding
    rest += 64 * 32 * 128  # a table of 32 buckets and 128 heads in each layer
    rest += (2 * 64 + 1) * 8_192  # norms
    rest += 32 * 8_192 * 64  # routers
    all_tokens = rest + 64 * attention + 32 * dense
    assert by_hand(*sizes("glam_64b_64e")) == (
        all_tokens + 32 * 64 * expert,
        all_tokens + 32 * 2 * expert,
    )
    assert all_tokens + 32 * 64 * expert == 1_161_756_418_048


@pytest.mark.fast
def test_switch_c_is_the_sum_that_its_paper_describes():
    # M = 2,080, 32 heads of 64, 15 layers on each side, 2,048 experts in all of them.
    attention = 4 * 2_080 * 2_048  # 15 in the encoder, 30 in the decoder
    expert = 2 * 2_080 * 6_144
    rest = 2 * 32_128 * 2_080  # the output has a matrix of its own
    rest += 45 * attention + 30 * 2_080 * 2_048  # routers
    rest += 2 * 32 * 32  # two tables of 32 buckets and 32 heads
    rest += (2 * 15 + 3 * 15 + 2) * 2_080  # norms
    assert by_hand(*sizes("switch_c")) == (
        rest + 30 * 2_048 * expert,
        rest + 30 * expert,
    )


@pytest.mark.fast
def test_the_largest_gpt3_is_the_sum_that_its_paper_describes():
    # M = 12,288, F = 4 M, 96 layers: 12 M² + 13 M each, of which 4 M are the norms',
    # 4 M the biases of attention and 5 M those of the feed-forward.
    layer = 12 * 12_288**2 + 13 * 12_288
    total = 96 * layer + (50_257 + 2_048) * 12_288 + 2 * 12_288
    assert by_hand(*sizes("gpt3_175b")) == (total, total)
    assert total == 174_604_259_328


@pytest.mark.fast
def test_a_trillion_parameters_of_m6_t_are_nearly_all_experts():
    experts = 24 * 960 * 2 * 1_024 * 21_248
    # Attention and its biases, two norms, a router; then 512 positions, last norm.
    layer = 4 * 1_024**2 + 4 * 1_024 + 4 * 1_024 + 1_024 * 960
    others = 24 * layer + (21_128 + 512) * 1_024 + 2 * 1_024
    assert experts == 1_002_606_428_160
    assert others == 146_614_272
    # A token visits one expert of each of the two prototypes.
    two = experts // 960 * 2
    assert by_hand(*sizes("m6_t_1t")) == (others + experts, others + two)


@pytest.mark.fast
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_that_is_built_has_as_many_as_a_sum_over_its_parts(name):
    counts = accounting.count(describe(*sizes(name)), 1024, 512)
    assert (counts.total, counts.active) == by_hand(*sizes(name))
