"""Bytes that a chip sends in a step, by hand."""

import pytest

from launch.config import reader
from launch.planning.compiler import hlo, hlo_text
from launch.planning.cost import estimate, local, traffic
from launch.run.assemble import assemble
from partitioning.settings import AXES

TINY = "runs/tiny.gin"  # V 384, L 64, M 32, N 2, D 16, F 64, E 4, K 1, batches of 8
BASE = (
    *("SIMULATED_DEVICES=16", "DTYPE='bfloat16'", "MIN_EXPERT_CAPACITY=1"),
    "TRANSPORT='all_to_all'",
)


def flows_of(*bindings):
    settings = reader.read([TINY], [*BASE, *bindings]).settings
    return {flow.purpose: flow for flow in traffic.flows(settings)}


@pytest.mark.fast
def test_one_chip_sends_nothing():
    assert flows_of() == {}


@pytest.mark.fast
def test_an_exchange_goes_there_and_back_forward_and_backward():
    flow = flows_of("MESH_EXPERT=4")["rows exchanged"]
    # 2 rows of 64 on each chip: 2 groups of 64 · 1.25 / 4 = 20 slots for 4 experts.
    assert flow.whole_bytes == 2 * 4 * 20 * 32 * 2
    assert flow.times == 4, "one sparse layer"
    assert flow.by_axis == {"expert": 4 * flow.whole_bytes * 3 / 4}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("bindings", "times"),
    [
        (("REMAT='none'",), 4),
        (("REMAT='minimal'",), 4),
        (("REMAT='full'",), 4 + 2),  # rows travel again before the backward pass
        (("REMAT='full'", "SPARSE_REMAT='minimal'"), 4),
        (("REMAT='minimal'", "MICROBATCHES=2"), 2 * (4 + 2)),
        (("REMAT='full'", "MICROBATCHES=2"), 2 * (4 + 2 + 2)),
    ],
)
def test_what_is_computed_again_is_sent_again(bindings, times):
    flow = flows_of("MESH_EXPERT=4", *bindings)["rows exchanged"]
    assert flow.times == times


@pytest.mark.fast
def test_whole_parameters_gradients_are_summed_once_whatever_the_microbatches():
    for number in (1, 2):
        flow = flows_of("MESH_DATA=4", f"MICROBATCHES={number}")["gradients summed"]
        assert flow.whole_bytes == 53_536 * 4  # all parameters, float32
        assert flow.by_axis["data"] == 2 * 53_536 * 4 * 3 / 4


@pytest.mark.fast
def test_fully_sharded_weights_are_gathered_twice_and_scattered_once():
    found = flows_of("MESH_DATA=4", "FSDP='data'")
    # Two layers of attention 4 · 32 · 32, a dense layer 2 · 32 · 64, four experts of
    # as much; the router 32 · 4 stays float32.
    matrices = 2 * 4096 + 5 * 4096
    gathered = found["weights gathered"]
    assert gathered.whole_bytes == matrices * 2 + 128 * 4
    assert gathered.times == 2
    scattered = found["gradients of weights scattered"]
    assert (scattered.whole_bytes, scattered.times) == ((matrices + 128) * 4, 1)
    head = found["output projection gathered"]
    assert (head.whole_bytes, head.times) == (32 * 384 * 2, 1)
    pieces = flows_of("MESH_DATA=4", "FSDP='data'", "VOCAB_CHUNKS=2")
    assert pieces["output projection gathered"].times == 2
    # The embedding is not gathered: tokens travel.
    exchanged = found["embeddings exchanged"]
    assert exchanged.whole_bytes == 2 * 64 * 32 * 2
    assert exchanged.times == 2
    # What is left of whole parameters: five norms of 32.
    assert found["gradients summed"].whole_bytes == 5 * 32 * 4


@pytest.mark.fast
def test_microbatches_gather_weights_three_times_each():
    once, twice = (
        flows_of("MESH_DATA=4", "FSDP='data'", f"MICROBATCHES={number}")
        for number in (1, 2)
    )
    assert twice["weights gathered"].times == 2 * 3
    assert twice["gradients of weights scattered"].times == 2
    assert twice["weights gathered"].whole_bytes == once["weights gathered"].whole_bytes


@pytest.mark.fast
def test_over_slices_travels_only_what_the_other_axes_leave():
    found = flows_of("MESH_REPLICA=2", "MESH_DATA=4")
    flow = found["gradients summed"]
    whole = 2 * 53_536 * 4
    assert flow.by_axis == {"data": whole * 3 / 4, "replica": whole / 4 * 1 / 2}
    assert flow.sent_bytes == whole * 7 / 8
    # Fully sharded, the slices share the sums of a chip's own part.
    sharded = flows_of("MESH_REPLICA=2", "MESH_DATA=4", "FSDP='data'")
    # Attention, five feed-forwards, two tables and a router, on 4 chips.
    own = (2 * 4096 + 5 * 4096 + 2 * 32 * 384 + 128) // 4
    assert sharded["gradients of replicas"].whole_bytes == own * 4
    assert set(sharded["gradients of replicas"].by_axis) == {"replica"}


@pytest.mark.fast
def test_products_cut_over_model_gather_and_scatter_pieces_of_sequences():
    found = flows_of("MESH_MODEL=2", "GROUP_SIZE=32", "REMAT='none'")
    stream = 8 * 64 * 32 * 2  # all tokens · M · 2 bytes
    for name in ("attention of dense layers", "feed-forward of dense layers"):
        assert found[name].whole_bytes == stream
        assert found[name].times == 4, "a gather and a scatter, and their transposes"
    assert found["activations for logits"].times == 2
    assert found["embeddings over the vocabulary"].times == 2
    # Experts are cut too: 8 groups of 10 slots for 4 experts on each chip, of 2 chips.
    rows = found["rows of experts cut over model"]
    assert rows.whole_bytes == 2 * (8 * 4 * 10) * 32 * 2
    assert rows.times == 4
    again = flows_of("MESH_MODEL=2", "GROUP_SIZE=32", "REMAT='minimal'")
    assert again["attention of sparse layers"].times == 6
    assert again["feed-forward of dense layers"].times == 5, "its last sum is not used"


@pytest.mark.fast
def test_whole_sequences_over_model_cost_the_same_bytes():
    cut, whole = (
        flows_of(
            *("MESH_MODEL=2", "GROUP_SIZE=32", "REMAT='none'"),
            f"SEQUENCE_PARALLEL={cut}",
        )
        for cut in (True, False)
    )
    name = "attention of dense layers"
    assert cut[name].sent_bytes == whole[name].sent_bytes
    assert "pieces of sparse layers joined" in whole
    assert "pieces of sparse layers joined" not in cut


@pytest.mark.fast
@pytest.mark.parametrize(("kind", "times"), [("all_gather", 3), ("ring", 4)])
def test_keys_and_values_travel_over_context(kind, times):
    found = flows_of(
        *("MESH_CONTEXT=2", "GROUP_SIZE=32", "REMAT='minimal'"),
        f"CONTEXT_ATTENTION={kind!r}",
    )
    flow = found["keys and values of dense layers"]
    # Keys and values of 8 sequences of 64, 2 heads of 16: gathered, half of it is here.
    assert flow.whole_bytes == 2 * 8 * 64 * 32 * 2
    # Forward, again, and backward; the steps of a ring once more.
    assert flow.times == times
    assert flow.by_axis == {"context": times * flow.whole_bytes / 2}


@pytest.mark.fast
def test_a_ring_of_experts_gathers_all_tokens_and_a_ragged_exchange_only_choices():
    ring = flows_of("MESH_EXPERT=4", "TRANSPORT='ring'", "TRAIN_CAPACITY_FACTOR=0.0")
    # 4 chips' 2 rows of 64 tokens.
    assert ring["tokens gathered"].whole_bytes == 4 * 128 * 32 * 2
    assert ring["tokens gathered"].times == 4
    assert ring["maps gathered"].whole_bytes == 4 * 128 * 8
    again = flows_of(
        *("MESH_EXPERT=4", "TRANSPORT='ring'", "TRAIN_CAPACITY_FACTOR=0.0"),
        "REMAT='full'",
    )
    assert again["tokens gathered"].times == 5, "sums are not used again"
    ragged = flows_of(
        "MESH_EXPERT=4", "TRANSPORT='ragged'", "TRAIN_CAPACITY_FACTOR=0.0"
    )
    assert ragged["rows exchanged"].whole_bytes == 128 * 32 * 2
    assert ragged["sizes gathered"].sent_bytes < 100


@pytest.mark.fast
def test_axes_add_up_to_all_that_is_sent():
    settings = reader.read(
        [TINY],
        [
            *BASE,
            *("MESH_REPLICA=2", "MESH_DATA=2", "MESH_EXPERT=2", "MESH_MODEL=2"),
            *("FSDP='data_expert'", "GROUP_SIZE=32"),
        ],
    ).settings
    flows = traffic.flows(settings)
    total = traffic.by_axis(flows)
    assert set(total) == {"replica", "data", "expert", "model"}
    sent = sum(sum(patterns.values()) for patterns in total.values())
    assert sent == pytest.approx(sum(flow.sent_bytes for flow in flows))
    assert all(flow.formula for flow in flows)
    assert local.local(settings, "tpu").rows == 1


# With two periods of layers, so that the loop over them stays one.
# Logits in two pieces, whose weights every compiler gathers forward and backward.
@pytest.mark.parametrize(
    "bindings",
    [
        # Dense weights are gathered over two axes that move 1/8 and 3/4 of them.
        "MESH_DATA=2 MESH_EXPERT=4 FSDP='data_expert' REMAT='full'",
        pytest.param(
            "MESH_DATA=2 MESH_EXPERT=2 MESH_MODEL=2 FSDP='data' REMAT='full'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "MESH_DATA=2 MESH_CONTEXT=2 MESH_MODEL=2 FSDP='data' "
            "EXPERT_TENSOR_PARALLEL=False",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "MESH_CONTEXT=2 MESH_EXPERT=2 CONTEXT_ATTENTION='ring' REMAT='minimal'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_step_sends_what_the_arithmetic_says(bindings):
    config = reader.read(
        [TINY],
        [
            *BASE,
            *("SIMULATED_DEVICES=8", "NUM_LAYERS=4", "GROUP_SIZE=16"),
            *("DTYPE='float32'", "VOCAB_CHUNKS=2", *bindings.split()),
        ],
    )
    mesh = config.settings.mesh
    text = assemble(config).lower_train_step().compile().as_text()
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    compiled = estimate.compiled_traffic(
        config.settings, hlo.collectives(hlo_text.Module(text), sizes)
    )
    told = traffic.by_axis(traffic.flows(config.settings, "cpu"))
    # Beside it there are router statistics and single numbers: a few hundred bytes.
    large = {axis for axis, size in sizes.items() if size > 1}
    assert set(told) == set(compiled) == large
    for axis, patterns in compiled.items():
        assert told[axis] == pytest.approx(patterns, rel=0.005, abs=400), axis


@pytest.mark.fast
def test_muon_exchanges_pieces_of_matrices_there_and_back():
    assert "matrices made whole" not in flows_of("MESH_DATA=4", "OPTIMIZER='muon'")
    sharded = ("MESH_DATA=4", "FSDP='optimizer'")
    assert "matrices made whole" not in flows_of(*sharded)
    flow = flows_of(*sharded, "OPTIMIZER='muon'")["matrices made whole"]
    # Two layers of four projections 32 · 32 and a dense layer of two 32 · 64, each of
    # one matrix in its array, which is padded to four; 4 experts of two 32 · 64.
    assert flow.whole_bytes == (8 * 4 * 32 * 32 + (2 * 4 + 2 * 4) * 32 * 64) // 4 * 4
    assert flow.times == 2
    assert flow.by_axis == {"data": 2 * flow.whole_bytes * 3 / 4}
