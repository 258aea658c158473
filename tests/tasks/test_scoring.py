"""Metric functions of SeqIO Tasks, compared with SeqIO's own Evaluator."""

import dataclasses
import json

import numpy as np
import pytest

from tasks import scoring
from tasks.errors import StoreError
from tasks.prepare import prepare
from tasks.settings import DataSettings
from tasks.store import open_store

MODULE = "tasks_with_metrics"
LENGTHS = {"inputs": 12, "targets": 10}


def settings(folder, name="measured", **changes) -> DataSettings:
    values = {"vocabulary": "bytes", **changes}
    return DataSettings(
        mixture_or_task_name=name,
        mixture_or_task_module=MODULE,
        task_feature_lengths=LENGTHS,
        store_dir=str(folder / "store"),
        objective="seq2seq",
        **values,
    )


def loaded(data: DataSettings):
    prepare(data, allowed_modules=(MODULE,))
    return scoring.load(open_store(data.store_dir, data), data, (MODULE,))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The examples of the Task whose metrics can be computed."""
    (task,) = loaded(settings(tmp_path_factory.mktemp("measured")))
    return task


def kept_pairs() -> list[tuple[str, str]]:
    from tasks_with_metrics import PAIRS

    return [pair for pair in PAIRS["validation"] if pair[1]]


def predictions() -> list[str]:
    """Some right, some wrong, one empty, one not ASCII."""
    said = [target for _, target in kept_pairs()]
    said[1], said[2], said[3] = "nǐ HǍO, shìjiè", "", "Hello, too"
    return said


SCORE_N = -np.array([1.5, 0.25, 3.0, 0.125, 7.0, 2.0])


def by_seqio(name: str) -> dict:
    """What SeqIO's Evaluator computes from the same outputs."""
    import seqio

    evaluator = seqio.Evaluator(
        name,
        seqio.EncDecFeatureConverter(pack=False),
        sequence_length={"inputs": 64, "targets": 64},
    )
    vocabulary, number = seqio.ByteVocabulary(), len(kept_pairs()) + 1
    said, scores = predictions(), SCORE_N.tolist()
    said.insert(2, "")  # the example that is not stored weighs 2
    scores.insert(2, 0.0)
    rows = [(vocabulary.encode(text) + [1] + [0] * 64)[:64] for text in said]
    metrics, _ = evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda dataset: list(enumerate(rows)),
        score_fn=lambda dataset: list(zip(range(number), scores, strict=True)),
    )
    found = metrics.result()[name]
    return {k: getattr(v, "value", v) for k, v in found.items() if k != "shown"}


def test_the_metrics_of_a_task_are_those_that_seqio_computes(measured):
    ids = [measured.vocabulary.encode(text) for text in predictions()]
    found = measured.metrics(ids, SCORE_N)
    expected = by_seqio("measured")
    # SeqIO has one example more, of which target and prediction are both empty.
    expected["equal"] -= 2
    assert expected["length"] == 7 + 700
    expected |= {"length": 6 + 600, "largest": -0.125}  # of 0.0 for that example
    assert found.pop("shown") is None  # a text
    assert found == pytest.approx(expected)
    # Weights are the places in the source: 0, 1, 3, 4, 5, 6; one case-folds to equal.
    assert found["equal"] == 0 + 1 + 5 + 6
    assert found["score"] == -(0.25 + 3 * 3.0 + 4 * 0.125 + 5 * 7.0 + 6 * 2.0)


def test_a_vocabulary_that_the_task_does_not_have_gives_the_same_metrics(
    measured, tmp_path
):
    data = settings(tmp_path, vocabulary="sentencepiece", vocabulary_size=320)
    (task,) = loaded(data)
    assert task.vocabulary.kind == "sentencepiece"
    expected, found = (
        t.metrics([t.vocabulary.encode(text) for text in predictions()], SCORE_N)
        for t in (measured, task)
    )
    assert found == expected
    assert task.texts == measured.texts


def test_a_task_that_keeps_its_own_tokens_is_told_of_them(measured, tmp_path):
    (task,) = loaded(settings(tmp_path, vocabulary="task"))
    assert not task.reads_bytes
    ids = [task.vocabulary.encode(text) for text in predictions()]
    assert task.metrics(ids, SCORE_N) == measured.metrics(ids, SCORE_N)
    assert task.texts == measured.texts


def test_examples_are_those_of_the_store_cut_to_their_lengths(measured):
    pairs = kept_pairs()
    assert measured.texts == pairs
    for feature, side in (("inputs", 0), ("targets", 1)):
        for ids, pair in zip(getattr(measured, feature), pairs, strict=True):
            whole = [byte + 3 for byte in pair[side].encode()] + [1]
            assert ids.tolist() == whole[: LENGTHS[feature]]
    assert [int(e["weight"]) for e in measured.examples] == [0, 1, 3, 4, 5, 6]


def test_records_say_what_was_asked_wanted_and_predicted(measured):
    ids = [measured.vocabulary.encode(text) for text in predictions()]
    lines = [json.dumps(record) for record in measured.records(ids, SCORE_N)]
    read = [json.loads(line) for line in lines]
    assert read[1] == {
        "index": 1,
        "inputs": "你好，世界",
        "target": "Nǐ hǎo, shìjiè",
        "prediction": "nǐ HǍO, shìjiè",
        "score": -0.25,
    }
    assert [record["prediction"] for record in read] == predictions()
    (unpredicted, *_) = measured.records(None, SCORE_N)
    assert "prediction" not in unpredicted


def test_tasks_of_a_mixture_without_metrics_are_left_out(tmp_path):
    (task,) = loaded(settings(tmp_path, "mixed"))
    assert task.name == "measured"


def test_what_a_metric_asks_for_in_vain_is_said(tmp_path):
    (task,) = loaded(settings(tmp_path, "measured_by_aux"))
    assert not task.predicts
    assert set(task.metrics(None, SCORE_N)) == {"score"}
    (note,) = task.notes
    assert "'measured_by_aux' asks for prediction_with_aux" in note


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("measured_twice", "two metrics 'score'"),
        ("measured_badly", "a metric of task 'measured_badly' failed: ZeroDivision"),
    ],
)
def test_a_fault_of_a_metric_is_one_line(tmp_path, name, fault):
    (task,) = loaded(settings(tmp_path, name))
    ids = [task.vocabulary.encode(text) for text in predictions()]
    with pytest.raises(StoreError, match=fault) as raised:
        task.metrics(ids, SCORE_N)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda pairs: pairs[:-1], "has 5 examples, and the store 6"),
        (lambda pairs: [*pairs, ("new", "New")], "example 6 .* is not the one"),
        (lambda pairs: [("hello", "Hullo"), *pairs[1:]], "example 0 .* is not the one"),
    ],
    ids=["fewer", "more", "others"],
)
def test_a_store_of_other_examples_is_refused(tmp_path, monkeypatch, change, fault):
    import tasks_with_metrics

    data = settings(tmp_path)
    prepare(data, allowed_modules=(MODULE,))
    store = open_store(data.store_dir, data)
    changed = change(tasks_with_metrics.PAIRS["validation"])
    monkeypatch.setitem(tasks_with_metrics.PAIRS, "validation", changed)
    with pytest.raises(StoreError, match=fault):
        scoring.load(store, data, (MODULE,))


def test_text_without_inputs_is_said_to_have_no_metrics(tmp_path):
    data = dataclasses.replace(
        settings(tmp_path, "measured_text"),
        objective="causal_lm",
        task_feature_lengths={"targets": 10},
    )
    (task,) = loaded(data)
    assert not task.examples
    assert "'measured_text' has no inputs" in task.notes[0]
