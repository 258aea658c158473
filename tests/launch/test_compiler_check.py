"""The check of the CPU's compiler: it passes what is right and stops what is not."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import commands
import pytest

from launch.config.platform import CPU_FLAG
from launch.run import compiler_check
from launch.run.compiler_check import CompilerCheckError

ROOT = Path(__file__).resolve().parents[2]
WRONG = f"{CPU_FLAG}LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"


@pytest.mark.fast
def test_the_compiler_is_right_under_the_flags_of_the_tests():
    assert max(compiler_check.differences().values()) < compiler_check.TOLERANCE / 10
    compiler_check.check()


@pytest.mark.fast
def test_a_command_refuses_a_compiler_that_is_wrong_and_names_the_flag(tmp_path):
    verify = ("verify", commands.TINY, "--mesh=data=2", "--quiet")
    done = commands.Place(tmp_path).run(*verify, XLA_FLAGS=WRONG)
    assert done.code == 1
    assert "CompilerCheckError: XLA's CPU compiler (jaxlib" in done.err
    assert "a product summed with its operand, float32[5, 60, 60]" in done.err
    assert f"Take {WRONG} out of XLA_FLAGS" in done.err
    assert 'SELF_CHECK to "off"' in done.err


@pytest.mark.parametrize("flags", ["", WRONG])
def test_the_command_shows_the_fault_under_default_optimisation(flags):
    def shown(flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launch.run.compiler_check"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=100,
        )

    wrong = shown(flags)
    assert wrong.returncode == 1, wrong.stdout
    assert f"XLA_FLAGS: {flags}\n" in wrong.stdout


@pytest.fixture
def wrong(monkeypatch):
    """What a compiler that is wrong is off by."""
    monkeypatch.setattr(
        compiler_check, "differences", lambda: {"a sum": 1e-9, "a product": math.inf}
    )


@pytest.mark.fast
def test_what_is_off_and_what_helps_is_said(wrong, monkeypatch):
    def advice(flags: str) -> str:
        monkeypatch.setenv("XLA_FLAGS", flags)
        with pytest.raises(CompilerCheckError) as raised:
            compiler_check.check()
        assert re.search("a product +off by inf", str(raised.value))
        return str(raised.value)

    assert f"Add {CPU_FLAG} to XLA_FLAGS" in advice("--a=1")
    assert f"Take {WRONG} out of XLA_FLAGS" in advice(f"--a=1 {WRONG}")
    assert "install another jaxlib" in advice(f"{CPU_FLAG} --a=1")


def test_train_evaluate_and_generate_refuse_too_unless_told_not_to(
    trained, tmp_path, wrong
):
    of_run = f"--model_dir={trained.folder}"
    dense = trained.knobs(tmp_path / "run", MOE_EVERY=0, TRAIN_STEPS=1, WARMUP_STEPS=1)
    for words in (("evaluate", of_run), ("generate", of_run), ("train", *dense)):
        done = commands.inline(*words, "--quiet")
        assert done.code == 1
        assert "CompilerCheckError" in done.err
    without = commands.inline(
        *("generate", of_run, "--step=999", "--quiet", "--gin.SELF_CHECK=off")
    )
    assert "CheckpointError" in without.err  # it came to what is next
