"""Parameters and arithmetic, counted by hand and by the compiler."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from moe import accounting
from moe.architecture import describe
from moe.model import parameters
from moe.model.build import build
from moe.routing.capacity import capacity
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from moe.testing import MESHES
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh

# A model for a small machine, with tied embeddings.
SMALL = ModelSettings(
    vocab_size=2048,
    num_layers=4,
    model_dim=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=1024,
    activation="relu",
    num_experts=8,
    expert_mlp_dim=1024,
    tie_embeddings=True,
)
ROUTER = RouterSettings(num_selected=1, group_size=256, capacity_factor=1.25)
LENGTH = 256

EMBEDDING = 2048 * 256  # 524,288; the output is the same matrix
ATTENTION = 4 * 256 * 4 * 64  # 262,144: query, key, value and output
TWO_MATRICES = 2 * 256 * 1024  # 524,288: one dense layer, or one expert
NORMS = 4 * 2 * 256 + 256  # two in each layer and the last one
ROUTERS = 2 * 256 * 8  # of two sparse layers
# 2·L·N·D for the scores and the same for the mixing of values, in each layer.
ATTENDING = 4 * 4 * 256 * 4 * 64


def test_a_dense_model_is_counted_as_by_hand():
    counts = accounting.count(
        describe(dataclasses.replace(SMALL, moe_every=0), ROUTER), LENGTH
    )
    matrices = 4 * ATTENTION + 4 * TWO_MATRICES
    assert counts.total == counts.active == EMBEDDING + matrices + NORMS == 3_672_320
    assert counts.embedding == EMBEDDING
    flops = 2 * (matrices + EMBEDDING) + ATTENDING
    assert counts.forward_flops_per_token == flops
    assert counts.executed_forward_flops_per_token == flops
    assert counts.train_flops_per_token == 3 * flops


def test_a_sparse_model_is_counted_as_by_hand():
    counts = accounting.count(describe(SMALL, ROUTER), LENGTH)
    shared = 4 * ATTENTION + 2 * TWO_MATRICES + ROUTERS
    total = EMBEDDING + NORMS + shared + 2 * 8 * TWO_MATRICES
    assert counts.total == total == 11_016_448
    # A token meets one expert in each of the two sparse layers.
    assert counts.active == total - 2 * 7 * TWO_MATRICES == 3_676_416
    flops = 2 * (shared + EMBEDDING + 2 * TWO_MATRICES) + ATTENDING
    assert counts.forward_flops_per_token == flops
    # 8 experts of 256 · 1.25 / 8 = 40 slots compute 320 rows for 256 tokens.
    executed = flops + 2 * 2 * TWO_MATRICES // 4
    assert counts.executed_forward_flops_per_token == executed


def test_two_experts_per_token_and_a_gate_matrix_are_counted_as_by_hand():
    model = dataclasses.replace(
        SMALL, activation="geglu", moe_every=1, tie_embeddings=False
    )
    router = dataclasses.replace(ROUTER, num_selected=2, capacity_factor=1.0)
    counts = accounting.count(describe(model, router), LENGTH)
    expert = 3 * 256 * 1024
    # The output has a matrix of its own, and all four layers have routers.
    shared = 4 * ATTENTION + 2 * ROUTERS + EMBEDDING
    assert counts.total == EMBEDDING + NORMS + shared + 4 * 8 * expert
    assert counts.active == EMBEDDING + NORMS + shared + 4 * 2 * expert < counts.total
    flops = 2 * (shared + 4 * 2 * expert) + ATTENDING
    assert counts.forward_flops_per_token == flops
    assert counts.executed_forward_flops_per_token == flops, "no slot is spare"


def test_spare_slots_are_executed_but_are_not_the_models_work():
    dropless = dataclasses.replace(ROUTER, capacity_factor=0.0)
    tight = dataclasses.replace(ROUTER, capacity_factor=1.0)
    some, most, none = (
        accounting.count(describe(SMALL, router), LENGTH)
        for router in (ROUTER, dropless, tight)
    )
    assert none.executed_forward_flops_per_token == none.forward_flops_per_token
    assert some.executed_forward_flops_per_token > some.forward_flops_per_token
    # Dropless, each of the 8 experts has a slot for each of the 256 tokens.
    spare = 2 * 2 * TWO_MATRICES * (8 - 1)
    assert most.executed_forward_flops_per_token == most.forward_flops_per_token + spare


def test_shared_experts_and_dense_layers_below_are_counted_as_by_hand():
    model = dataclasses.replace(
        SMALL,
        first_dense_layers=1,
        moe_every=1,
        activation="swiglu",
        shared_expert_mlp_dim=512,
    )
    router = dataclasses.replace(ROUTER, num_selected=3, capacity_factor=1.0)
    counts = accounting.count(describe(model, router), LENGTH)
    expert = 3 * 256 * 1024  # of which a shared one is half
    dense = 4 * ATTENTION + expert + 3 * (expert // 2 + 256 * 8)
    assert counts.total == EMBEDDING + NORMS + dense + 3 * 8 * expert
    assert counts.active == EMBEDDING + NORMS + dense + 3 * 3 * expert
    flops = 2 * (EMBEDDING + dense + 3 * 3 * expert) + ATTENDING
    assert counts.forward_flops_per_token == flops


@pytest.mark.parametrize(
    ("width", "mlp_dim", "heads", "head_dim", "num_experts", "billions"),
    [(1024, 2816, 16, 64, 32, "4.105"), (5120, 20480, 64, 128, 64, "269.1")],
)
def test_dense_sublayers_beside_experts_make_the_sizes_of_st_moe(
    width, mlp_dim, heads, head_dim, num_experts, billions
):
    # arXiv:2202.08906, table 11: 4.1B and 269B.
    model = ModelSettings(
        shape="encoder_decoder",
        vocab_size=32128,
        num_layers=24,
        num_encoder_layers=24,
        model_dim=width,
        num_heads=heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        activation="geglu",
        positions="relative",
        moe_every=4,
        num_experts=num_experts,
        expert_mlp_dim=mlp_dim,
        extra_mlp="before",
    )
    counts = accounting.count(describe(model, ROUTER), LENGTH, LENGTH)
    assert f"{counts.total / 1e9:.4g}" == billions
    without = describe(dataclasses.replace(model, extra_mlp="none"), ROUTER)
    fewer = accounting.count(without, LENGTH, LENGTH)
    # Three matrices and a norm in 6 + 6 layers; a token meets those of its side.
    assert counts.total - fewer.total == 12 * (3 * width * mlp_dim + width)
    assert counts.products - fewer.products == 6 * 3 * width * mlp_dim


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_biases_are_parameters_but_no_products(activation):
    model = dataclasses.replace(SMALL, activation=activation)
    biased = dataclasses.replace(model, mlp_biases=True, expert_biases=True)
    router = dataclasses.replace(ROUTER, selection_bias=True)
    without = accounting.count(describe(model, ROUTER), LENGTH)
    counts = accounting.count(describe(biased, router), LENGTH)
    for name in ("forward_flops_per_token", "executed_forward_flops_per_token"):
        assert getattr(counts, name) == getattr(without, name)
    biases = 256 + 1024 * (2 if activation == "swiglu" else 1)
    # Two dense layers, two of 8 experts, and their routers' biases.
    assert counts.total == without.total + 2 * biases + 2 * 8 * biases + 2 * 8
    assert counts.active == without.active + 2 * biases + 2 * biases + 2 * 8


def test_biases_positions_and_norms_of_gpt3_are_no_products():
    model = dataclasses.replace(
        SMALL,
        moe_every=0,
        positions="learned",
        max_positions=512,
        norm="layer",
        attention_biases=True,
        attention_output_bias=True,
        mlp_biases=True,
    )
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    plain = accounting.count(
        describe(dataclasses.replace(SMALL, moe_every=0), ROUTER), LENGTH
    )
    assert counts.forward_flops_per_token == plain.forward_flops_per_token
    assert counts.positions == 512 * 256
    # A second vector in each norm; four of attention's, 256 wide each; 1,024 and 256.
    biases = NORMS + 4 * 4 * 256 + 4 * (1024 + 256)
    assert counts.total == plain.total + counts.positions + biases
    assert counts.non_embedding == plain.non_embedding + biases
    assert plain.non_embedding == plain.total - EMBEDDING


def test_heads_that_share_keys_save_products_but_no_scores():
    model = dataclasses.replace(SMALL, moe_every=0, num_kv_heads=1)
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    plain = accounting.count(
        describe(dataclasses.replace(SMALL, moe_every=0), ROUTER), LENGTH
    )
    # Keys and values of one head instead of four, in each of four layers.
    saved = 4 * 2 * 256 * (4 - 1) * 64
    assert plain.total - counts.total == plain.products - counts.products == saved
    assert counts.scores == plain.scores == ATTENDING


def test_a_piece_longer_than_a_row_is_the_row():
    models = (
        dataclasses.replace(SMALL, moe_every=0, attention_chunks=chunks)
        for chunks in ((2 * LENGTH, 0), ())
    )
    one, plain = (accounting.count(describe(m, ROUTER), LENGTH) for m in models)
    assert one == plain


def test_pieces_that_do_not_see_one_another_save_scores():
    model = dataclasses.replace(
        SMALL, moe_every=0, attention_chunks=(48, 0), attention_output_gate=True
    )
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    plain = accounting.count(
        describe(dataclasses.replace(SMALL, moe_every=0), ROUTER), LENGTH
    )
    pieces = [48] * (LENGTH // 48) + [LENGTH % 48]
    assert pieces[-1] > 0
    pairs = sum(n * (n + 1) // 2 for n in pieces)
    half = plain.causal_scores // 2  # of the other two layers
    assert counts.causal_scores == half + 2 * 4 * 256 * pairs // LENGTH
    assert counts.scores == plain.scores // 2 + 2 * 4 * 256 * 48
    # A gate as large as the queries' projection in each of four layers.
    assert counts.products == plain.products + 4 * 256 * 256


@pytest.mark.parametrize(
    ("positions", "tables"), [("relative", 1), ("relative_per_layer", 4)]
)
def test_tables_of_distances_are_parameters_but_no_products(positions, tables):
    model = dataclasses.replace(SMALL, positions=positions, relative_buckets=32)
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    without = accounting.count(describe(SMALL, ROUTER), LENGTH)
    assert counts.total == without.total + tables * 32 * 4
    assert counts.forward_flops_per_token == without.forward_flops_per_token


def test_experts_unlike_the_dense_layers_are_counted_as_by_hand():
    model = dataclasses.replace(
        SMALL, activation="geglu", expert_activation="gelu", moe_position="first"
    )
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    shared = 4 * ATTENTION + 2 * 3 * 256 * 1024 + ROUTERS
    assert counts.total == EMBEDDING + NORMS + shared + 2 * 8 * TWO_MATRICES
    assert counts.expert_products == 2 * TWO_MATRICES, "one in each sparse layer"


def test_a_token_sees_half_of_a_sequence_on_average():
    counts = accounting.count(describe(SMALL, ROUTER), LENGTH)
    # 1 + 2 + ... + 256 pairs of 256 · 256.
    assert counts.causal_scores == ATTENDING * (257 * 128) // (256 * 256)
    whole, causal = (counts.model_flops_per_token(causal=c) for c in (False, True))
    assert whole == counts.forward_flops_per_token
    assert whole - causal == ATTENDING - counts.causal_scores


def test_a_token_of_a_window_sees_no_further():
    model = dataclasses.replace(SMALL, attention_windows=(64, 0))
    counts = accounting.count(describe(model, ROUTER), LENGTH)
    # Two of four layers: 64 of 256 keys; of a sequence 1 + 2 + ... + 64 pairs, and 64
    # for each of the 192 other tokens.
    assert counts.scores == ATTENDING // 2 + ATTENDING // 2 * 64 // 256
    in_window = (65 * 32 + 192 * 64) * 4 * 4 * 64 * 2 // 256
    whole = ATTENDING // 2 * (257 * 128) // (256 * 256)
    assert counts.causal_scores == whole + in_window


def test_what_is_executed_depends_on_padding_on_drops_and_on_remat():
    router = dataclasses.replace(ROUTER, num_selected=2)
    counts = accounting.count(describe(SMALL, router), LENGTH)
    assert (counts.chosen, counts.slots) == (2, 2.5)  # 2 · 1.25
    experts = 2 * counts.expert_products  # operations of one row in both layers
    others = counts.forward_flops_per_token - 2 * experts
    padded = counts.executed_flops_per_token(padded=True, dropped=0.25)
    assert padded == others + 2.5 * experts, "an empty slot is computed too"
    sorted_rows = counts.executed_flops_per_token(padded=False, dropped=0.25)
    assert sorted_rows == others + 1.5 * experts
    for recomputed, passes in ((False, 3), (True, 4)):
        step = counts.executed_train_flops_per_token(padded=True, recomputed=recomputed)
        assert step == passes * padded
    with pytest.raises(ValueError, match="from 0 to 1, not 25"):
        counts.executed_flops_per_token(padded=False, dropped=25)


def test_experts_that_choose_are_counted_by_what_a_token_meets_on_average():
    router = dataclasses.replace(
        ROUTER, family="expert_choice", num_selected=2, capacity_factor=1.0
    )
    counts = accounting.count(describe(SMALL, router), LENGTH)
    two = dataclasses.replace(ROUTER, num_selected=2, capacity_factor=1.0)
    assert counts == accounting.count(describe(SMALL, two), LENGTH)
    # 8 experts take 256 · 2 · 1.25 / 8 = 80 of 256 tokens: 2.5 experts for each.
    more = dataclasses.replace(router, capacity_factor=1.25)
    extra = accounting.count(describe(SMALL, more), LENGTH).active - counts.active
    assert extra == 2 * TWO_MATRICES // 2


def xla_flops_per_token(model: ModelSettings, router: RouterSettings) -> float:
    """What XLA counts in the forward pass of one period of a training step.

    Counted before compiling: a CPU backend may turn products into library calls, which
    XLA's count passes over. It counts the body of a loop once, so one period only.
    """
    B, L = 2, router.group_size
    execution = ExecutionSettings(
        transport="all_to_all",  # of fixed capacity: empty slots are executed
        dtype="float32",
        remat="none",
    )
    mesh = make_mesh(MESHES["d1"])
    described = build(model, router, execution, mesh)
    shapes = parameters.shapes(described.specs, "float32")
    names = ("decoder_input_tokens", "decoder_positions", "decoder_segment_ids")
    batch = {name: jax.ShapeDtypeStruct((B, L), jnp.int32) for name in names}
    run = jax.jit(functools.partial(forward, described))
    lowered = run.lower(shapes, batch, jnp.arange(B), jax.random.key(0))
    return lowered.cost_analysis()["flops"] / (B * L)


@pytest.mark.parametrize("capacity_factor", [None, 1.0, 2.0])
def test_xla_counts_the_same_operations(capacity_factor):
    # Wide enough for matrix products to be nearly all of the work.
    model = ModelSettings(
        vocab_size=512,
        num_layers=1,
        model_dim=128,
        num_heads=2,
        head_dim=64,
        mlp_dim=512,
        moe_every=0 if capacity_factor is None else 1,
        num_experts=8,
        expert_mlp_dim=512,
        activation="relu",
        tie_embeddings=capacity_factor is None,
    )
    router = RouterSettings(
        num_selected=2, group_size=64, capacity_factor=capacity_factor or 1.0
    )
    counts = accounting.count(describe(model, router), 64)
    measured = xla_flops_per_token(model, router)
    # XLA also counts norms, softmax and masks: 0.6 to 0.8 % here.
    assert 1.0 < measured / counts.executed_forward_flops_per_token < 1.02
    if capacity_factor == 2.0:
        assert capacity(router, 8, train=True) == 32
        assert measured > 1.5 * counts.forward_flops_per_token


def test_xla_counts_a_loop_once_and_we_count_all_of_it():
    """Three runs of a product and of four runs of another one in a loop of its own."""
    x_BM = jnp.zeros((16, 16))
    product = 2 * 16**3

    def inner(x_BM: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x_BM @ x_BM, None

    def outer(x_BM: jax.Array, _: None) -> tuple[jax.Array, None]:
        x_BM = x_BM @ x_BM
        return jax.lax.scan(inner, x_BM, length=4)[0], None

    def reported(function: Callable[[jax.Array], jax.Array]) -> float:
        return jax.jit(function).lower(x_BM).cost_analysis()["flops"]

    whole = reported(lambda x_BM: jax.lax.scan(outer, x_BM, length=3)[0] @ x_BM)
    of_outer = reported(lambda x_BM: outer(x_BM, None)[0])
    of_inner = reported(lambda x_BM: inner(x_BM, None)[0])
    assert whole == pytest.approx(3 * product, rel=0.01), "two loops and the last"
    loop = accounting.Loop(
        of_outer, trips=3, inner=(accounting.Loop(of_inner, trips=4),)
    )
    # 3 · (1 + 4) + 1 products.
    counted = accounting.compiled_flops(whole, [loop])
    assert counted == pytest.approx(16 * product, rel=0.01)


def test_a_number_that_xla_does_not_know_is_refused():
    with pytest.raises(ValueError, match="reports -1 operations"):
        accounting.compiled_flops(-1.0)
