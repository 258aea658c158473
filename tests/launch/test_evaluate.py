"""Held-out losses and metrics, compared with one document at a time."""

import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import scored_for_tests as scored
from commands import ROOT, Place
from scored_for_tests import LANGUAGES, LENGTHS, SPLITS, TASKS, B, L

from launch.evaluation import continuing, heldout, task_metrics
from moe.testing.whole_arrays import forward
from tasks import scoring
from tasks.errors import StoreError

CAUSAL = dataclasses.replace(
    scored.DATA, objective="causal_lm", task_feature_lengths={"targets": L}
)


@functools.cache
def compiled_forward():
    return jax.jit(functools.partial(forward, scored.model_of("d1")))


def log_probabilities(rows) -> np.ndarray:
    """Log-softmax for every next token, each row one document, shifted right."""
    input_BL = np.zeros((B, L), np.int32)
    for input_L, row in zip(input_BL, rows, strict=False):
        input_L[1 : len(row) + 1] = row[: L - 1]
    batch = {
        "decoder_input_tokens": input_BL,
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        "decoder_segment_ids": np.ones((B, L), np.int32),
    }
    logits_BLV, _ = compiled_forward()(scored.parameters(), batch, np.arange(B))
    logits_BLV = np.asarray(logits_BLV, np.float64)
    return logits_BLV - np.log(np.exp(logits_BLV).sum(axis=-1, keepdims=True))


def nats_of(given, wanted) -> float:
    """Cost of the tokens of one document, given others before them."""
    log_p_LV = log_probabilities([[*given, *wanted]])[0]
    return -sum(log_p_LV[len(given) + i, token] for i, token in enumerate(wanted))


@functools.cache
def nats_of_documents(task: str, objective: str) -> tuple[list[float], list[int]]:
    """Nats and tokens of each stored document."""
    nats, tokens = [], []
    for inputs, targets in zip(*SPLITS[task].documents.values(), strict=True):
        if objective == "seq2seq":
            pieces = [(inputs[: LENGTHS["inputs"]], targets[: LENGTHS["targets"]])]
        else:
            pieces = [([], targets)]
        nats.append(sum(nats_of(*piece) for piece in pieces))
        tokens.append(sum(len(wanted) for _, wanted in pieces))
    return nats, tokens


@pytest.mark.parametrize("data", [scored.DATA, CAUSAL], ids=lambda d: d.objective)
def test_losses_of_tasks_and_languages_are_those_of_single_documents(data):
    found = scored.heldout("d4e2", data)
    expected, together = {}, np.zeros(3)
    for task, split in SPLITS.items():
        nats_D, tokens_D = map(np.array, nats_of_documents(task, data.objective))
        cells = {task: (np.ones(len(nats_D), bool), split.manifest.bytes_per_token)}
        if split.language_D is not None:
            for number, name in enumerate(LANGUAGES):
                per_token = 3 if number == 0 else 2
                cells[f"{task}/{name or 'unknown'}"] = (
                    split.language_D == number,
                    per_token,
                )
        for name, (of_D, per_token) in cells.items():
            nats, tokens = nats_D[of_D].sum(), tokens_D[of_D].sum()
            expected[f"loss/nats_per_token/{name}"] = nats / tokens
            bits = nats / math.log(2) / (tokens * per_token)
            expected[f"loss/bits_per_byte/{name}"] = bits
            if name == task:
                together += nats, tokens, tokens * per_token
    nats, tokens, text_bytes = together
    expected["loss/nats_per_token"] = nats / tokens
    expected["loss/bits_per_byte"] = nats / math.log(2) / text_bytes
    expected["tokens"] = tokens
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    assert not {n for n in found if n.count("/") > 1} - expected.keys()


def test_languages_are_read_ahead_with_the_rows_they_are_of(monkeypatch):
    read = scored.note_documents(monkeypatch)
    scored.heldout("d4e2", CAUSAL)
    assert read, "one Task says the languages of its documents"
    assert threading.main_thread() not in {thread for thread, _ in read}


def test_where_not_all_text_is_predicted_there_are_no_bits_per_byte():
    data = dataclasses.replace(CAUSAL, objective="prefix_lm")
    found = scored.heldout("d4e2", data)
    assert not [name for name in found if "bits_per_byte" in name]
    assert found["tokens"] < SPLITS["many"].num_tokens() + SPLITS["few"].num_tokens()
    lines = heldout.table(found, scored.Store(), data)
    assert not [line for line in lines if "byte " in line or "baseline" in line]
    assert lines[-1].split()[::2] == ["few", "–"]


def test_a_number_of_batches_is_of_each_task():
    expected, rows = {}, {}
    for task, split in SPLITS.items():
        expected[task], rows[task], room = 0, 0, 0
        for inputs, targets in zip(*split.documents.values(), strict=True):
            size = min(len(inputs), 4) + min(len(targets), 4)
            if size > room:
                rows[task], room = rows[task] + 1, L
            room -= size
            if rows[task] <= B:
                expected[task] += min(len(targets), 4)
    assert rows["many"] > B > rows["few"]
    found = scored.heldout("d4e2", num_batches=1)
    assert found["tokens"] == expected["many"] + expected["few"]


def test_the_table_has_a_line_for_each_task_and_language():
    found = scored.heldout("d4e2")
    lines = heldout.table(found, scored.Store(), scored.DATA)
    assert "gzip baseline            4.0000 bits per byte" in lines
    start = lines.index("held out      nats/token  bits/byte")
    names = [line.split()[0] for line in lines[start + 1 :]]
    assert names == ["many", "many/en", "many/zh", "many/unknown", "few"]
    _, nats, bits = lines[-1].split()
    assert nats == f"{found['loss/nats_per_token/few']:.4f}"
    assert bits == f"{found['loss/bits_per_byte/few']:.4f}"


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(scoring, "load", lambda *_: TASKS)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_example_is_predicted_and_scored_as_if_it_were_alone(tmp_path, stand_ins):
    metrics = scored.task_metrics("d4e2", tmp_path)
    run = scored.make_run("d4e2", tmp_path)
    with jax.set_mesh(run.mesh):
        found = metrics(scored.parameters(), 7)
    many, few = (read_lines(tmp_path / f"predictions/{t}-7.jsonl") for t in SPLITS)
    assert [str(tmp_path / f"predictions/{t}-7.jsonl") for t in SPLITS] == metrics.paths
    assert metrics.notes == ["left out"]
    for task, lines in zip(TASKS, (many, few), strict=True):
        assert [line["index"] for line in lines] == list(range(len(task.examples)))
        scores = [line["score"] for line in lines]
        expected = [-n for n in nats_of_documents(task.name, "seq2seq")[0]]
        np.testing.assert_allclose(scores, expected, rtol=2e-5)
    assert len(many) == 11, "more than one batch"
    ended = []
    for line, inputs in zip(many, TASKS[0].inputs, strict=True):
        drawn = line["prediction"]
        log_p_LV = log_probabilities([[*inputs, *drawn]])[0]
        likeliest = 1 + log_p_LV[len(inputs) :, 1:12].argmax(axis=-1)
        ended.append(len(drawn) < LENGTHS["targets"])
        stop = [1] if ended[-1] else []
        wanted = [*drawn, *stop]
        assert likeliest[: len(wanted)].tolist() == wanted[: len(likeliest)]
    assert 0 < sum(ended) < len(ended)
    assert [line["prediction"] for line in few] == [None] * 3
    assert found == {
        "metric/many/score": pytest.approx(
            sum(i * line["score"] for i, line in enumerate(many, 1))
        ),
        "metric/many/ids": sum(
            i * sum(line["prediction"]) for i, line in enumerate(many, 1)
        ),
        "metric/few/score": pytest.approx(
            sum(i * line["score"] for i, line in enumerate(few, 1))
        ),
    }


def test_a_prediction_stops_before_its_first_end():
    ids = scored.Vocabulary()
    assert continuing.until_end([5, 6, 1, 7, 1], ids) == [5, 6]
    assert continuing.until_end([1, 5], ids) == []
    assert continuing.until_end(np.array([5, 6]), ids) == [5, 6]


def test_a_fault_in_reading_is_raised_by_every_process(tmp_path, monkeypatch):
    def load(*_):
        raise StoreError("no such Task")

    monkeypatch.setattr(scoring, "load", load)
    with pytest.raises(StoreError, match="no such Task"):
        scored.task_metrics("d1", tmp_path)(None, 0)
    monkeypatch.setattr(scoring, "load", lambda *_: TASKS)
    for numbers, fault in (
        ([0, 1], "process 1 cannot read"),
        ([0, 7], "cannot read"),
    ):
        monkeypatch.setattr(
            task_metrics, "_on_all_processes", lambda _, n=numbers: np.array(n)
        )
        with pytest.raises(StoreError, match=fault):
            scored.task_metrics("d1", tmp_path)(None, 0)
    answers = iter([np.array([0, 0]), np.array([5, 6])])
    monkeypatch.setattr(task_metrics, "_on_all_processes", lambda _: next(answers))
    with pytest.raises(StoreError, match="read different held-out examples"):
        scored.task_metrics("d1", tmp_path)(None, 0)


@pytest.mark.slow
def test_two_processes_end_and_find_what_one_finds(tmp_path, stand_ins):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, scored.__file__, str(i), "2", port, str(tmp_path / "two")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "4"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    two, other = (json.loads(out.splitlines()[-1]) for out in outs)
    assert two == other
    run = scored.make_run("d4e2", tmp_path)
    with jax.set_mesh(run.mesh):
        one = scored.heldout("d4e2") | scored.task_metrics("d4e2", tmp_path / "one")(
            scored.parameters(), 5
        )
    assert two.keys() == one.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-6, err_msg=name)
    for task in SPLITS:
        name = f"predictions/{task}-5.jsonl"
        for a, b in zip(
            *(read_lines(tmp_path / n / name) for n in ("one", "two")), strict=True
        ):
            assert a["prediction"] == b["prediction"]
            assert a["score"] == pytest.approx(b["score"], rel=1e-6)


SHAPES = {
    "prefix": {"PREFIX_ATTENTION": "bidirectional"},
    "two_stacks": {
        "ARCHITECTURE": "encoder_decoder",
        "POSITIONS": "relative",
        "GROUP_SIZE": 24,
        "ENCODER_GROUP_SIZE": 40,
        "NUM_BEAMS": 2,
        "TRAIN_STEPS": 120,
        "TASK_METRICS_PERIOD": 120,
    },
}


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_of_a_seqio_task_are_the_same_while_training_and_afterwards(
    shape, tmp_path
):
    place, folder = Place(tmp_path), tmp_path / "run"
    knobs = place.knobs(
        folder,
        MIXTURE_OR_TASK_NAME="measured",
        MIXTURE_OR_TASK_MODULE="tasks_with_metrics",
        OBJECTIVE="seq2seq",
        TASK_FEATURE_LENGTHS="{'inputs': 40, 'targets': 24}",
        LEARNING_RATE=0.01,
        SELF_CHECK="off",
        SAMPLE_PROMPT="再见",
        SAMPLE_TEMPERATURE=0,
        **{"TRAIN_STEPS": 60, "TASK_METRICS_PERIOD": 60, **SHAPES[shape]},
    )
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    done = place.run("train", *knobs, "--allow_module", **paths)
    assert done.code == 0, done.err
    assert "│Zàijiàn" in done.out, "it has learnt its three pairs"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (last,) = [r for r in map(json.loads, lines) if "metric/measured/score" in r]
    (predicted,) = (folder / "predictions").iterdir()
    before = read_lines(predicted)
    assert [line["target"] for line in before][1] == "Nǐ hǎo, shìjiè"
    assert (
        sum(len(line["prediction"]) for line in before)
        == (last["metric/measured/characters"])
    )
    predicted.unlink()
    scored_again = place.run(
        *("evaluate", f"--model_dir={folder}", "--allow_module", "--gin.MESH_DATA=2"),
        *("--gin.MESH_EXPERT=2", "--gin.SIMULATED_DEVICES=4"),
        **paths,
    )
    assert scored_again.code == 0, scored_again.err
    (shown,) = re.findall(r"metric/measured/score +(\S+)", scored_again.out)
    # Sums of log-probabilities on other devices, in another order.
    assert float(shown) == pytest.approx(last["metric/measured/score"], rel=1e-6)
    for a, b in zip(before, read_lines(predicted), strict=True):
        assert a | {"score": 0} == b | {"score": 0}
        assert a["score"] == pytest.approx(b["score"], rel=1e-5)
