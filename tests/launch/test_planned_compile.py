"""The TPU's compiler on a whole train step, and every way in which it fails."""

import sys
import time
from pathlib import Path

import pytest

from launch.config import reader
from launch.planning.compiler import compile as planning
from launch.planning.compiler.compile import compile_step, find_compiler, out_of_memory
from launch.planning.compiler.records import (
    Compiled,
    Evaluation,
    Failure,
    from_json,
    to_json,
)
from launch.planning.hardware.topologies import parse

V5E = parse("v5e:2x4")
MINIATURE = (
    "PLATFORM=auto",
    "SIMULATED_DEVICES=0",
    "XLA_FLAGS=()",
    "MESH_DATA=2",
    "MESH_EXPERT=4",
    "DTYPE=bfloat16",
)
needs_compiler = pytest.mark.skipif(
    find_compiler() is None, reason="no TPU compiler: run `make tpu-compiler`"
)


def config(*bindings: str) -> str:
    return reader.read(["runs/tiny.gin"], [*MINIATURE, *bindings]).operative


@needs_compiler
def test_a_whole_train_step_compiles_for_a_slice_that_is_not_here(tmp_path):
    kept = tmp_path / "step.hlo"
    answer = compile_step(config(), V5E, time_limit_s=170, hlo_file=str(kept))
    assert isinstance(answer, Compiled), answer
    assert answer.fits
    assert answer.unknown_loops == 0
    # State that is donated counts once.
    assert answer.total_bytes < answer.argument_bytes + answer.output_bytes + (
        answer.temp_bytes + answer.code_bytes
    )
    # Two of 53,536 parameters' moments and the parameters, float32, experts over 4.
    assert 53_536 * 4 < answer.argument_bytes < 2 * 53_536 * 3 * 4
    exchanged = [c for c in answer.collectives if c.kind == "all-to-all"]
    assert {c.axes for c in exchanged} == {("expert",)}
    assert sum(c.count for c in exchanged) >= 4  # to and from, forward and backward
    assert any(c.source.startswith("moe/dispatch/") for c in exchanged)
    assert answer.product_flops > 0
    assert answer.peak_host_bytes > 100 * 2**20
    assert from_json(to_json(answer)) == answer
    scoring = answer.evaluation
    assert isinstance(scoring, Evaluation), scoring
    assert scoring.transport == "ragged"
    # It takes parameters and batch; the moments stay beside them.
    assert scoring.kept_bytes > 53_536 * 4 / 4
    assert scoring.argument_bytes + scoring.kept_bytes == answer.argument_bytes
    assert scoring.total_bytes > answer.argument_bytes + scoring.temp_bytes
    assert scoring.compiling_seconds > 0
    assert kept.read_text().startswith("HloModule")


@pytest.mark.slow
@needs_compiler
def test_a_step_too_large_for_the_chip_says_how_large():
    sizes = ("EMBED_DIM=8192", "MLP_DIM=32768", "EXPERT_MLP_DIM=32768")
    answer = compile_step(config(*sizes), V5E, time_limit_s=170)
    assert isinstance(answer, Failure), answer
    assert answer.kind == "out_of_memory", answer
    assert answer.needed_bytes > answer.available_bytes
    assert 15 * 2**30 < answer.available_bytes < 16 * 2**30
    assert "FSDP" in answer.advice
    assert answer.largest_buffers[0].bytes > 2**30
    assert answer.largest_buffers[0].source.startswith("moe/")
    assert from_json(to_json(answer)) == answer


@needs_compiler
def test_a_mesh_of_another_size_is_rejected_before_anything_is_compiled():
    answer = compile_step(config("MESH_DATA=1"), V5E, time_limit_s=100)
    assert isinstance(answer, Failure)
    assert answer.kind == "rejected"
    assert "set MESH_DATA to 2" in answer.message


@pytest.mark.slow
@needs_compiler
def test_a_flag_the_compiler_does_not_know_is_named():
    flag = 'LIBTPU_INIT_ARGS=("--xla_tpu_no_such_flag=true",)'
    answer = compile_step(config(flag), V5E, time_limit_s=100)
    assert isinstance(answer, Failure)
    assert answer.kind == "rejected", answer
    assert "xla_tpu_no_such_flag" in answer.message


@pytest.mark.fast
def test_without_a_compiler_the_answer_says_how_to_get_one(tmp_path):
    answer = compile_step(config(), V5E, compiler=str(tmp_path))
    assert isinstance(answer, Failure)
    assert answer.kind == "no_compiler"
    assert "make tpu-compiler" in answer.advice
    assert compile_step(config(), parse("h100:8")).kind == "no_compiler"


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A compiler's process that does what a program says, with a libtpu."""
    (tmp_path / "libtpu").mkdir()

    def compile_with(program: str, **limits) -> Failure:
        watch = planning._watch

        def run(command, *others):
            return watch([sys.executable, "-c", program, *command[3:]], *others)

        monkeypatch.setattr(planning, "_watch", run)
        return compile_step("", V5E, compiler=str(tmp_path), **limits)

    return compile_with


@pytest.mark.fast
def test_a_compiler_that_takes_too_long_is_ended(pretend):
    start = time.monotonic()
    answer = pretend("import time; time.sleep(60)", time_limit_s=0.5)
    assert answer.kind == "timed_out"
    assert time.monotonic() - start < 20


@pytest.mark.fast
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is not told")
def test_a_compiler_that_takes_too_much_memory_is_ended(pretend):
    # Also the memory of what it started.
    program = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import time; x = bytearray(200 * 2**20); time.sleep(60)'])"
    )
    answer = pretend(program, memory_limit_bytes=100 * 2**20, time_limit_s=60)
    assert answer.kind == "killed"
    assert answer.peak_host_bytes > 100 * 2**20
    assert "0.1 GiB" in answer.message


@pytest.mark.fast
def test_a_compiler_that_ends_its_process_leaves_its_last_words(pretend):
    answer = pretend(
        "import os, sys; print('F0000 check failed: x == y', file=sys.stderr); "
        "sys.stderr.flush(); os.abort()"
    )
    assert answer.kind == "crashed"
    assert "by SIGABRT" in answer.message
    assert "check failed: x == y" in answer.message


@pytest.mark.fast
@pytest.mark.parametrize(
    ("program", "kind"),
    [("os.abort()", "crashed"), ("import time; time.sleep(60)", "timed_out")],
)
def test_a_compiler_that_ends_in_evaluation_leaves_the_train_steps_answer(
    pretend, tmp_path, program, kind
):
    step = Compiled(
        *("v5e:2x4", "jax, libtpu", 1.0, 2.0, 0, 1, 1, 1, 1, 1, 4, 0, 9, True, 1.0),
        *(1.0, None, (), ()),
    )
    (tmp_path / "step.json").write_text(to_json(step))
    answer = pretend(
        "import os, shutil, sys\n"
        f"shutil.copy({str(tmp_path / 'step.json')!r}, sys.argv[1] + '/result.json')\n"
        f"{program}",
        time_limit_s=3,
    )
    assert isinstance(answer, Compiled)
    assert answer.total_bytes == step.total_bytes
    assert not answer.fits
    assert isinstance(answer.evaluation, Failure)
    assert answer.evaluation.kind == kind


@pytest.mark.fast
def test_what_does_not_fit_is_read_from_either_message():
    early = out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (91.42G) exceeds available HBM (15.75G)."
    )
    assert early.available_bytes == int(15.75 * 2**30)
    assert early.needed_bytes == int(91.42 * 2**30)
    late = out_of_memory(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
        "memory space hbm. Used 22.10G of 15.75G hbm. Exceeded hbm capacity by 6.35G."
        "\n\n  Largest program allocations in hbm:\n\n  1. Size: 4.00G\n"
        '     Operator: op_name="jit(f)/dot_general" source_file="a.py" source_line=3\n'
        "     Shape: f32[32768,32768]{1,0:T(8,128)}\n     Unpadded size: 4.00G\n"
    )
    assert (late.needed_bytes, late.available_bytes) == (
        int(22.10 * 2**30),
        int(15.75 * 2**30),
    )
    (largest,) = late.largest_buffers
    assert largest.bytes == 4 * 2**30
    assert largest.operation == "jit(f)/dot_general"
