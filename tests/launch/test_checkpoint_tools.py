"""The tools of `switchyard checkpoint`, as docs/checkpoints.md shows them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import damage
import numpy as np
import pytest
from commands import Done

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.names import named_arrays
from launch.checkpoints.places import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "checkpoints.md"


def examples() -> list[list[str]]:
    """The words of every command that the page shows."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line]


@pytest.fixture(scope="module")
def here(trained, tmp_path_factory):
    """A working directory with the run that the page speaks of."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(trained.folder, folder / "runs" / "demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def said(*words: str) -> Done:
    return commands.inline("checkpoint", *words, "--quiet")


def array(path: Path, name: str) -> np.ndarray:
    arrays = Arrays(path, read_manifest(path))
    return np.asarray(arrays.opened(name).read().result())


def test_what_the_page_shows_does_what_it_says(here):
    shown = examples()
    assert ["evaluate", "--model_dir=runs/demo_mean"] in shown
    assert {words[1] for words in shown if words[0] == "checkpoint"} == {
        path.stem for path in (ROOT / "launch/commands/checkpoint").glob("[a-z]*.py")
    }
    shown = [words for words in shown if words[0] == "checkpoint"]
    done = {tuple(words): commands.inline(*words) for words in shown}
    for words, one in done.items():
        assert one.code == 0, (words, one.out, one.err)
    verified = next(o.out for w, o in done.items() if w[1:2] == ("verify",))
    assert re.fullmatch(r"(step \d+: \d+ arrays, [\d,]+ bytes: whole\n){2}", verified)
    about = next(o.out for w, o in done.items() if w[1] == "inspect" and len(w) == 4)
    for words in ("libraries", "orbax-checkpoint", "params/embedding", "command"):
        assert words in about


@pytest.mark.slow
def test_a_mean_is_scored_and_drawn_from(here, tmp_path):
    paths = [here / "runs/demo/checkpoints" / step for step in ("10", "20")]
    words = [f"--checkpoint={path}" for path in paths]
    assert said("average", *words, f"--to={tmp_path / 'mean'}").code == 0
    scored = commands.inline("evaluate", f"--model_dir={tmp_path / 'mean'}")
    assert scored.code == 0, scored.err
    drawn = commands.inline(
        "generate", f"--model_dir={tmp_path / 'mean'}", "--prompt=def "
    )
    assert drawn.code == 0, drawn.err
    assert drawn.out.startswith("def ")


def test_a_mean_is_that_of_its_parents(here, tmp_path):
    parents = [here / "runs" / "demo" / "checkpoints" / step for step in ("10", "20")]
    words = [f"--checkpoint={path}" for path in parents]
    done = said("average", *words, f"--to={tmp_path / 'mean'}")
    assert done.code == 0, done.err
    path = tmp_path / "mean" / "checkpoints" / "20"
    assert done.out == f"{path}\n"
    manifest = read_manifest(path)
    assert manifest["parents"] == [
        {"path": str(parent), "step": int(parent.name)} for parent in parents
    ]
    assert all(name.startswith("params/") for name in manifest["arrays"])
    for name in manifest["arrays"]:
        one, other = (array(parent, name) for parent in parents)
        mean = (one + other) / np.float32(2)
        np.testing.assert_array_equal(array(path, name), mean, name)
    assert said("verify", f"--model_dir={tmp_path / 'mean'}").code == 0
    again = said("average", *words, f"--to={tmp_path / 'mean'}")
    assert again.code == 1
    assert "is there already" in again.err


def test_checkpoints_of_other_models_have_no_mean(here, tmp_path):
    other = shutil.copytree(here / "runs" / "demo", tmp_path / "other")
    place = other / "checkpoints" / "20" / "manifest" / "metadata"
    manifest = json.loads(place.read_text())
    del manifest["manifest_digest"]
    manifest["config"] = manifest["config"].replace("'gelu'", "'relu'")
    place.write_text(json.dumps(manifest))
    done = said(
        "average",
        f"--checkpoint={here / 'runs/demo/checkpoints/20'}",
        f"--checkpoint={other / 'checkpoints/20'}",
        f"--to={tmp_path / 'mean'}",
    )
    assert done.code == 1
    assert "of another model" in done.err
    assert "ACTIVATION 'gelu' → 'relu'" in done.err
    assert not (tmp_path / "mean" / "checkpoints" / "20").exists()


def test_a_difference_is_said_by_how_much(here, tmp_path):
    done = said("diff", f"--model_dir={here / 'runs/demo'}", "--step=10")
    assert done.code == 1
    (row,) = [line for line in done.out.splitlines() if line.startswith("params/head")]
    _, absolute, relative = row.split()
    paths = [here / "runs/demo/checkpoints" / step for step in ("10", "20")]
    one, other = (array(path, "params/head").astype(np.float64) for path in paths)
    largest = np.abs(one - other).max()
    assert float(absolute) == pytest.approx(largest, rel=1e-3)
    assert float(relative) == pytest.approx(largest / np.abs(one).max(), rel=1e-3)
    assert "fact  step 10 → 20" in done.out


def test_a_damaged_checkpoint_is_found_and_neither_copied_nor_averaged(here, tmp_path):
    run = shutil.copytree(here / "runs" / "demo", tmp_path / "run")
    path = run / "checkpoints" / "20"
    largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    damage.FAULTS["flip"](largest, largest)
    done = said("verify", f"--model_dir={run}")
    assert done.code == 1
    assert "step 10: " in done.out.splitlines()[0]
    assert "whole" in done.out.splitlines()[0]
    assert str(largest.relative_to(path)) in done.out
    copied = said("copy", f"--model_dir={run}", f"--to={tmp_path / 'copy'}")
    assert copied.code == 1
    assert copied.err.startswith("DamagedError: ")
    assert len(copied.err.splitlines()) == 1
    assert os.listdir(tmp_path / "copy" / "checkpoints") == []
    assert said("copy", f"--model_dir={run}", "--step=7", "--to=x").code == 1


def test_numbers_that_cannot_be_decoded_are_told_with_their_file(here, tmp_path):
    run = shutil.copytree(here / "runs" / "demo", tmp_path / "run")
    path = run / "checkpoints" / "20"
    largest = max(path.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    first = content.index(b"\x28\xb5\x2f\xfd")  # of a frame of zstd
    content[first + 4 : first + 16] = bytes([255] * 12)
    largest.write_bytes(content)
    done = said("verify", f"--model_dir={run}")
    assert done.code == 1
    assert str(largest.relative_to(path)) in done.out


def test_a_copy_does_not_mix_runs(here, tmp_path):
    (tmp_path / "config.gin").write_text("SEED = 5\n")
    done = said("copy", f"--model_dir={here / 'runs/demo'}", f"--to={tmp_path}")
    assert done.code == 1
    assert "holds no other run" in done.err
    assert not (tmp_path / "checkpoints" / "20").exists()


def test_to_look_at_a_checkpoint_no_device_is_started(here):
    program = (
        "import sys\n"
        "from launch import cli\n"
        "code = cli.main()\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "sys.exit(code)\n"
    )
    words = ["checkpoint", "verify", f"--model_dir={here / 'runs/demo'}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_manifest_says_what_made_it(here):
    manifest = read_manifest(here / "runs" / "demo" / "checkpoints" / "20")
    assert manifest["versions"].keys() >= {
        *("python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    assert "train" in manifest["command"]
    assert manifest["hosts"] == 1
    assert manifest["device_kind"] == "cpu"
    git = manifest["git"]
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", git["commit"])
        assert isinstance(git["dirty"], bool)
    else:
        assert git is None


def test_names_of_arrays_are_those_of_the_tree():
    assert named_arrays({"a": {"b": 1}}) == {"a/b": 1}
