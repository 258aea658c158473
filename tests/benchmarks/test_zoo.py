"""docs/zoo.md is what its command makes, and what papers say is ours or explained."""

import functools

import pytest

from benchmarks.ladder.rows import run_names
from benchmarks.zoo import page, taken
from benchmarks.zoo.published import PUBLISHED
from launch.config import reader
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import parse
from launch.planning.plan import Prices, make, to_json

SMALL = {"demo", "demo_span", "demo_bert", "demo_image", "tiny"}


@functools.cache
def rows() -> dict[str, page.Row]:
    return {row.name: row for row in page.rows()}


@pytest.mark.fast
def test_the_page_is_what_its_command_makes():
    made = page.page(list(rows().values()))
    assert page.FILE.read_text(encoding="utf-8") == made, "python -m benchmarks.zoo"


@pytest.mark.fast
def test_every_model_of_a_paper_is_in_the_zoo():
    assert set(run_names()) - SMALL == set(PUBLISHED)


@pytest.mark.fast
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters_are_ours_or_it_is_said_why_not(name):
    row = rows()[name]
    for difference, why in (
        (row.difference, row.published.why),
        (row.active_difference, row.published.why_active),
    ):
        differs = difference is not None and abs(difference) > page.MOST
        assert differs == bool(why), f"{name}: {difference}, {why!r}"


@pytest.mark.fast
@pytest.mark.parametrize("name", PUBLISHED)
def test_what_nobody_published_is_called_a_stand_in_on_its_first_page(name):
    path = page.FILE.parents[1] / "configs" / "models" / f"{name}.gin"
    header, _, _ = path.read_text(encoding="utf-8").partition("\n\n")
    words = " ".join(header.split())
    assert (PUBLISHED[name].sizes == "stand-in") == ("# Source: chosen" in words)
    assert (PUBLISHED[name].sizes == "inferred") == ("Source: inferred" in words)


@pytest.mark.fast
@pytest.mark.parametrize(
    "one", [one for one in taken.DAYS if one.published], ids=lambda one: one.what
)
def test_days_of_training_follow_from_parameters_and_tokens(one):
    digits = 4 if one.convention == "8ND" else 3
    assert float(f"{one.counted - 0.5 * (digits == 4):.{digits}g}") == one.published


# How far what went in, as it is rounded, may be from what a paper says came of it.
WITHIN = {"T5-11B": 0.5e-2, "GShard 600B": 1e-2, "GLaM, 600 billion tokens": 0.1e-2}


@pytest.mark.fast
@pytest.mark.parametrize("one", taken.ENERGY, ids=lambda one: one.what)
def test_energies_follow_from_chips_hours_and_power(one):
    within = WITHIN.get(one.what, 0.2e-2)
    assert one.counted == pytest.approx(one.published, rel=within)


@pytest.mark.fast
@pytest.mark.parametrize("name", taken.SEQUENCE_GFLOPS)
def test_sequences_take_the_operations_that_the_papers_count(name):
    flops = taken.sequence_flops(rows()[name].settings.layers)
    assert flops / 1e9 == pytest.approx(taken.SEQUENCE_GFLOPS[name], rel=0.01)


def test_operations_of_a_sequence_are_the_sum_that_can_be_done_by_hand():
    # T5 Base: 12 layers of 4 M² + 2 M F on the left, 8 M² + 2 M F on the right.
    M, F, V = 768, 3072, 32128
    left, right = 12 * (4 * M * M + 2 * M * F), 12 * (8 * M * M + 2 * M * F)
    products = 2 * (left * 512 + (right + V * M) * 114)
    scores = 12 * 2 * M * (512 * 512 + 114 * 114 + 114 * 512)
    found = taken.sequence_flops(rows()["t5_base"].settings.layers)
    assert found == products + scores


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_model_can_be_planned(name):
    """By arithmetic, on four chips that few of them fit."""
    topology = parse("v5p:2x2x1")
    config = reader.read([f"runs/{name}.gin"], ["MESH_DATA=4", "FSDP=data"])
    plan = make(moving.moved(config, topology), topology, Prices())
    assert plan.counts == rows()[name].counts
    assert plan.memory.total * 4 > 4 * plan.counts.total  # the parameters themselves
    assert to_json(plan)
