"""Ranks labelled examples by how wrong their label looks.

Confident learning (arXiv:1911.00068, as cleanlab does it): a classifier that has not
seen an example gives the probability of each label; an example whose given label gets
little is suspicious. The classifier is the one of `tasks.quality`: logistic regression
on hashed words, so that it is fast and needs no accelerator. It is no judge: what it
ranks first is worth a look, nothing more.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tasks.errors import StoreError
from tasks.quality import classifier as quality
from tasks.quality.packages import quality_packages

_FOLDS = 5
_REGULARISATION = 1e-5  # of the squared norm


@dataclasses.dataclass(frozen=True)
class Example:
    """A labelled text.

    Attributes:
        name: what a reviewer finds it by.
        text: what the label is about.
        label: given.
    """

    name: str
    text: str
    label: str


@dataclasses.dataclass(frozen=True)
class Suspect:
    """An example and what is thought of its label.

    Attributes:
        rank: from 1, the most suspicious.
        score: probability of the given label, from 0 for surely wrong.
        suspicious: confident learning counts it among the errors: another label is
            as probable for it as for the examples that carry that label.
        example: as it was given.
        suggested: the most probable label, which may be the given one.
    """

    rank: int
    score: float
    suspicious: bool
    example: Example
    suggested: str


@dataclasses.dataclass(frozen=True)
class Ranking:
    """All examples that could be judged, the most suspicious first.

    Attributes:
        suspects: by rank.
        rare: labels of fewer than five examples, which were left out, and how many
            they have.
    """

    suspects: tuple[Suspect, ...]
    rare: dict[str, int]

    def table(self) -> list[tuple[str, int, int, str]]:
        """Counts for each label, by name, its examples and the suspicious ones.

        Returns:
            Rows of label, examples, suspicious ones, and the label that is suggested
            for these most often in place of it, "" if none is.
        """
        of_label = collections.defaultdict(list)
        for suspect in self.suspects:
            of_label[suspect.example.label].append(suspect)
        rows = []
        for label, group in sorted(of_label.items()):
            others = collections.Counter(
                suspect.suggested
                for suspect in group
                if suspect.suspicious and suspect.suggested != label
            )
            # The first by name of those suggested as often: the order of ranks may
            # change with the last bit of a score.
            most = min(others, key=lambda name: (-others[name], name), default="")
            rows.append((label, len(group), sum(s.suspicious for s in group), most))
        return rows

    def lines(self, limit: int = 0) -> Iterator[str]:
        """Yields the ranking as JSON, a line per example.

        Args:
            limit: how many; 0 takes all.
        """
        for suspect in self.suspects[: limit or None]:
            fields = {
                "rank": suspect.rank,
                "score": round(suspect.score, 6),
                "suspicious": suspect.suspicious,
                "name": suspect.example.name,
                "label": suspect.example.label,
                "suggested": suspect.suggested,
                "text": suspect.example.text,
            }
            yield json.dumps(fields, ensure_ascii=False) + "\n"


def rank(examples: Iterable[Example], *, seed: int = 0) -> Ranking:
    """Ranks examples by the probability of their label out of sample.

    Each fifth of the examples is judged by a classifier that learnt from the others.

    Args:
        examples: in an order that does not change.
        seed: PRNG seed for the cut into fifths, and for the classifiers.
    Raises:
        StoreError: there are fewer than two labels of five examples, or scikit-learn
            or cleanlab is not installed.
    """
    examples = list(examples)
    counts = collections.Counter(example.label for example in examples)
    rare = {label: n for label, n in sorted(counts.items()) if n < _FOLDS}
    names = sorted(set(counts) - set(rare))
    if len(names) < 2:
        raise StoreError(
            f"labels cannot be judged: {len(names)} of {len(counts)} labels in "
            f"{len(examples):,} examples has at least {_FOLDS} examples, and two are "
            "needed, because each fifth is judged by what the others teach"
        )
    judged = [example for example in examples if example.label not in rare]
    number = {label: n for n, label in enumerate(names)}
    labels = np.array([number[example.label] for example in judged])
    with quality_packages("judging labels"):
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores

        texts = [example.text for example in judged]
        probabilities = _out_of_sample(texts, labels, seed)
    scores = get_label_quality_scores(labels, probabilities, method="self_confidence")
    suspicious = find_label_issues(labels, probabilities, n_jobs=1)
    return Ranking(
        tuple(
            Suspect(
                rank=place,
                score=float(scores[i]),
                suspicious=bool(suspicious[i]),
                example=judged[i],
                suggested=names[int(probabilities[i].argmax())],
            )
            for place, i in enumerate(np.argsort(scores, kind="stable"), start=1)
        ),
        rare,
    )


def write(ranking: Ranking, path: str | Path, limit: int = 0) -> int:
    """Writes a new file of JSON lines for review and returns how many it has.

    Args:
        ranking: result of `rank`.
        path: the file to write; one that is there is left alone, as it may hold a
            review.
        limit: how many examples; 0 takes all.
    Raises:
        StoreError: the file is there already, or cannot be written.
    """
    lines = list(ranking.lines(limit))
    try:
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)
    except OSError as error:
        raise StoreError(
            f"{str(path)!r} cannot be written: {error.strerror}. Name a new file in a "
            "folder that this user may write to"
        ) from None
    return len(lines)


def _out_of_sample(texts: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """float64[examples, labels], probabilities by classifiers that saw other fifths."""
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    features = quality.features(texts)
    features = features[:, np.unique(features.indices)]  # a weight for each label
    model = SGDClassifier(loss="log_loss", alpha=_REGULARISATION, random_state=seed)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    return cross_val_predict(
        model, features, labels, cv=folds, method="predict_proba", n_jobs=1
    )
