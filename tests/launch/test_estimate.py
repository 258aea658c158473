"""The roofline, by hand on a chip of round numbers."""

import dataclasses
import math

import pytest

from launch.config import reader
from launch.planning.cost import estimate, sensitivity, work
from launch.planning.cost.estimate import Estimate, Figure, PartTime
from launch.planning.hardware import topologies
from launch.planning.hardware.chips import CHIPS
from moe.accounting import count

TINY = "runs/tiny.gin"


def settings_of(*bindings, name=TINY):
    devices = ("SIMULATED_DEVICES=16",) if name == TINY else ()
    return reader.read([name], [*devices, *bindings]).settings


LATENT = (
    *("ATTENTION='latent'", "KV_LATENT_DIM=24", "ROPE_HEAD_DIM=6"),
    *("QUERY_LATENT_DIM=40", "VALUE_HEAD_DIM=10"),
)


@pytest.mark.fast
@pytest.mark.parametrize(
    "bindings",
    [
        (),
        ("MOE_EVERY=0",),
        ("ACTIVATION='swiglu'", "SHARED_EXPERT_MLP_DIM=32", "NUM_SELECTED_EXPERTS=2"),
        ("MESH_DATA=2", "MESH_EXPERT=2", "MESH_MODEL=2", "GROUP_SIZE=32"),
        ("MICROBATCHES=4", "REMAT='full'"),
        (
            *("NUM_LAYERS=4", "LAYER_SHARING='all'", "EXTRA_MLP='after'"),
            *("SHARED_EXPERT_MLP_DIM=32", "SHARED_EXPERT_GATE=True", "MESH_DATA=2"),
        ),
        ("MESH_CONTEXT=2", "GROUP_SIZE=32", "ATTENTION_BLOCK=16"),
        LATENT,
        (*LATENT, "MESH_DATA=2", "MESH_MODEL=2", "GROUP_SIZE=32"),
        (*LATENT, "QUERY_LATENT_DIM=0", "PREDICT_AHEAD=2", "MICROBATCHES=2"),
    ],
)
def test_the_parts_of_all_chips_are_the_operations_of_the_model(bindings):
    settings = settings_of(*bindings)
    parts = work.parts(settings, "tpu")
    tokens = settings.train.batch_size * settings.data.length
    counts = count(settings.layers, settings.data.length, settings.data.encoder_length)
    forward = sum(part.model_flops for part in parts) * settings.mesh.num_devices
    expected = counts.forward_flops_per_token + counts.ahead_flops
    assert forward == pytest.approx(expected * tokens)


@pytest.mark.fast
def test_work_is_three_forward_passes_and_what_is_computed_again():
    def of(name, *bindings):
        parts = work.parts(settings_of("ROUTER_DTYPE='bfloat16'", *bindings), "tpu")
        return next(part for part in parts if part.name == name)

    plain = of("attention projections", "REMAT='none'")
    assert plain.flops == 3 * plain.model_flops
    full = of("attention projections", "REMAT='full'")
    assert full.flops == 4 * full.model_flops
    both = of("attention projections", "REMAT='full'", "MICROBATCHES=2")
    assert both.flops == 5 * both.model_flops
    # A dense layer's second product is not computed again: half of its work.
    assert of("feed-forward", "REMAT='full'").flops == pytest.approx(
        3.5 * of("feed-forward").model_flops
    )
    # Capacity 1.25 of 64 tokens and 4 experts: 20 slots each, 80 rows for 64 tokens.
    padded = of("experts", "REMAT='none'", "TRANSPORT='all_to_all'")
    assert padded.flops == pytest.approx(3 * 1.25 * padded.model_flops)
    # Blocks of 16 of 64: 1 + 2 + 3 + 4 of 16 blocks, and once more for the way back.
    blocked = of("attention scores", "REMAT='none'", "ATTENTION_BLOCK=16")
    assert blocked.flops == pytest.approx(4 * 10 / 16 * blocked.model_flops)
    # In windows of 17 places a block sees itself and the one before: 1 + 2 + 2 + 2.
    window = ("ATTENTION_BLOCK=16", "ATTENTION_WINDOWS=(17,)")
    near = of("attention scores", "REMAT='none'", *window)
    assert near.flops == pytest.approx(7 / 10 * blocked.flops)
    assert near.model_flops == 17 / 64 * blocked.model_flops


@pytest.mark.fast
def test_muon_multiplies_every_matrix_with_itself_once_in_the_devices_that_share_it():
    def flops(*bindings):
        parts = work.parts(settings_of("OPTIMIZER='muon'", *bindings), "tpu")
        return next(part for part in parts if part.name == "optimizer").flops

    # 2 · 4 projections 32 × 32, and 5 · 2 matrices of 32 and 64: 4·m²·n + 2·m³ each.
    cube = 32**3
    whole = 5 * (8 * 6 * cube + 10 * (8 + 2) * cube)
    assert flops() == flops("MESH_DATA=4") == whole
    assert flops("MUON_STEPS=10") == 2 * whole
    # An array of one matrix gives it to one of four; of four experts each has one.
    shared = 5 * (8 * 6 * cube + (2 + 2) * 10 * cube)
    assert flops("MESH_DATA=4", "FSDP='optimizer'") == shared


@pytest.mark.fast
def test_a_part_is_bound_by_arithmetic_or_by_memory_and_a_step_by_its_slowest_link():
    found = Estimate(
        parts=(PartTime("products", 3.0, 1.0), PartTime("norms", 0.0, 0.5)),
        peak_seconds=2.0,
        network={"data": 1.0, "expert": 5.0},
        network_source="estimated",
        tokens=1000,
        model_flops=2000.0,
        num_devices=10,
        peak_flops=100.0,
        steps=86400,
        watts=200.0,
    )
    assert found.device_seconds == 3.5
    assert found.overlapped_seconds == 5.0
    assert found.serial_seconds == 9.5
    assert found.bound_by == "expert"
    alone = dataclasses.replace(found, network={})
    assert alone.overlapped_seconds == alone.serial_seconds == 3.5
    assert alone.bound_by == "compute"


@pytest.mark.fast
def test_days_energy_emissions_and_cost_follow_from_the_length_of_a_step():
    found = Estimate(
        parts=(),
        peak_seconds=0.0,
        network={},
        network_source="estimated",
        tokens=1000,
        model_flops=2000.0,
        num_devices=10,
        peak_flops=100.0,
        steps=43200,
        watts=200.0,
    )
    told = estimate.outcome(
        found,
        Figure(4.0, "s", "measured"),
        pue=1.1,
        tonnes_per_mwh=0.4,
        price_per_chip_hour=2.0,
        devices_per_chip=2,
    )
    assert told["tokens_per_second"] == Figure(250.0, "tokens/s", "measured")
    # 2,000 operations in 4 s of 10 · 100.
    assert told["model_flops_utilization"] == Figure(0.5, "", "measured")
    assert told["days"] == Figure(2.0, "days", "measured")
    # 48 hours of 5 chips.
    assert told["chip_hours"].value == 240
    # 48 h · 10 · 200 W · 1.1 = 105.6 kWh: watts are not measured.
    assert told["energy"].value == pytest.approx(0.1056)
    assert told["energy"].source == "estimated"
    assert told["emissions"].value == pytest.approx(0.1056 * 0.4)
    assert told["cost"].value == 480
    assert "cost" not in estimate.outcome(found, Figure(4.0, "s"))


@pytest.mark.fast
def test_the_peak_is_a_bound_that_no_estimate_passes():
    settings = settings_of("MESH_DATA=2", "MESH_EXPERT=4", "DTYPE='bfloat16'")
    topology = topologies.parse("v5e:2x4")
    half = estimate.estimate(settings, topology, attainable=0.5)
    whole = estimate.estimate(settings, topology, attainable=1.0)
    assert half.compute_seconds == pytest.approx(2 * whole.compute_seconds)
    assert whole.peak_seconds <= whole.compute_seconds
    assert whole.peak_seconds <= whole.overlapped_seconds <= whole.serial_seconds
    flops = count(settings.layers, 64).train_flops_per_token * 8 * 64
    assert whole.peak_seconds == flops / (8 * CHIPS["v5e"].peak_flops)
    assert set(whole.network) == {"data", "expert"}
    for bound in ("overlapped", "serial"):
        assert whole.seconds(bound).source == "estimated"


@dataclasses.dataclass
class Compiled:
    kind: str
    axes: tuple[str, ...]
    bytes: float


@pytest.mark.fast
def test_bytes_of_a_compiled_step_take_the_place_of_the_arithmetic():
    settings = settings_of("MESH_DATA=2", "MESH_EXPERT=4")
    topology = topologies.parse("v5e:2x4")
    rates = topologies.axis_bandwidth(topology, settings.mesh, "ring")
    exchange = topologies.axis_bandwidth(topology, settings.mesh, "all_to_all")
    found = estimate.estimate(
        settings,
        topology,
        collectives=[
            Compiled("all-to-all", ("expert",), 1e9),
            # 7/8 of what is sent is 1/2 over one axis, 3/4 of a half over the other.
            Compiled("all-reduce", ("data", "expert"), 7e9),
        ],
    )
    assert found.network_source == "compiled"
    assert found.network["expert"] == pytest.approx(
        1e9 / exchange["expert"] + 6e9 / rates["expert"]
    )
    assert found.network["data"] == pytest.approx(1e9 / rates["data"])


@pytest.mark.fast
def test_an_uneven_load_costs_time_without_capacity_and_tokens_with_it():
    bindings = ("MESH_EXPERT=4", "BATCH_SIZE=64")
    topology = topologies.parse("v5e:2x2")
    capped = sensitivity.imbalance(
        settings_of(*bindings, "TRANSPORT='all_to_all'"), topology
    )
    assert [case.load for case in capped] == [1.0, 1.2, 1.5, 2.0]
    assert len({case.estimate.serial_seconds for case in capped}) == 1
    # 20 slots for 16, 19.2, 24 and 32 choices of each expert.
    assert [case.dropped for case in capped] == pytest.approx([0, 0, 4 / 24, 12 / 32])
    free = sensitivity.imbalance(
        settings_of(*bindings, "TRANSPORT='ragged'", "TRAIN_CAPACITY_FACTOR=0.0"),
        topology,
    )
    seconds = [case.estimate.serial_seconds for case in free]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]
    assert all(case.dropped == 0 for case in free)


@pytest.mark.fast
def test_more_capacity_costs_time_and_drops_less():
    settings = settings_of("MESH_EXPERT=4", "TRANSPORT='all_to_all'")
    cases = sensitivity.capacities(settings, topologies.parse("v5e:2x2"), load=1.5)
    seconds = [case.estimate.serial_seconds for case in cases]
    assert seconds == sorted(seconds)
    assert len(set(seconds)) == 3
    # 16, 20 and 32 slots for 24 choices.
    dropped = [case.dropped for case in cases]
    assert dropped == pytest.approx([8 / 24, 4 / 24, 0])


@pytest.mark.fast
def test_a_trillion_parameters_on_480_v100_by_the_roofline():
    settings = settings_of("MESH_EXPERT=480", name="runs/m6_t_1t.gin")
    topology = topologies.parse("v100-32g:480")
    found = estimate.estimate(settings, topology, attainable=1.0)
    tokens = 3840 * 512
    # A token meets in each layer four projections, a router and two experts, and then
    # the logits: 2.235e9 parameters of matrices, 6 operations each.
    layer = 4 * 1024 * 1024 + 1024 * 960 + 2 * 2 * 1024 * 21248
    matrices = 24 * layer + 21128 * 1024
    model_flops = (6 * matrices + 12 * 24 * 1024 * 512) * tokens
    assert found.peak_seconds == pytest.approx(model_flops / (480 * 125e12))
    # Each GPU sends a row of 2 KB for each of 1,920 slots per row of 512 tokens, 8
    # rows, 4 times in 24 layers: 3.0 GB in a step.
    rows = 8 * 1920 * 2048 * 4 * 24 * 479 / 480
    rates = topologies.axis_bandwidth(topology, settings.mesh, "all_to_all")
    assert found.network["expert"] > rows / rates["expert"]
    assert math.isfinite(found.serial_seconds)
    assert found.peak_seconds < found.overlapped_seconds < found.serial_seconds
