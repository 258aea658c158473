"""What the README promises to a newcomer, from a clean clone in a fresh environment."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--gin.TRAIN_STEPS=12 --gin.WARMUP_STEPS=4 --gin.EVAL_PERIOD=6 --gin.EVAL_BATCHES=1"
)


def run(*words: str, cwd: Path) -> str:
    """Runs a command without this session's flags; returns all that it printed."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_", "VIRTUAL_ENV", "PYTEST_"))
    }
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_clean_clone_trains_samples_and_reports(tmp_path):
    clone = tmp_path / "switchyard"
    run("git", "clone", "--quiet", str(ROOT), str(clone), cwd=tmp_path)
    demo = ("make", "demo", f"DEMO_FLAGS={FLAGS}")

    shown = run(*demo, cwd=clone)
    for words in ("held out", "unigram", "gzip -9", "xz -9e", "sample", "checkpoint"):
        assert words in shown
    assert "step 12/12" in shown
    report = (clone / "runs/demo/report.html").read_text(encoding="utf-8")
    assert "<svg" in report
    assert "http://" not in report.replace("http://www.w3.org/", "")

    assert "runs/demo is complete: step 12 of 12" in run(*demo, cwd=clone)

    text = run(
        ".venv/bin/switchyard",
        *("generate", "--model_dir=runs/demo", "--prompt=def main(", "--num_tokens=8"),
        cwd=clone,
    )
    assert "def main(" in text
