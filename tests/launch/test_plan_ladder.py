"""The ladder: attempts until something fits, results that are kept, and its page."""

import dataclasses

import pytest

from benchmarks.ladder import compile as ladder
from benchmarks.ladder import page as ladder_page
from benchmarks.ladder import rows as kept
from launch.config import reader
from launch.planning import search
from launch.planning.compiler.compile import compile_step, find_compiler
from launch.planning.compiler.hlo import Buffer, Collective
from launch.planning.compiler.records import Compiled, Evaluation, Failure
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import parse

GIB = 2**30
FITS = Compiled(
    topology="v5e:2x2",
    compiler="jax, libtpu",
    lowering_seconds=1.0,
    compiling_seconds=2.0,
    peak_host_bytes=GIB,
    argument_bytes=8 * GIB,
    output_bytes=8 * GIB,
    alias_bytes=8 * GIB,
    temp_bytes=4 * GIB,
    code_bytes=0,
    total_bytes=12 * GIB,
    host_bytes=0,
    memory_bytes=int(15.75 * GIB),
    fits=True,
    product_flops=1e15,
    reported_flops=1e12,
    reported_seconds=None,
    collectives=(Collective("all-gather", ("data",), GIB, 4, True, "moe/a.py:1"),),
    largest_buffers=(Buffer(GIB, "f32[1]", "moe/b.py:2", "dot_general"),),
)
TOO_LARGE = dataclasses.replace(FITS, fits=False, total_bytes=20 * GIB)
EVALUATION = Evaluation(
    transport="",
    lowering_seconds=1.0,
    compiling_seconds=4.0,
    argument_bytes=4 * GIB,
    temp_bytes=5 * GIB,
    kept_bytes=4 * GIB,
    total_bytes=13 * GIB,
)
BOTH_FIT = dataclasses.replace(FITS, evaluation=EVALUATION)
REFUSED = Failure("rejected", "not supported", "try another mesh", seconds=3.0)
SLOW = Failure("timed_out", "no answer within 600 s", "raise the limit")


def answers(monkeypatch, *results):
    """Answers in this order; returns what was asked."""
    asked, left = [], list(results)

    def compile_step(config, topology, **limits):
        asked.append((config, topology))
        return left.pop(0)

    monkeypatch.setattr(ladder, "compile_step", compile_step)
    return asked


def climb(name="gpt3_1_3b"):
    return ladder.climb(name, 1_315_575_808, time_limit_s=1, memory_gib=1)


def test_every_run_above_a_billion_has_a_row_and_a_chip():
    names = [name for name, _ in kept.rows()]
    assert {"glam_64b_64e", "switch_c_decoder", "m6_10t", "gpt3_1_3b"} <= set(names)
    assert not {"demo", "tiny", "glam_base", "gpt3_760m"} & set(names)
    assert kept.chip_of("glam_64b_64e") == "v4"
    assert kept.chip_of("gpt3_1_3b") == "v5e"
    assert kept.chip_of("gpt3_13b") == "v5p"
    assert [str(s) for s in kept.slices_of("glam_64b_64e")] == ["v4:8x8x16"]
    assert all(kept.slices_of(name) for name in names)


def test_what_is_too_large_or_refused_is_followed_by_another_mesh(monkeypatch):
    asked = answers(monkeypatch, TOO_LARGE, REFUSED, FITS)
    row = climb()
    assert [attempt.kind for attempt in row.attempts] == [
        "too_large",
        "rejected",
        "fits",
    ]
    assert row.compiled == FITS
    assert len({config for config, _ in asked}) == 3
    assert row.attempts[0].needed_bytes == 20 * GIB
    assert "moe/b.py:2" in row.attempts[0].largest[0]


def test_on_its_slice_a_row_first_tries_what_fitted_before(monkeypatch):
    monkeypatch.setattr(ladder, "load", lambda name: None)
    answers(monkeypatch, FITS)
    best = climb()
    (first,) = best.attempts
    other = dataclasses.replace(first, knobs=dict(first.knobs) | {"REMAT": "none"})
    known = dataclasses.replace(best, attempts=(other,))
    monkeypatch.setattr(ladder, "load", lambda name: known)
    answers(monkeypatch, TOO_LARGE, FITS)
    assert [attempt.knobs for attempt in climb().attempts] == [other.knobs, first.knobs]
    monkeypatch.setattr(ladder, "load", lambda name: best)
    answers(monkeypatch, TOO_LARGE, FITS)
    assert climb().attempts[1].knobs != first.knobs  # nothing is tried twice


def test_evaluation_must_fit_too(monkeypatch):
    most = dataclasses.replace(EVALUATION, total_bytes=17 * GIB)
    too_large = dataclasses.replace(FITS, fits=False, evaluation=most)
    refused = dataclasses.replace(FITS, fits=False, evaluation=REFUSED)
    answers(monkeypatch, too_large, refused, BOTH_FIT)
    row = climb()
    assert [attempt.kind for attempt in row.attempts] == [
        "too_large",
        "rejected",
        "fits",
    ]
    assert [attempt.needed_bytes for attempt in row.attempts] == [
        17 * GIB,
        12 * GIB,
        13 * GIB,
    ]
    assert row.attempts[1].message == "evaluation: not supported"
    # 1 + 2 s for the step; 1 + 4 s for evaluation, or 3 s until it failed.
    assert [attempt.seconds for attempt in row.attempts] == [8, 6, 8]
    assert row.compiled == BOTH_FIT


def test_an_answer_that_does_not_come_ends_the_row(monkeypatch):
    answers(monkeypatch, SLOW)
    row = climb()
    assert [attempt.kind for attempt in row.attempts] == ["timed_out"]
    assert row.compiled is None
    answers(monkeypatch, dataclasses.replace(FITS, fits=False, evaluation=SLOW))
    assert [attempt.kind for attempt in climb().attempts] == ["timed_out"]


def test_rows_are_kept_read_again_and_shown(monkeypatch, tmp_path):
    answers(monkeypatch, TOO_LARGE, FITS)
    row = climb()
    kept.save(row, tmp_path)
    assert kept.load(row.name, tmp_path) == row
    assert kept.load("another", tmp_path) is None
    page = ladder_page.page([row])
    assert "| `gpt3_1_3b` | 1.32B | " in page
    config, plan = kept.planned(row)
    assert f"| {plan.total / GIB:.2f} | 12.00 |" in page
    assert f"{100 * (plan.total / (12 * GIB) - 1):+.0f} %" in page
    assert config.settings.mesh.num_devices == row.topology.num_devices
    assert "too large | 20.00" in page
    assert "| not compiled | 15.75 |" in page
    assert "Where evaluation was not compiled, the total is the train step's" in page


def test_a_row_shows_evaluation_and_the_larger_of_both(monkeypatch, tmp_path):
    answers(monkeypatch, BOTH_FIT)
    row = climb()
    kept.save(row, tmp_path)
    assert kept.load(row.name, tmp_path) == row
    page = ladder_page.page([row])
    _, plan = kept.planned(row)
    error = f"{100 * (plan.total / (13 * GIB) - 1):+.0f} %"
    assert f"| {plan.total / GIB:.2f} | 13.00 | {error} | 13.00 | 15.75 |" in page
    assert "Where evaluation was not compiled" not in page


def test_a_row_whose_mesh_no_longer_divides_is_not_predicted(monkeypatch):
    answers(monkeypatch, BOTH_FIT)
    row = climb()
    changed = {**row.attempts[-1].knobs, "MICROBATCHES": 7}
    attempt = dataclasses.replace(row.attempts[-1], knobs=changed)
    page = ladder_page.page([dataclasses.replace(row, attempts=(attempt,))])
    assert (
        "no longer divides over that mesh, and in no table above: `gpt3_1_3b`" in page
    )
    assert "## Memory" not in page
    assert "| `gpt3_1_3b` | v5e:2x2 | fits | 13.00 |" in page


def test_rows_of_an_earlier_version_are_read_and_shown():
    rows = [row for name in kept.run_names() if (row := kept.load(name))]
    assert len(rows) >= 8
    page = ladder_page.page(rows)
    for row in rows:
        assert f"| `{row.name}` | {row.topology} | fits | " in page
        assert row.compiled is not None
        if row.compiled.evaluation is None:
            assert row.compiled.most_bytes == row.compiled.total_bytes


def test_unchanged_rows_are_not_compiled_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kept, "FOLDER", tmp_path)
    monkeypatch.setattr(
        ladder,
        "load",
        lambda name, folder=tmp_path, read=kept.load: read(name, folder),
    )
    monkeypatch.setattr(
        ladder,
        "save",
        lambda row, folder=tmp_path, write=kept.save: write(row, folder),
    )
    monkeypatch.setattr(ladder_page, "write", lambda: None)
    asked = answers(monkeypatch, FITS, FITS)
    assert ladder.main(["--only", "gpt3_1_3b"]) == 0
    assert ladder.main(["--only", "gpt3_1_3b"]) == 0
    assert len(asked) == 1
    assert "gpt3_1_3b: unchanged" in capsys.readouterr().out
    assert ladder.main(["--only", "gpt3_1_3b", "--force"]) == 0
    assert len(asked) == 2


def test_a_fingerprint_follows_every_knob():
    one = reader.read(["runs/tiny.gin"])
    other = reader.read(["runs/tiny.gin"], ["NUM_LAYERS=4"])
    assert kept.fingerprint(one) == kept.fingerprint(one)
    assert kept.fingerprint(one) != kept.fingerprint(other)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_compiler() is None, reason="no TPU compiler")
@pytest.mark.parametrize("place", range(3))
def test_the_three_smallest_rows_compile_again_to_what_is_recorded(place):
    known = [row for name, _ in kept.rows() if (row := kept.load(name))]
    known = [row for row in known if row.compiled][:3]
    if place >= len(known):
        pytest.skip(f"the ladder has {len(known)} rows")
    row = known[place]
    config, plan = kept.planned(row)
    found = compile_step(config.operative, row.topology, time_limit_s=1700)
    assert isinstance(found, Compiled), found
    assert found.fits
    assert found.argument_bytes == pytest.approx(plan.arguments, rel=0.01)
    # What compilers make of the same program does not depend on the machine.
    assert found.total_bytes == pytest.approx(row.compiled.total_bytes, rel=0.05)


def test_what_a_row_changes_is_read_with_it():
    settings = kept.read("m6_t_1t").settings
    assert settings.train.batch_size == 4096
    moved = moving.moved(kept.read("m6_t_1t"), parse("v4:8x8x16"))
    assert search.least_bytes(moved.settings, parse("v4:8x8x16")) < 30 * GIB
