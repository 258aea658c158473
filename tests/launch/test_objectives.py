"""Whole runs of every objective and of mixtures, through the command line.

The stores are written without SeqIO. What a run says that it read and routed is
compared with the rows that its batches were made of.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import memory_store
import numpy as np
import pytest
import scored_for_tests as scored
import tensorstore as ts
from commands import Done, Place, inline
from jax.experimental.compilation_cache import compilation_cache
from memory_store import MemoryStore, on_disk, pair_store, text_store

from launch.records.read import read_metrics
from moe import architecture
from moe.model import inventory
from moe.model.build import build
from moe.settings import LossSettings
from moe.testing import MESHES
from moe.training import losses
from moe.training.train_step import Learner, batch_sums
from partitioning import rules
from partitioning.mesh import make_mesh
from tasks import arrays, batches, scoring
from tasks.batches import Batches
from tasks.manifest import write_manifest
from tasks.rows import TaskRows
from tasks.settings import MixtureSettings
from tasks.store import TokenStore, open_store

SIZES = {"long": 40, "short": 6, "never": 3}
RATES = {"long": 3.0, "short": 1.0, "never": 0.0}
PAIRS = {
    "OBJECTIVE": "seq2seq",
    "PREFIX_ATTENTION": "bidirectional",
    "TASK_FEATURE_LENGTHS": {"inputs": 20, "targets": 12},
}
PERIODS = {"TASK_METRICS_PERIOD": 4}
STEPS = 6


def write(store: MemoryStore, folder: Path) -> Path:
    """The store on disk, with what a preparation measures of its text."""
    manifest = on_disk(store, folder).manifest
    baselines = {f"{name}_bits_per_byte": 4.0 for name in ("unigram", "gzip", "xz")}
    tasks = {
        name: dataclasses.replace(
            task,
            baselines=baselines,
            splits={
                split: dataclasses.replace(counts, text_bytes=counts.tokens["targets"])
                for split, counts in task.splits.items()
            },
        )
        for name, task in manifest.tasks.items()
    }
    write_manifest(dataclasses.replace(manifest, tasks=tasks), str(folder))
    return folder


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "pairs": write(pair_store(**SIZES), folder / "pairs"),
        "text": write(text_store(**SIZES), folder / "text"),
    }


@dataclasses.dataclass
class Reads:
    """What was really read for each batch of training, by its index.

    Attributes:
        rows: how many rows of each Task.
        real: positions that hold a token.
        targets: positions whose loss counts.
    """

    rows: dict[int, Counter] = dataclasses.field(default_factory=dict)
    real: Counter = dataclasses.field(default_factory=Counter)
    targets: Counter = dataclasses.field(default_factory=Counter)


@contextlib.contextmanager
def watching() -> Iterator[Reads]:
    """Notes what is read, where rows are made and not where they are counted."""
    found, inner, outer = Reads(), TaskRows.read, Batches.read
    reading = threading.local()  # held-out text is read meanwhile, by another thread

    def read_rows(task, rows, epochs, seed):
        features = inner(task, rows, epochs, seed)
        for index in getattr(reading, "indices", ()):
            found.rows.setdefault(index, Counter())[task.task] += len(rows)
            found.real[index] += int((features["decoder_segment_ids"] > 0).sum())
            found.targets[index] += int(features["decoder_loss_weights"].sum())
        return features

    def read(self, index, start, stop):
        reading.indices = [index]
        try:
            return outer(self, index, start, stop)
        finally:
            reading.indices = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskRows, "read", read_rows)
        patch.setattr(Batches, "read", read)
        yield found


@dataclasses.dataclass
class Task:
    """As `tasks.scoring.ScoredTask`, without SeqIO; what it measures needs the order.

    Attributes:
        name: title of the Task, in the names of its metrics.
        inputs: tokens of each held-out example, cut to their length.
        targets: likewise.
    """

    name: str
    inputs: list[np.ndarray]
    targets: list[np.ndarray]
    notes: tuple[str, ...] = ()

    predicts = False  # compiling that takes seconds

    @property
    def examples(self) -> list[np.ndarray]:
        return self.inputs

    def metrics(self, predicted, score_N):
        place_N = np.arange(1, 1 + len(score_N))
        found = {"score": float(place_N @ score_N)}
        if predicted is not None:
            found["ids"] = float(place_N @ [sum(ids) for ids in predicted])
        return found

    def records(self, predicted, score_N):
        for i, score in enumerate(score_N):
            yield {"prediction": predicted and predicted[i], "score": float(score)}


def load(store: TokenStore, data, allowed_modules) -> list[Task]:
    """As `tasks.scoring.load`."""
    found = []
    for name in ("long", "short"):
        part = store.split(name, data.heldout_split)
        cut = []
        for feature, length in data.task_feature_lengths.items():
            offsets = part.offsets(feature)
            documents = part.read(feature, offsets[:-1], offsets[1:])
            cut.append([document[:length] for document in documents])
        found.append(Task(name, *cut))
    return found


@pytest.fixture(scope="module", autouse=True)
def without_seqio_and_compiling_once(tmp_path_factory):
    changed = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "load", load)
        for name, value in changed.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def train(place: Place, store: Path, folder: Path, **changes: Any) -> Done:
    given = {
        "STORE_DIR": store,
        "MIXTURE_OR_TASK_NAME": "made_up",
        "MIXTURE_OR_TASK_MODULE": "nowhere",
        "EXTRA_IDS": 30,
        "MIXTURE_RATES": RATES,
        "TRAIN_STEPS": STEPS,
        "EVAL_PERIOD": 2,
        "CHECKPOINT_PERIOD": 2,
        "WARMUP_STEPS": 1,
        "LEARNING_RATE": 0.01,
        "SELF_CHECK": "off",
        "GROUP_SIZE": 8,
        **changes,
    }
    return inline("train", *place.knobs(folder, **given))


def records_of(folder: Path) -> list[dict]:
    """What a run recorded, but for its speed."""
    return [
        {name: v for name, v in record.items() if not name.startswith("perf/")}
        for record in read_metrics(folder)
    ]


def assert_told_what_it_read(folder: Path, reads: Reads) -> None:
    """Rows of each Task, and choices of each token, given ones among them."""
    rows: Counter = Counter()
    steps = [record for record in records_of(folder) if record["split"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        index = record["step"] - 1
        rows += reads.rows[index]
        assert sum(reads.rows[index].values()) == 8
        assert {name: record[f"data/rows/{name}"] for name in SIZES} == {
            name: rows[name] for name in SIZES
        }
        # One sparse layer, one choice.
        real = record["ledger/computed_choices"] + record["ledger/dropped_choices"]
        assert real == reads.real[index]
        length = record["ledger/routed_choices"] // 8
        assert record["ledger/padding_choices"] == 8 * length - real
    assert steps[-1]["data/rows/never"] == 0


@dataclasses.dataclass
class Story:
    """A run of pairs, what it read, and what it had recorded when it ended."""

    place: Place
    store: Path
    folder: Path
    done: Done
    reads: Reads
    records: list[dict]
    predictions: dict[str, str]

    def again(self, folder: Path, **changes: Any) -> Done:
        return train(self.place, self.store, folder, **PAIRS, **PERIODS, **changes)

    def copy(self, folder: Path, *, at_step: int) -> Path:
        """The run as it was at a step, if it was killed two steps later."""
        shutil.copytree(self.folder, folder)
        for step in range(at_step + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
        shutil.rmtree(folder / "predictions")
        return folder


def predictions_of(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in (folder / "predictions").iterdir()}


@pytest.fixture(scope="module")
def story(stores, tmp_path_factory) -> Story:
    place = Place(tmp_path_factory.mktemp("shared"))
    folder = place.shared / "run"
    with watching() as reads:
        done = train(place, stores["pairs"], folder, **PAIRS, **PERIODS)
    assert done.code == 0, done.err
    return Story(
        *(place, stores["pairs"], folder, done, reads),
        records_of(folder),
        predictions_of(folder),
    )


def test_a_run_says_what_it_read_of_each_task_and_routes_what_is_given(story):
    assert_told_what_it_read(story.folder, story.reads)
    assert 0 < sum(story.reads.targets.values()) < sum(story.reads.real.values())


def test_losses_and_metrics_of_a_step_are_one_record(story):
    scores = {r["step"]: r for r in story.records if r["split"] == "heldout"}
    assert list(scores) == [2, 4, STEPS]
    for step, record in scores.items():
        assert "loss/nats_per_token/never" in record
        assert ("metric/short/score" in record) == (step != 2)
    assert scores[4]["metric/long/score"] < scores[STEPS]["metric/long/score"]
    assert sorted(story.predictions) == [
        f"{task}-{step}.jsonl" for task in ("long", "short") for step in (4, STEPS)
    ]


def test_scores_of_examples_add_up_to_the_loss_of_their_task(story):
    last = story.records[-1]
    part = open_store(story.store).split("long", "validation")
    targets = np.minimum(np.diff(part.offsets("targets")), 12).sum()
    assert re.search(
        rf"^long +{last['loss/nats_per_token/long']:.4f} ", story.done.out, re.MULTILINE
    )
    lines = story.predictions[f"long-{STEPS}.jsonl"].splitlines()
    nats = -sum(json.loads(line)["score"] for line in lines)
    assert last["loss/nats_per_token/long"] == pytest.approx(nats / targets, rel=1e-5)


def test_damage_ends_a_run_with_one_line_and_mended_it_goes_on_as_ever(
    story, tmp_path, monkeypatch
):
    store = tmp_path / "store"
    shutil.copytree(story.store, store)
    (tokens,) = (store / "long" / "train" / "targets" / "tokens" / "c").iterdir()
    whole, read = tokens.read_bytes(), Batches.read

    def damaging(self, index, start, stop):
        if index == 4:
            tokens.write_bytes(whole[: len(whole) // 2])
        return read(self, index, start, stop)

    monkeypatch.setattr(Batches, "read", damaging)
    monkeypatch.setattr(arrays, "_context", ts.Context())  # which caches nothing
    folder = story.copy(tmp_path / "run", at_step=2)
    changes = {"STORE_DIR": store, "READ_RETRIES": 1}
    done = story.again(folder, **changes)
    assert done.code == 1
    assert "Traceback" not in done.err
    (line,) = [line for line in done.err.splitlines() if "Error" in line]
    assert line.startswith("StoreError: array ")
    assert f"{tokens} cannot be read or fails its checksum, tried 2 times" in line
    assert not [t for t in threading.enumerate() if t.name.startswith("feed")]
    tokens.write_bytes(whole)
    monkeypatch.setattr(Batches, "read", read)
    with watching() as reads:
        done = story.again(folder, **changes)
    assert done.code == 0, done.err
    step, *_ = re.findall(rf"resuming from {folder}/checkpoints/(\d)", done.err)
    assert reads.rows == {i: story.reads.rows[i] for i in range(int(step), STEPS)}
    assert predictions_of(folder) == story.predictions
    retries = "data/read_retries"
    for ours, wanted in zip(records_of(folder), story.records, strict=True):
        assert ours | {retries: 0} == wanted | {retries: 0}


def test_the_report_and_a_dry_run_tell_of_the_mixture(story):
    page = (story.folder / "report.html").read_text()
    last = [r for r in story.records if r["split"] == "train"][-1]
    rows = re.findall(r"<code>long</code></td><td>(\d+)</td><td>75.0 %", page)
    assert rows == [str(last["data/rows/long"])] == [str(STEPS * 8 * 3 // 4)]
    assert "<code>short/score</code>" in page
    done = inline("train", f"--gin_file={story.folder / 'config.gin'}", "--dry_run")
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert (
        "objective seq2seq, rows of 32 tokens (inputs 20, targets 12), what is given "
        "sees itself whole"
    ) in words
    assert "mixture long 75 %, short 25 %, never 0 %" in words
    tokens = sum(
        part.num_tokens(feature)
        for task in SIZES
        for part in [open_store(story.store).split(task, "train")]
        for feature in part.features
    )
    assert f"data {tokens / 1000:.3g}k tokens in an epoch of 3 Tasks" in words


@pytest.mark.slow
def test_a_run_that_died_before_its_last_score_is_scored_and_measured(story, tmp_path):
    folder = story.copy(tmp_path / "run", at_step=STEPS)
    (folder / "report.html").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    done = story.again(folder)
    assert done.code == 0, done.err
    assert f"{folder} is complete: step {STEPS} of {STEPS}" in done.out
    assert records_of(folder) == story.records
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_evaluate_on_another_mesh_finds_what_training_found(
    story, tmp_path, monkeypatch
):
    monkeypatch.setattr(Task, "predicts", True)
    folder = story.copy(tmp_path / "run", at_step=2)
    again = story.again(folder)
    assert again.code == 0, again.err
    wanted = records_of(folder)[-1]
    assert wanted["metric/short/ids"] > 0
    before = predictions_of(folder)
    done = inline(
        *("evaluate", f"--model_dir={folder}", "--metrics=on"),
        *("--gin.MESH_DATA=2", "--gin.MESH_EXPERT=2", "--gin.SIMULATED_DEVICES=8"),
    )
    assert done.code == 0, done.err
    assert "transport: " in done.err
    assert_printed(done, wanted)
    for name, text in predictions_of(folder).items():
        pairs = zip(text.splitlines(), before[name].splitlines(), strict=True)
        for a, b in (map(json.loads, pair) for pair in pairs):
            assert a["prediction"] == b["prediction"]
            assert a["score"] == pytest.approx(b["score"], rel=1e-5)


def assert_printed(done: Done, record: dict) -> None:
    """Losses of all Tasks, and their metrics, as recorded."""
    for name in ("loss/nats_per_token", "accuracy/fraction"):
        assert re.search(rf"^{name} +{record[name]:.4f}$", done.out, re.MULTILINE)
    for task in SIZES:
        nats = record[f"loss/nats_per_token/{task}"]
        assert re.search(rf"^{task} +{nats:.4f} ", done.out, re.MULTILINE)
    for name in (name for name in record if name.startswith("metric/")):
        (shown,) = re.findall(rf"^{name} +(\S+)$", done.out, re.MULTILINE)
        assert float(shown) == pytest.approx(record[name], rel=1e-5, abs=1e-4)


TEXT, SHORTER = {"TASK_FEATURE_LENGTHS": {"targets": 32}}, {"inputs": 32, "targets": 24}
# In one layer no target sees what given tokens saw.
BIDIRECTIONAL = {
    "PREFIX_ATTENTION": "bidirectional",
    "NUM_LAYERS": 2,
    "MOE_EVERY": 2,
}
PREFIXES = {"OBJECTIVE": "prefix_lm", **TEXT}
SCHEDULE = {
    0: {"long": 1, "short": 0, "never": 0},
    STEPS - 2: {"long": 0, "short": 1, "never": 0},
}
RUNS = {
    "prefix_lm": PREFIXES,
    "bidirectional": {**PREFIXES, **BIDIRECTIONAL},
    "span_corruption": {
        "OBJECTIVE": "span_corruption",
        "TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16},
    },
    "ul2": {
        "OBJECTIVE": "ul2",
        **BIDIRECTIONAL,
        "TASK_FEATURE_LENGTHS": SHORTER,
    },
    "stream": {"PACKING": "stream", **TEXT},
    "proportional": {
        "MIXTURE_WEIGHTING": "proportional",
        "MIXTURE_RATES": {},
        "MIXTURE_TEMPERATURE": 2.0,
        "MIXTURE_CAP_TOKENS": 500,
        **TEXT,
    },
    "schedule": {"MIXTURE_RATES": {}, "MIXTURE_SCHEDULE": SCHEDULE, **TEXT},
    "seq2seq": {**PAIRS, **BIDIRECTIONAL},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", RUNS)
def test_every_objective_and_mixture_trains_moves_resumes_and_is_scored(
    stores, story, tmp_path, kind
):
    """In microbatches on four devices, then whole on one: the same to rounding."""
    store = stores["pairs" if kind == "seq2seq" else "text"]
    four = {"MESH_DATA": 2, "MESH_EXPERT": 2, "SIMULATED_DEVICES": 8, "MICROBATCHES": 2}
    folder = tmp_path / "run"
    with watching() as reads:
        done = train(story.place, store, folder, **RUNS[kind], **four)
    assert done.code == 0, done.err
    whole = records_of(folder)
    if kind != "proportional":  # whose third Task has a share
        assert_told_what_it_read(folder, reads)
    scored = inline(
        *("evaluate", f"--model_dir={folder}", "--metrics=off", "--gin.MESH_DATA=1"),
        *("--gin.MESH_EXPERT=1", "--gin.MICROBATCHES=1"),
    )
    assert scored.code == 0, scored.err
    assert_printed(scored, whole[-1])
    for step in range(3, STEPS + 1):
        shutil.rmtree(folder / "checkpoints" / str(step), ignore_errors=True)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    again = train(story.place, store, folder, **RUNS[kind], **four)
    assert again.code == 0, again.err
    assert records_of(folder) == whole
    on_one = train(story.place, store, moved, **RUNS[kind])
    assert on_one.code == 0, on_one.err
    for a, b in zip(records_of(moved), whole, strict=True):
        assert a.keys() == b.keys()
        for name in (n for n in a if n.startswith(("loss/", "data/", "ledger/"))):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)


@pytest.mark.slow
def test_gradients_of_prefixes_are_those_of_targets_on_any_mesh_in_any_pieces(stores):
    """Rows have different numbers of targets, and padding is of any content."""
    data = memory_store.settings("seq2seq", prefix_attention="bidirectional")
    data = dataclasses.replace(data, task_feature_lengths={"inputs": 20, "targets": 12})
    rows = batches.training(
        open_store(stores["pairs"]),
        data,
        MixtureSettings(rates=RATES),
        batch_size=16,
        seed=0,
    )
    batch = rows.read(0, 0, 16)
    weight_BL, real_BL = batch["decoder_loss_weights"], batch["decoder_segment_ids"] > 0
    assert len(set(weight_BL.sum(axis=1).tolist())) > 3
    model = dataclasses.replace(
        scored.MODEL, num_layers=2, vocab_size=rows.tasks[0].part.vocabulary.size
    )
    router = dataclasses.replace(scored.ROUTER, group_size=8)
    specs = inventory.specs(architecture.describe(model, router))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32), specs
    )

    def learnt(name: str, microbatches: int, batch) -> tuple:
        mesh = make_mesh(MESHES[name])
        learner = Learner(
            build(model, router, scored.EXECUTION, mesh),
            *(None, None, LossSettings(), microbatches, 0),
        )

        def loss(params, batch):
            sums, _ = batch_sums(params, batch, jax.random.key(0), learner)
            value, metrics = losses.total(sums, learner.loss)
            return value, metrics["loss/nats_per_token"]

        with jax.set_mesh(mesh):
            placed = jax.device_put(batch, rules.sharding(mesh, ("batch", "length")))
            return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params, placed))

    gradients, nats = learnt("d1", 1, batch)
    other = {name: feature.copy() for name, feature in batch.items()}
    token_BL = rng.integers(1, 200, real_BL.shape).astype(np.int32)
    targets = other["decoder_target_tokens"]
    targets[weight_BL == 0] = token_BL[weight_BL == 0]
    other["decoder_input_tokens"][~real_BL] = token_BL[~real_BL]
    causal = {k: v for k, v in batch.items() if k != "decoder_causal_attention"}
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradients))
    assert abs(learnt("d1", 1, causal)[1] - nats) > 1e-3, (
        "prefixes matter, in two layers"
    )
    for mesh, microbatches, changed in (
        ("d1", 4, batch),
        ("d4e2", 1, batch),
        ("d4e2", 2, other),
    ):
        found, found_nats = learnt(mesh, microbatches, changed)
        assert found_nats == pytest.approx(nats, rel=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-6 * largest
            ),
            found,
            gradients,
        )
