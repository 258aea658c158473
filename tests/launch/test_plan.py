"""`switchyard plan`: what it prints, and how each thing that cannot be planned ends."""

import dataclasses
import json

import pytest

from launch import cli
from launch.planning import answer
from launch.planning.compiler import compile as planned_compile
from launch.planning.compiler.hlo import Buffer, Collective
from launch.planning.compiler.records import (
    Compiled,
    Evaluation,
    Failure,
    from_json,
    to_json,
)

GLAM = "--gin_file=runs/glam_64b_64e.gin"
TINY = "--gin_file=runs/tiny.gin"
ON_V4 = ("--topology=v4:8x8x16", "--mesh=data=16,expert=64", "--gin.FSDP=data_expert")
ON_V5E = ("--topology=v5e:2x4", "--mesh=data=2,expert=4")
SMALL = ("--gin.MIN_EXPERT_CAPACITY=1", "--gin.TRAIN_CAPACITY_FACTOR=1")


def planned(capsys, *words):
    code = cli.main(["plan", "--quiet", *words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_trillion_parameters_are_planned_by_arithmetic(capsys, tmp_path):
    written = tmp_path / "plan.json"
    remat = ("--gin.REMAT=full", "--gin.VOCAB_CHUNKS=10", "--gin.ATTENTION_BLOCK=512")
    prices = ("--tonnes_per_mwh=0.5", "--price=2", "--pue=1.2")
    code, out, err = planned(capsys, GLAM, *ON_V4, *remat, *prices, f"--json={written}")
    assert code == 0, err
    assert "1,161,756,418,048" in out
    assert "data 16 × expert 64" in out
    found = json.loads(written.read_text())
    assert found["fits"]
    assert found["counts"]["total"] == 1_161_756_418_048
    for figures in found["outcomes"].values():
        # Everything that is said of the run follows from the step.
        step, days = figures["step_seconds"]["value"], figures["days"]["value"]
        assert days == pytest.approx(step * 572_205 / 86_400)
        hours = figures["chip_hours"]["value"]
        assert hours == pytest.approx(days * 24 * 1_024)
        energy = figures["energy"]["value"]
        assert energy == pytest.approx(hours * 170 * 1.2 / 1e6)  # 170 W of a v4
        assert figures["emissions"]["value"] == pytest.approx(energy * 0.5)
        assert figures["cost"]["value"] == pytest.approx(hours * 2)
        assert {figure["source"] for figure in figures.values()} == {"estimated"}
    flops = found["counts"]["flops_per_token"]
    assert flops["executed"] > flops["model"]
    assert flops["compiled"] is None
    # 6 per active parameter and token, in days of 10^15 a second.
    by_hand = 6 * 96_604_528_640 * 600_000_430_080 / 1e15 / 86_400
    assert found["counts"]["pf_days"]["6ND"] == pytest.approx(by_hand)


def test_few_slots_are_warned_of(capsys):
    code, out, _ = planned(capsys, TINY, *ON_V5E, "--gin.NUM_EXPERTS=32", *SMALL)
    assert code == 0
    assert "warning: 2 per expert and group" in " ".join(out.split())


def test_a_page_refers_to_nothing_and_has_both_figures(capsys, tmp_path):
    page = tmp_path / "plan.html"
    code, _, err = planned(capsys, TINY, *ON_V5E, f"--html={page}")
    assert code == 0, err
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "usable 15.75" in text
    for outside in ("http://", "https://", "<script", "@import"):
        assert outside not in text.replace("http://www.w3.org", "")


# ------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--topology=v4:8x8x15",), "nearest: v4:8x8x8, v4:8x8x16, v4:8x16x16"),
        (("--topology=v44:8x8x16",), "unknown chip 'v44'"),
        (
            ("--topology=v4:8x8x16", "--mesh=data=16"),
            "has 16 devices and v4:8x8x16 has 1,024: set MESH_DATA to 1024",
        ),
        (
            ("--topology=v4:8x8x16", "--mesh=dta=16"),
            "'dta' is not an axis of the mesh; nearest: data",
        ),
        (
            ("--topology=v4:2x2x1",),
            "can never fit v4:2x2x1: state and gradients alone, cut over all 4 "
            "devices, take ",
        ),
        # 1.16e12 × 8 bytes, over 282 of 30.75 GiB each.
        (("--topology=v4:2x2x1",), "v4:8x8x8 is the smallest that could"),
        (("--topology=h100:64", "--compile"), "h100:64 has GPUs"),
        (("--topology=v4:8x8x16", "--mesh=data=2", "--search"), "give one of them"),
        (("--topology=v4:8x8x16", "--output=x.gin"), "add --search"),
        (("--topology=v4:8x8x16", "--pue=0"), "--pue = 0: must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_message(capsys, words, said):
    code, _, err = planned(capsys, GLAM, *words)
    assert code == 1
    assert "Traceback" not in err
    assert said in err


def test_a_run_without_a_mesh_is_told_what_would_fit(capsys):
    code, _, err = planned(capsys, GLAM, "--topology=v4:8x8x16")
    assert code == 1
    assert "the mesh (one device) has 1 devices" in err
    assert "what fits v4:8x8x16 is, for instance, --mesh=data=" in err
    assert "--search" in err


def test_a_mesh_that_does_not_fit_says_by_how_much(capsys):
    words = ("--topology=v4:8x8x16", "--mesh=data=16,expert=64")
    code, out, _ = planned(capsys, GLAM, *words)  # nothing fully sharded
    assert code == 1
    assert "does not fit:" in out
    assert "too many, by arithmetic; --search looks for" in " ".join(out.split())


FAILURES = {
    "out_of_memory": Failure(
        "out_of_memory",
        "RESOURCE_EXHAUSTED",
        "cut more",
        needed_bytes=20 * 2**30,
        available_bytes=15 * 2**30,
    ),
    "crashed": Failure("crashed", "the compiler ended its process", "report it"),
    "killed": Failure("killed", "more than 12.0 GiB", "raise the memory limit"),
    "timed_out": Failure("timed_out", "no answer within 600 s", "raise the limit"),
    "rejected": Failure("rejected", "the program cannot run there", "another mesh"),
    "no_compiler": Failure("no_compiler", "libtpu cannot describe v5e", "install it"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_each_way_in_which_compiling_fails_is_a_message(capsys, monkeypatch, kind):
    failure = FAILURES[kind]
    monkeypatch.setattr(planned_compile, "find_compiler", lambda: "")
    monkeypatch.setattr(planned_compile, "compile_step", lambda *_, **__: failure)
    code, out, err = planned(capsys, TINY, *ON_V5E, "--compile")
    assert code == 1
    assert f"not compiled ({kind}): {failure.message}" in err
    assert failure.advice in err
    assert "53,536" in out  # what arithmetic says is said all the same
    if kind == "out_of_memory":
        assert "20.00 GiB of 15.00, 5.00 too many" in err


def test_without_a_compiler_it_is_said_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(planned_compile, "find_compiler", lambda: None)
    code, _, err = planned(capsys, TINY, *ON_V5E, "--compile")
    assert code == 1
    assert "make tpu-compiler" in err


# ------------------------------------------------------------------------- compiled

COMPILED = Compiled(
    topology="v5e:2x4",
    compiler="jax, libtpu",
    lowering_seconds=1.0,
    compiling_seconds=2.0,
    peak_host_bytes=2**30,
    argument_bytes=10 * 2**20,
    output_bytes=10 * 2**20,
    alias_bytes=10 * 2**20,
    temp_bytes=2**30,
    code_bytes=2**20,
    total_bytes=2**30 + 11 * 2**20,
    host_bytes=0,
    memory_bytes=15 * 2**30,
    fits=True,
    product_flops=1e9,
    reported_flops=1e8,
    reported_seconds=None,
    collectives=(
        Collective("all-to-all", ("expert",), 3 * 2**30, 8, True, "moe/a.py:1"),
    ),
    largest_buffers=(
        Buffer(2**29, "f32[8,64,384]", "moe/training/losses.py:30", "dot_general"),
        Buffer(2**28, "f32[2,2,64,64]", "moe/model/attention.py:3", "exp"),
    ),
)


def test_what_was_compiled_stands_beside_what_was_predicted(
    capsys, monkeypatch, tmp_path
):
    written = tmp_path / "plan.json"
    monkeypatch.setattr(planned_compile, "find_compiler", lambda: "")
    monkeypatch.setattr(planned_compile, "compile_step", lambda *_, **__: COMPILED)
    code, out, err = planned(capsys, TINY, *ON_V5E, "--compile", f"--json={written}")
    assert code == 0, err
    assert "fits: 1.01 of 15.75 GiB, as compiled" in out
    assert "unusable: negative" in out
    assert "VOCAB_CHUNKS" in out
    assert "ATTENTION_BLOCK" in out
    found = json.loads(written.read_text())
    exchanged = next(one for one in found["traffic"] if one["axis"] == "expert")
    assert exchanged["compiled_bytes"] == 3 * 2**30
    assert exchanged["ratio"] == pytest.approx(3 * 2**30 / exchanged["least_bytes"])
    assert found["step"]["network_source"] == "compiled"
    # 1e9 on each of 8 devices, 512 tokens in a step.
    flops = found["counts"]["flops_per_token"]["compiled"]
    assert flops == pytest.approx(8e9 / 512)


# Two thirds of the arguments, and the rest of the state beside them.
EVALUATION = Evaluation(
    transport="ragged",
    lowering_seconds=0.5,
    compiling_seconds=45.0,
    argument_bytes=7 * 2**20,
    temp_bytes=3 * 2**30,
    kept_bytes=3 * 2**20,
    total_bytes=3 * 2**30 + 10 * 2**20,
)


def compiled_plan(capsys, monkeypatch, compiled, *words):
    monkeypatch.setattr(planned_compile, "find_compiler", lambda: "")
    monkeypatch.setattr(planned_compile, "compile_step", lambda *_, **__: compiled)
    return planned(capsys, TINY, *ON_V5E, "--compile", *words)


def test_evaluation_decides_where_it_needs_more_than_the_step(
    capsys, monkeypatch, tmp_path
):
    both = dataclasses.replace(COMPILED, evaluation=EVALUATION)
    written, page = tmp_path / "plan.json", tmp_path / "plan.html"
    words = (f"--json={written}", f"--html={page}")
    code, out, err = compiled_plan(capsys, monkeypatch, both, *words)
    assert code == 0, err
    assert "fits: 3.01 of 15.75 GiB, as compiled, in evaluation" in out
    said = " ".join(out.split())
    assert "evaluation, ragged" in said
    assert "45 s" in said, "how long it took to compile"
    found = json.loads(written.read_text())
    assert found["compiled"]["evaluation"]["compiling_seconds"] == 45
    assert found["compiled"]["evaluation"]["total_bytes"] == EVALUATION.total_bytes
    assert "evaluation, ragged" in page.read_text()

    most = EVALUATION.total_bytes + 15 * 2**30
    large = dataclasses.replace(EVALUATION, total_bytes=most)
    both = dataclasses.replace(COMPILED, evaluation=large, fits=False)
    code, out, _ = compiled_plan(capsys, monkeypatch, both)
    assert code == 1
    assert "does not fit: 18.01 of 15.75 GiB" in out
    assert "as compiled, in evaluation" in " ".join(out.split())


@pytest.mark.parametrize("kind", FAILURES)
def test_a_run_whose_evaluation_does_not_compile_is_no_plan(capsys, monkeypatch, kind):
    both = dataclasses.replace(COMPILED, evaluation=FAILURES[kind], fits=False)
    code, out, err = compiled_plan(capsys, monkeypatch, both)
    assert code == 1
    assert f"evaluation not compiled ({kind}): {FAILURES[kind].message}" in err
    assert "fits:" not in out
    assert ("does not fit: 20.00" in out) == (kind == "out_of_memory")
    assert ("cannot run: the train step takes 1.01" in out) == (kind != "out_of_memory")


def test_a_step_compiled_without_evaluation_says_so(capsys, monkeypatch):
    code, out, _ = compiled_plan(capsys, monkeypatch, COMPILED)
    assert code == 0
    assert "fits: 1.01 of 15.75 GiB, as compiled; evaluation was not" in out


def test_transports_of_training_and_of_evaluation_are_both_said(capsys, tmp_path):
    written = tmp_path / "plan.json"
    told = {}
    for topology, mesh in (("v5e:4x4", "data=4"), ("v5e:4x8", "data=8")):
        words = (f"--topology={topology}", f"--mesh={mesh},expert=4")
        words += ("--gin.BATCH_SIZE=32", f"--json={written}")
        code, out, err = planned(capsys, TINY, *words)
        assert code == 0, err
        assert "transport in evaluation" in out
        found = json.loads(written.read_text())["transports"]
        told[topology] = [found[use]["transport"] for use in ("training", "evaluation")]
    # Capacity bounds training; in evaluation nothing drops, and slices of v5e of more
    # than 16 chips have no ragged exchange.
    assert told == {
        "v5e:4x4": ["all_to_all", "ragged"],
        "v5e:4x8": ["all_to_all", "ring"],
    }


@pytest.mark.parametrize("evaluation", [None, EVALUATION, FAILURES["rejected"]])
def test_records_are_read_back_with_their_evaluation(evaluation):
    record = dataclasses.replace(COMPILED, evaluation=evaluation)
    assert from_json(to_json(record)) == record


def test_records_from_before_evaluation_was_compiled_are_read():
    fields = json.loads(to_json(COMPILED))
    del fields["evaluation"], fields["fastest_first"]
    old = from_json(json.dumps(fields))
    assert old.evaluation is None
    # Those programs gathered over data last.
    assert old.fastest_first.index("data") < old.fastest_first.index("expert")


def test_a_compiled_step_that_is_too_large_does_not_fit(capsys, monkeypatch):
    large = dataclasses.replace(COMPILED, fits=False, total_bytes=20 * 2**30)
    monkeypatch.setattr(planned_compile, "find_compiler", lambda: "")
    monkeypatch.setattr(planned_compile, "compile_step", lambda *_, **__: large)
    code, out, _ = planned(capsys, TINY, *ON_V5E, "--compile")
    assert code == 1
    assert "does not fit: 20.00 of 15.75 GiB" in out


def test_plan_errors_are_messages():
    from launch.errors import is_user_error

    assert is_user_error(answer.PlanError("so"))
