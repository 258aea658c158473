"""Scores text by how much it resembles good text, and keeps most of what scores well.

GLaM's recipe (arXiv:2112.06905, section 3): a linear classifier of hashed features
tells curated text (Wikipedia, books, selected pages) from raw pages; each raw page
is then kept or dropped by a draw from a Pareto distribution, so that some pages of low
score stay and the data is not only what the classifier likes.

Features are words and pairs of neighbouring words. In Chinese and Japanese every
character counts as a word, so that pairs are the words of two characters; character
n-grams would serve all scripts alike, but take scikit-learn four times as long. A
feature counts once per document, however often it is repeated.
"""

import dataclasses
import functools
import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import StoreError
from tasks.quality.packages import quality_packages

_USE = "scoring the quality of text"
_RECIPE = "words-1-2/blake2b"  # changes whenever the same text gets other features
_BUCKETS = 2**18
_CHARACTERS = 5_000  # of a document that count: bounds time and memory
_BATCH = 512  # documents whose features are held at once
_EPOCHS = 3
# Of the squared norm. With less, what the classifier learnt from is known by heart: raw
# text of good quality among it then scores low.
_REGULARISATION = 1e-5
_HELD_OUT = 5  # one document in so many is held out
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = rf"[{_CJK}]|[^\W{_CJK}]+"


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A linear model of hashed words.

    Attributes:
        weights: float32[2^18], of each hashed feature.
        bias: logit of a text without any.
    """

    weights: np.ndarray
    bias: float

    @property
    def fingerprint(self) -> str:
        """Stands for everything that decides a score."""
        state = hashlib.sha256(_RECIPE.encode())
        state.update(np.float64(self.bias).tobytes())
        state.update(self.weights.tobytes())
        return state.hexdigest()[:16]

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """Returns float64[texts], from 0 for raw to 1 for good.

        A score depends on its text alone: on the first 5,000 characters of it.

        Raises:
            StoreError: scikit-learn is not installed.
        """
        scores = [np.empty(0)]
        for batch in _batches(texts):
            logits = features(batch) @ self.weights + self.bias
            scores.append(1 / (1 + np.exp(-logits.astype(np.float64))))
        return np.concatenate(scores)

    def to_bytes(self) -> bytes:
        """Returns the content of an .npz file that holds arrays alone: about 1 MB."""
        file = io.BytesIO()
        np.savez(
            file,
            recipe=np.array(_RECIPE),
            weights=self.weights,
            bias=np.float64(self.bias),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Classifier":
        """Reads the classifier that `to_bytes` wrote.

        Raises:
            StoreError: it is something else, is damaged, or was made by a version of
                Switchyard that computes other features.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                recipe = str(file["recipe"])
                weights, bias = file["weights"], float(file["bias"])
        except Exception as error:  # zipfile, zlib and numpy each raise their own
            raise StoreError(
                f"a quality classifier of {len(content):,} bytes cannot be read: "
                f"{type(error).__name__}: {error}. Remove it and prepare again"
            ) from None
        if recipe != _RECIPE or weights.shape != (_BUCKETS,):
            raise StoreError(
                f"a quality classifier has features {recipe!r} in {weights.shape} "
                f"buckets; this version computes {_RECIPE!r} in ({_BUCKETS},). Remove "
                "it and prepare again"
            )
        return cls(weights, bias)


@dataclasses.dataclass(frozen=True)
class Report:
    """How well good and raw text are told apart, on documents held out for it.

    Attributes:
        learnt: documents that the classifier learnt from.
        good_scores: float64, scores of the good documents held out, ascending.
        raw_scores: float64, scores of the raw documents held out, ascending.
        auc: probability that a good document scores above a raw one.
        fingerprint: digest of the classifier.
    """

    learnt: int
    good_scores: np.ndarray
    raw_scores: np.ndarray
    auc: float
    fingerprint: str

    def histogram(self, bins: int = 20) -> dict[str, list[int]]:
        """Counts the scores of either side in equal parts of 0 to 1."""
        return {
            "good": np.histogram(self.good_scores, bins, (0, 1))[0].tolist(),
            "raw": np.histogram(self.raw_scores, bins, (0, 1))[0].tolist(),
        }

    def kept(self, alpha: float) -> dict[str, float]:
        """Says the expected fraction of either side that is kept."""
        return {
            "good": float(_keep_probability(self.good_scores, alpha).mean()),
            "raw": float(_keep_probability(self.raw_scores, alpha).mean()),
        }

    def to_json(self, alpha: float) -> dict[str, Any]:
        """Returns all that a manifest records, of plain types."""
        return {
            "auc": self.auc,
            "learnt_documents": self.learnt,
            "heldout_documents": len(self.good_scores) + len(self.raw_scores),
            "score_histogram": self.histogram(),
            "pareto_alpha": alpha,
            "kept_fraction": self.kept(alpha),
            "classifier": self.fingerprint,
        }


def sample(texts: Iterable[str], size: int, *, seed: int) -> list[str]:
    """Chooses texts by their digests, wherever they stand; equal texts count once.

    The sample of several samples of parts is that of the whole, so that workers can
    sample shard by shard.

    Args:
        texts: read once; `size` of them, cut to 5,000 characters, are held.
        size: how many to choose at most.
        seed: another one chooses others.
    """
    chosen: dict[bytes, str] = {}
    worst: list[tuple[int, bytes]] = []  # a heap whose head is to go first
    for text in texts:
        text = text[:_CHARACTERS]
        key = _key(text, seed)
        rank = -int.from_bytes(key, "big")
        if key in chosen or (len(worst) == size and rank <= worst[0][0]):
            continue
        chosen[key] = text
        heapq.heappush(worst, (rank, key))
        if len(worst) > size:
            del chosen[heapq.heappop(worst)[1]]
    return [chosen[key] for key in sorted(chosen)]


def train(
    good_texts: Sequence[str], raw_texts: Sequence[str], *, seed: int
) -> tuple[Classifier, Report]:
    """Fits a classifier of good against raw text, and judges it on a fifth of both.

    Logistic regression by stochastic gradient descent; memory holds the features,
    about 1 byte per byte of text. Either side weighs as much as the other, whatever
    its size. The texts' order does not matter: their digests order them.

    Args:
        good_texts: text of the kind that is wanted.
        raw_texts: text of the kind that is to be filtered.
        seed: salt of the digests that order the texts, and so choose what is held out.
    Raises:
        StoreError: a side has fewer than ten different documents, or scikit-learn is
            not installed.
    """
    with quality_packages(_USE):
        from sklearn.linear_model import SGDClassifier
        from sklearn.metrics import roc_auc_score
    sides = [sample(side, len(side), seed=seed) for side in (raw_texts, good_texts)]
    for name, side in zip(("raw", "good"), sides, strict=True):
        if len(side) < 10:
            raise StoreError(
                f"a quality classifier cannot learn from {len(side)} different "
                f"{name} documents: it needs at least 10. Set QUALITY_TASK to a Task "
                "with more text, raise QUALITY_SAMPLE, or set QUALITY_TASK = ''"
            )
    raw_heldout, good_heldout = (side[: len(side) // _HELD_OUT] for side in sides)
    raw, good = (side[len(side) // _HELD_OUT :] for side in sides)
    labelled = sorted(
        [(text, 0) for text in raw] + [(text, 1) for text in good],
        key=lambda example: _key(example[0], seed),
    )
    weight = np.array([1 / len(raw), 1 / len(good)]) * len(labelled) / 2
    model = SGDClassifier(
        loss="log_loss", alpha=_REGULARISATION, random_state=seed, shuffle=False
    )
    batches = [
        (features([text for text, _ in batch]), np.array([y for _, y in batch]))
        for batch in _batches(labelled)
    ]
    for X, y in batches * _EPOCHS:
        model.partial_fit(X, y, classes=[0, 1], sample_weight=weight[y])
    classifier = Classifier(
        model.coef_[0].astype(np.float32), float(model.intercept_[0])
    )
    good_scores = np.sort(classifier.score(good_heldout))
    raw_scores = np.sort(classifier.score(raw_heldout))
    truth = np.repeat([1, 0], [len(good_scores), len(raw_scores)])
    auc = float(roc_auc_score(truth, np.concatenate([good_scores, raw_scores])))
    return classifier, Report(
        len(labelled), good_scores, raw_scores, auc, classifier.fingerprint
    )


def keep(score: float, document_digest: bytes, alpha: float, seed: int) -> bool:
    """Decides whether a document stays: a draw X of Pareto(alpha) exceeds 1 - score.

    GPT-3's rule, `np.random.pareto(alpha) > 1 - score` (arXiv:2005.14165, appendix
    A), which is P = (2 - score)^-alpha. The draw is a function of the document and
    the seed, so that whoever decides, and in whatever order, decides alike.

    Args:
        score: quality of the document, in [0, 1].
        document_digest: stands for its text: `duplicates.digest`.
        alpha: shape; 9, as in GPT-3, keeps 0.2 % of documents of score 0.
        seed: number that, with the digest, decides the draw.
    """
    key = hashlib.blake2b(b"keep %d " % seed + document_digest, digest_size=8).digest()
    uniform = (int.from_bytes(key, "big") + 0.5) / 2**64
    return uniform ** (-1 / alpha) - 1 > 1 - score


def draw_scores(report: Report, path: str | Path, *, alpha: float = 9.0) -> None:
    """Draws the scores of held-out documents, and what a Pareto draw keeps of them.

    Args:
        report: result of `train`.
        path: file of the figure; its ending says the format.
        alpha: the shape that is marked.
    """
    from matplotlib.figure import Figure

    blue, orange = "#2f6db5", "#d9822b"
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, 1, 21)
    for name, scores, colour in (
        ("raw", report.raw_scores, orange),
        ("good", report.good_scores, blue),
    ):
        weights = np.full(len(scores), 100 / len(scores))
        label = f"{name}: {len(scores):,} documents"
        left.hist(scores, edges, weights=weights, color=colour, alpha=0.6, label=label)
    left.set(xlabel="score", ylabel="% of held-out documents", xlim=(0, 1))
    left.set_title(f"Held-out AUC {report.auc:.3f}")
    shapes = np.geomspace(0.5, 32, 40)
    for name, colour in (("raw", orange), ("good", blue)):
        curve = [100 * report.kept(shape)[name] for shape in shapes]
        right.plot(shapes, curve, color=colour, label=name)
        kept = 100 * report.kept(alpha)[name]
        right.plot([alpha], [kept], "o", color=colour, clip_on=False)
        words = f"{kept:.0f} %" if kept >= 10 else f"{kept:.2g} %"
        place = (6, -14 if kept > 90 else 5)  # inside the axes
        right.annotate(words, (alpha, kept), place, textcoords="offset points")
    right.axvline(alpha, color="0.6", linewidth=0.8, linestyle=":")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="shape of the Pareto draw", ylabel="% kept", ylim=(0, 100))
    right.set_title(f"Kept by the draw; the dots are at {alpha:g}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def features(texts: Sequence[str]) -> Any:
    """Returns the hashed words of each text: a sparse float32[texts, 2^18] of norm 1.

    Raises:
        StoreError: scikit-learn is not installed.
    """
    return _vectorizer().transform([text[:_CHARACTERS] for text in texts])


@functools.cache
def _vectorizer() -> Any:
    with quality_packages(_USE):
        from sklearn.feature_extraction.text import HashingVectorizer
    return HashingVectorizer(
        n_features=_BUCKETS,
        ngram_range=(1, 2),
        token_pattern=_WORD,
        binary=True,
        dtype=np.float32,
    )


def _keep_probability(scores: np.ndarray, alpha: float) -> np.ndarray:
    return (2 - scores) ** -alpha


def _key(text: str, seed: int) -> bytes:
    """Orders texts at random, and alike wherever it is called."""
    content = text.encode("utf-8", "surrogatepass")
    salt = seed.to_bytes(16, "little", signed=True)
    return hashlib.blake2b(content, digest_size=16, salt=salt).digest()


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
