"""Good text is told from raw text, and the draw that keeps it is GPT-3's."""

import io
import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import StoreError
from tasks.quality import classifier as quality

pytestmark = pytest.mark.fast


def prose(count: int) -> list[str]:
    """Returns pieces of 400 characters of the language reference."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return [text[400 * i : 400 * (i + 1)] for i in range(count)]


def code(count: int) -> list[str]:
    """Returns pieces of 400 characters of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "inspect", "pathlib", "tarfile", "typing")
    text = "\n".join((root / f"{name}.py").read_text() for name in names)
    return [text[400 * i : 400 * (i + 1)] for i in range(count)]


@pytest.fixture(scope="module")
def trained() -> tuple[quality.Classifier, quality.Report]:
    return quality.train(prose(400), code(300), seed=3)


def test_prose_is_told_from_code_on_documents_held_out(trained):
    classifier, report = trained
    assert 0.97 < report.auc <= 1
    assert report.learnt == 320 + 240
    assert (len(report.good_scores), len(report.raw_scores)) == (80, 60)
    # The probability that a good document scores above a raw one, by counting.
    pairs = [
        (g > r) + (g == r) / 2 for g in report.good_scores for r in report.raw_scores
    ]
    assert report.auc == pytest.approx(np.mean(pairs))
    good, raw = classifier.score(prose(440)[400:]), classifier.score(code(340)[300:])
    assert good.mean() > 0.8 > 0.2 > raw.mean()


def test_labels_that_say_nothing_give_an_auc_of_chance():
    texts = prose(400)
    _, report = quality.train(texts[::2], texts[1::2], seed=0)
    assert 0.3 < report.auc < 0.7


def test_a_side_of_few_documents_weighs_as_much_as_one_of_many():
    # Both are of one kind. Were documents of both sides to weigh alike, others of the
    # kind would be of the larger side with 0.94 to 0.97, whatever the seed.
    texts, unseen = prose(440), prose(640)[440:]
    many, few = [text for i, text in enumerate(texts) if i % 11], texts[::11]
    means = []
    for seed in range(4):
        classifier, _ = quality.train(many, few, seed=seed)
        means.append(classifier.score(unseen).mean())
    assert 0.5 < np.mean(means) < 0.8
    swapped, _ = quality.train(few, many, seed=0)
    np.testing.assert_allclose(swapped.score(unseen).mean(), 1 - means[0], atol=1e-3)


def test_chinese_is_told_apart_by_pairs_of_characters():
    # The same characters on both sides; only their order within words differs.
    rng = np.random.default_rng(0)
    words = ("天空", "河水", "学校", "老师", "春风", "山路", "故事", "城市")
    sides = [
        ["".join(rng.choice(side, 12)) + "。" for _ in range(150)]
        for side in (words, [word[::-1] for word in words])
    ]
    _, report = quality.train(*sides, seed=0)
    assert report.auc > 0.99


def test_training_depends_on_texts_and_seed_but_not_on_their_order(trained):
    rng = np.random.default_rng(0)
    good, raw = prose(400), code(300)
    again, _ = quality.train(
        [good[i] for i in rng.permutation(400)] + good[:50],
        [raw[i] for i in rng.permutation(300)],
        seed=3,
    )
    assert again.to_bytes() == trained[0].to_bytes()
    assert again.fingerprint == trained[0].fingerprint
    other, _ = quality.train(good, raw, seed=4)
    assert other.fingerprint != again.fingerprint


def test_a_score_does_not_depend_on_the_texts_beside_it(trained):
    classifier, _ = trained
    texts = [*prose(300), "", *code(300), "漢字 " * 5000]
    together = classifier.score(iter(texts))
    assert together.shape == (602,)
    assert together.dtype == np.float64
    for i in (0, 299, 300, 511, 512, 601):
        assert classifier.score([texts[i]])[0] == together[i]
    assert classifier.score([]).shape == (0,)
    # Only the beginning of a document counts.
    text = prose(1)[0] * 20
    assert classifier.score([text[:5000]]) == classifier.score([text])


def test_a_classifier_survives_as_plain_arrays(trained):
    classifier, _ = trained
    content = classifier.to_bytes()
    back = quality.Classifier.from_bytes(content)
    assert back.fingerprint == classifier.fingerprint
    texts = prose(10) + code(10)
    np.testing.assert_array_equal(back.score(texts), classifier.score(texts))
    for damaged in (b"", b"not a file", content[:-100], content[5000:]):
        with pytest.raises(StoreError, match="cannot be read"):
            quality.Classifier.from_bytes(damaged)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    with pytest.raises(StoreError, match="cannot be read"):
        quality.Classifier.from_bytes(bytes(flipped))
    file = io.BytesIO()
    np.savez(file, recipe="another", weights=classifier.weights, bias=0.0)
    with pytest.raises(StoreError, match="'another'"):
        quality.Classifier.from_bytes(file.getvalue())
    file = io.BytesIO()
    np.savez(file, recipe=np.array([{}], object), weights=0, bias=0)
    with pytest.raises(StoreError, match="pickle"):
        quality.Classifier.from_bytes(file.getvalue())


@pytest.mark.parametrize("alpha", [1.0, 9.0])
@pytest.mark.parametrize("score", [0.0, 0.5, 0.9, 1.0])
def test_the_draw_keeps_as_often_as_numpys_pareto_distribution(score, alpha):
    count = 4000
    kept = [
        quality.keep(score, i.to_bytes(16, "big"), alpha, seed=1) for i in range(count)
    ]
    draws = np.random.default_rng(0).pareto(alpha, 100_000) > 1 - score
    rate = draws.mean()
    assert np.mean(kept) == pytest.approx(rate, abs=4 * np.sqrt(rate / count))
    assert score < 1 or all(kept)


def test_the_draw_is_a_function_of_document_and_seed():
    digests = [bytes([i]) * 16 for i in range(200)]

    def kept(seed: int) -> list[bool]:
        return [quality.keep(0.9, digest, 9.0, seed) for digest in digests]

    assert kept(0) == kept(0) != kept(1)
    # A better score never loses a document.
    for digest in digests:
        decisions = [quality.keep(s, digest, 9.0, 0) for s in np.linspace(0, 1, 21)]
        assert decisions == sorted(decisions)


def test_a_sample_is_that_of_the_samples_of_its_parts():
    texts = [f"document {i % 700}" for i in range(1000)]
    whole = quality.sample(iter(texts), 50, seed=0)
    parts = [quality.sample(texts[i::3], 50, seed=0) for i in range(3)]
    assert whole == quality.sample(sum(parts, []), 50, seed=0)  # noqa: RUF017
    assert len(set(whole)) == 50
    assert set(whole) <= set(texts)
    assert whole != quality.sample(texts, 50, seed=1)
    assert set(quality.sample(texts, 2000, seed=0)) == set(texts)
    (cut,) = quality.sample(["x" * 10_000], 5, seed=0)
    assert len(cut) == 5000


def test_the_report_counts_scores_and_what_is_kept(trained, tmp_path):
    _, report = trained
    histogram = report.histogram(10)
    for side, scores in (("good", report.good_scores), ("raw", report.raw_scores)):
        expected = [0] * 10
        for score in scores:
            expected[min(int(score * 10), 9)] += 1
        assert histogram[side] == expected
    draws = np.random.default_rng(0).pareto(9.0, (2000, 1)) > 1 - report.raw_scores
    assert report.kept(9.0)["raw"] == pytest.approx(draws.mean(), abs=0.02)
    json.dumps(report.to_json(9.0), allow_nan=False)
    quality.draw_scores(report, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_documents_are_refused():
    with pytest.raises(StoreError, match="9 different good documents"):
        quality.train(prose(9) + prose(9), code(20), seed=0)
    with pytest.raises(StoreError, match="0 different raw documents"):
        quality.train(prose(20), [], seed=0)


def test_without_scikit_learn_one_is_told_what_to_install(monkeypatch):
    quality._vectorizer.cache_clear()
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(StoreError, match=r"pip install 'switchyard\[quality\]'"):
        quality.train(prose(20), code(20), seed=0)
    with pytest.raises(StoreError, match=r"pip install 'switchyard\[quality\]'"):
        quality.Classifier(np.zeros(2**18, np.float32), 0.0).score(["text"])
