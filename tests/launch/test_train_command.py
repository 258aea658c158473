"""A tiny run through the command line: what it leaves, what other verbs make of it."""

import html
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import TINY, inline

from launch.config import reader
from launch.evaluation import heldout as evaluation
from launch.records.read import read_metrics
from moe.accounting import count
from tasks.store import open_store

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
SPLITS = {"train": "training", "heldout": "held-out"}


def documented() -> dict[str, str]:
    """Names of metrics, and in which records they are, as the page says."""
    row = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|([^|]+\|){3}$", re.MULTILINE)
    rows = [(name, where) for name, where, _ in row.findall(PAGE.read_text())]
    found = {n.replace("TASK", "python_topics_small"): where for n, where in rows}
    assert len(found) == len(rows), "a name twice"
    return found


def last_score(folder: Path) -> dict:
    """The last held-out record of a run."""
    return [r for r in read_metrics(folder) if r["split"] == "heldout"][-1]


@pytest.fixture(scope="module")
def config(trained):
    return reader.read([str(trained.folder / "config.gin")])


# ------------------------------------------------------------------ what a run leaves


def test_a_run_prepares_its_store_trains_and_says_so_first(trained):
    first, *rest = trained.done.err.splitlines()
    assert re.fullmatch(
        rf"switchyard \S+ · train · runs/tiny.gin · 1 CPU device · {trained.folder}",
        first,
    )
    assert "Traceback" not in trained.done.err
    assert any(line.startswith("preparing tokens: 8 documents") for line in rest)
    (check,) = [line for line in rest if line.startswith("self-check: ")]
    assert re.fullmatch(
        r"self-check: equal to the oracle: training 'ragged' to \d\.\de[-+]\d\d, "
        r"evaluation 'ragged' to \d\.\de[-+]\d\d",
        check,
    )
    assert any(line.startswith("step 20/20  loss ") for line in rest)
    assert sorted(p.name for p in trained.folder.iterdir()) == [
        "checkpoints",
        "config.gin",
        "configs",
        "events.jsonl",
        "loads",
        "metrics.jsonl",
        "newest_saved.json",
        "report.html",
        "report.json",
        "run.lock",
        "tensorboard",
        "vocabulary",
    ]
    steps = sorted(int(p.name) for p in (trained.folder / "checkpoints").iterdir())
    assert steps == [10, 20]


def test_metrics_have_their_names_and_steps_only_grow(trained):
    text = (trained.folder / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    steps = {
        split: [r["step"] for r in records if r["split"] == split] for split in SPLITS
    }
    assert steps == {"train": list(range(1, 21)), "heldout": [10, 20]}
    page = documented()
    for record in records:
        where = ("both", SPLITS[record["split"]])
        always = {name for name, recorded in page.items() if recorded in where}
        assert record.keys() == {"step", "split"} | always
        assert record["ledger/routed_choices"] == sum(
            record[f"ledger/{kind}_choices"]
            for kind in ("computed", "dropped", "padding")
        )
        if record["split"] == "train":
            assert record["state/taken"] == 1
            assert record["perf/steps_taken_again"] == 0
    losses = [r["loss/nats_per_token"] for r in records if r["split"] == "train"]
    after_10, after_20 = (
        r["loss/nats_per_token"] for r in records if r["split"] == "heldout"
    )
    assert losses[0] > after_10 > after_20, "what was learnt holds for other documents"
    assert losses[0] > after_20 + 0.4
    assert abs(losses[0] - math.log(384)) < 0.6


def test_tensorboard_has_a_file_for_each_split(trained):
    for split in SPLITS:
        (file,) = (trained.folder / "tensorboard" / split).iterdir()
        assert file.name.startswith("events")
        assert file.stat().st_size > 1000


def test_the_configuration_that_is_kept_reads_back_as_the_same_settings(
    trained, config
):
    knobs = trained.knobs(trained.folder, SAMPLE_PROMPT="def ")
    words = [w.removeprefix("--gin.") for w in knobs if w.startswith("--gin.")]
    given = reader.read(["runs/tiny.gin"], words)
    assert config.settings == given.settings
    assert given.settings.loop.log_period_steps == 1


def test_bits_per_byte_are_the_nats_of_the_bytes_that_tokens_stand_for(trained):
    store = open_store(trained.store)
    split = store.manifest.split("python_topics_small", "validation")
    # A byte is a token, and each document has an end more.
    tokens = split.tokens["targets"]
    assert tokens == split.text_bytes + split.documents
    score = last_score(trained.folder)
    assert score["tokens"] == tokens
    nats = score["loss/nats_per_token"] * tokens
    bits = nats / math.log(2) / split.text_bytes
    assert score["loss/bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_the_report_and_the_terminal_tell_the_score_and_the_sample(trained):
    score = last_score(trained.folder)
    nats, bits = (score[f"loss/{n}"] for n in ("nats_per_token", "bits_per_byte"))
    (line,) = [s for s in trained.done.out.splitlines() if s.startswith("this model")]
    assert line.split()[2:] == [f"{nats:.4f}", f"{bits:.4f}"]
    page = html.unescape((trained.folder / "report.html").read_text())
    assert f">{nats:.4f}<" in page
    assert f">{bits:.4f}<" in page
    assert str(trained.folder / "checkpoints" / "20") in page
    sample = trained.done.out.partition("sample        def │")[2]
    assert len(sample.partition("\ncheckpoint ")[0]) >= 4
    assert f"report        {trained.folder / 'report.html'}" in trained.done.out


# ------------------------------------------------------------------------- once again


def test_a_complete_run_says_so_and_changes_nothing(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = inline("train", *trained.knobs(folder))
    assert done.code == 0, done.err
    assert f"{folder} is complete: step 20 of 20. Raise TRAIN_STEPS" in done.out
    nats = last_score(folder)["loss/nats_per_token"]
    assert f"{nats:.4f}" in done.out
    assert "compiling" not in done.err
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    lock = folder / "run.lock"
    assert before.pop(lock) != after.pop(lock)
    assert before == after


def test_a_complete_run_whose_report_was_lost_writes_it_again(
    trained, tmp_path, monkeypatch
):
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    (folder / "report.html").unlink()
    metrics = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(evaluation, "heldout", None)  # scores are there, and stay
    done = inline("train", *trained.knobs(folder), "--gin.SAMPLE_PROMPT=")
    assert done.code == 0, done.err
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_report_that_cannot_be_written_fails_no_run(trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained.folder, tmp_path / "a copy")
    (folder / "report.html").unlink()

    def fail(*given):
        raise MemoryError("of 25 GB\nthere are 2")

    monkeypatch.setattr("launch.report.run.write_report", fail)
    done = inline("train", *trained.knobs(folder), "--gin.SAMPLE_PROMPT=")
    assert done.code == 0, done.err
    assert done.err.splitlines()[-1] == (
        "warning: the report could not be written (MemoryError: of 25 GB there are 2); "
        "the run is complete, and this makes it again: switchyard report "
        f"--model_dir='{folder}'"
    )
    assert f"{last_score(folder)['loss/nats_per_token']:.4f}" in done.out
    assert "report        none" in done.out
    assert not (folder / "report.html").exists()


@pytest.mark.slow
def test_a_run_goes_on_whatever_lies_among_its_records(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "20")
    (folder / "tensorboard" / ".DS_Store").touch()
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:40]
    scored = next(n for n, line in enumerate(lines) if '"heldout"' in line)
    lines.insert(scored, lines[scored])
    path.write_text("\n".join([*lines, lines[0][:40]]))
    done = trained.run("train", *trained.knobs(folder), "--self_check=off")
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert said == [
        f"warning: {path}: 1 line at the end could not be read and was cut off",
        f"warning: {folder / 'tensorboard'} holds what is not of this run: .DS_Store",
        f"warning: {path}: 1 line cannot be read and was left out: line 2",
        f"warning: {path}: 1 record stands twice, the first of step 10; the later of "
        "each counts",
    ]
    wanted = [r for r in read_metrics(trained.folder) if r["step"] != 2]
    names = ("step", "split", "loss/nats_per_token")
    assert [[r[n] for n in names] for r in read_metrics(folder)] == [
        [r[n] for n in names] for r in wanted
    ]


# ----------------------------------------------------------------- the other verbs


def test_generate_prints_the_sample_of_the_run_and_nothing_else(trained):
    done = trained.run("generate", f"--model_dir={trained.folder}")
    assert done.code == 0, done.err
    assert done.out.startswith("def ")
    continuation = done.out.removeprefix("def ").removesuffix("\n")
    # The same seed gives the same text in another process.
    assert f"sample        def │{continuation}\ncheckpoint " in trained.done.out
    assert "WARNING" not in done.err
    assert "Traceback" not in done.err


def drawn(trained, *words) -> str:
    """A continuation of "def " in this process."""
    done = inline(
        *("generate", f"--model_dir={trained.folder}", "--quiet"),
        *("--prompt=def ", "--num_tokens=16", *words),
    )
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out.startswith("def ")
    return done.out.removeprefix("def ")


def test_a_page_is_made_again(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "copy")
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    done = inline("report", f"--model_dir={folder}", "--quiet")
    assert (done.code, done.out) == (0, f"{folder / 'report.html'}\n"), done.err
    assert (folder / "report.html").read_bytes() == page
    (folder / "report.json").unlink()
    done = inline("report", f"--model_dir={folder}", "--quiet")
    assert done.code == 1
    assert "report.json is not there" in done.err


def test_a_run_that_was_moved_draws_without_its_tokens(trained, tmp_path, monkeypatch):
    moved = shutil.copytree(trained.folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    words = ("--temperature=0", "--num_tokens=4")
    text = drawn(trained, *words)
    done = inline(
        *("generate", "--model_dir=moved", "--quiet", "--prompt=def ", *words),
        "--gin.STORE_DIR=gone",
    )
    assert done.code == 0, done.err
    assert done.out == f"def {text}"
    kept = (moved / "config.gin").read_text()
    assert f"STORE_DIR = {str(trained.store)!r}" in kept


@pytest.mark.slow
def test_what_is_likeliest_does_not_depend_on_the_seed(trained):
    likeliest = drawn(trained, "--temperature=0", "--seed=1")
    assert likeliest == drawn(trained, "--temperature=0", "--seed=2")
    assert f"│{likeliest}" not in trained.done.out


@pytest.mark.slow
def test_what_is_drawn_depends_on_the_seed(trained):
    assert drawn(trained, "--seed=1") == drawn(trained, "--seed=1")
    assert drawn(trained, "--seed=1") != drawn(trained, "--seed=2")


def test_evaluate_on_another_mesh_finds_the_score_of_the_run(trained, monkeypatch):
    found = []

    def heldout(*args):
        found.append(original(*args))
        return found[-1]

    original = evaluation.heldout
    monkeypatch.setattr(evaluation, "heldout", heldout)
    done = inline(
        *("evaluate", f"--model_dir={trained.folder}"),
        *("--gin.MESH_EXPERT=2", "--gin.SIMULATED_DEVICES=2"),
    )
    assert done.code == 0, done.err
    assert "2 simulated CPU devices, expert 2" in done.err
    wanted, (score,) = last_score(trained.folder), found
    printed = dict(re.findall(r"^(\S+) +([\d.,]+)$", done.out, re.MULTILINE))
    for name in ("loss/nats_per_token", "loss/bits_per_byte"):
        assert score[name] == pytest.approx(wanted[name], rel=1e-6)
        assert printed[name] == f"{score[name]:.4f}"
    assert score["tokens"] == wanted["tokens"]
    assert printed["tokens"] == f"{wanted['tokens']:,}"
    # The same tokens met the same experts, in float32.
    load = np.load(trained.folder / "loads" / "heldout" / f"{wanted['step']:012d}.npy")
    np.testing.assert_array_equal(np.float32(score["router/load"]), load)
    assert "gzip baseline" in done.out


# -------------------------------------------------------------------------- a dry run


def test_a_dry_run_tells_all_and_compiles_and_writes_nothing(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    with jax.log_compiles():
        done = inline(
            *("train", TINY, "--dry_run", "--gin.MESH_DATA=2", "--gin.MESH_EXPERT=2"),
            *("--gin.SIMULATED_DEVICES=4", "--gin.TRAIN_CAPACITY_FACTOR=1.5"),
        )
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 1)(1)
        assert "Compiling" in caplog.text
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    rows = [re.sub(r"[│\s]+", " ", line).strip() for line in done.out.splitlines()]
    config = reader.read(["runs/tiny.gin"], ["TRAIN_CAPACITY_FACTOR=1.5"])
    assert "TRAIN_CAPACITY_FACTOR 1.5 --gin.TRAIN_CAPACITY_FACTOR" in rows
    for knob in config.knobs:
        assert any(
            row.startswith(f"{knob.macro} ")
            and row.endswith((knob.origin, f"--gin.{knob.macro}"))
            for row in rows
        ), knob
    settings = config.settings
    counts = count(settings.layers, settings.data.length, settings.data.encoder_length)
    text = " ".join(rows)
    assert f"{counts.total:,} total, {counts.active:,} active" in text
    assert " router top-1 of 4 " in text
    # Capacity bounds the rows of training; held-out nothing drops.
    assert " transport all_to_all (capacity bounds every expert's rows); held-out " in (
        text
    )
    # 1 choice per token, 64 tokens, 4 experts: ceil(64 x 1.5 / 4) slots.
    assert (
        "24 slots per expert in groups of 64 tokens, even load 16; held-out nothing "
        "drops"
    ) in text
    assert "mesh data 2 × expert 2 (cpu)" in text
    assert (
        "objective causal_lm, rows of 64 tokens (targets 64), packing next_fit" in text
    )
    assert "data runs/stores/python_topics_small_bytes is not prepared yet" in text
    up = (
        "params/decoder/layers/0/1/sparse/experts/up 1×4×32×64 "
        "layers, expert, expert_embed, expert_mlp"
    )
    # float32; 2 of the 4 experts on each device.
    assert f"{up} –, expert, –, model {4 * 1 * 2 * 32 * 64:,}" in text
    assert text.endswith("dry run: nothing was compiled, nothing was written")
