"""Labels that were made wrong are ranked first, and the command writes them down."""

import collections
import json
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from launch.commands import review
from launch.errors import UsageError
from tasks import seqio_tasks
from tasks.errors import StoreError
from tasks.preparation import documents
from tasks.quality import label_noise
from tasks.quality.label_noise import Example
from tasks.settings import DataSettings
from tasks.sources import Document

pytestmark = pytest.mark.fast

_PACKAGES = ("asyncio", "email", "http", "multiprocessing", "unittest", "xml")


def examples() -> list[Example]:
    """Returns pieces of standard-library packages, labelled by their package."""
    found = []
    for package in _PACKAGES:
        root = Path(sysconfig.get_path("stdlib"), package)
        pieces = []
        for path in sorted(root.glob("**/[a-z]*.py")):
            text = path.read_text()
            name = f"{package}/{path.relative_to(root).as_posix()}"
            for start in range(0, min(len(text), 12_000), 1200):
                piece = Example(f"{name}@{start}", text[start : start + 1200], package)
                pieces.append(piece)
        found += pieces[:: len(pieces) // 60 + 1]
    return found


def relabelled(
    clean: list[Example], fraction: float, seed: int
) -> tuple[list[Example], set[str]]:
    """Gives some examples another label; returns all, and the names of those."""
    rng = np.random.default_rng(seed)
    noisy = list(clean)
    chosen = rng.permutation(len(clean))[: round(fraction * len(clean))]
    for i in chosen:
        others = [name for name in _PACKAGES if name != clean[i].label]
        noisy[i] = Example(clean[i].name, clean[i].text, str(rng.choice(others)))
    return noisy, {clean[i].name for i in chosen}


@pytest.fixture(scope="module")
def clean() -> list[Example]:
    return examples()


def test_planted_label_noise_is_ranked_first(clean, capsys):
    precisions, suggested = [], []
    for seed in range(3):
        noisy, wrong = relabelled(clean, 0.1, seed)
        ranking = label_noise.rank(noisy)
        assert [s.rank for s in ranking.suspects] == list(range(1, len(clean) + 1))
        scores = [s.score for s in ranking.suspects]
        assert scores == sorted(scores)
        first = ranking.suspects[: len(wrong)]
        hits = [s for s in first if s.example.name in wrong]
        precisions.append(len(hits) / len(wrong))
        truth = {e.name: e.label for e in clean}
        suggested.append(np.mean([s.suggested == truth[s.example.name] for s in hits]))
        flagged = [s.example.name for s in ranking.suspects if s.suspicious]
        assert len(set(flagged) & wrong) > 0.5 * len(flagged)
    with capsys.disabled():
        print(
            f"\nprecision at 10 % of {len(clean)} examples with 10 % wrong labels: "
            f"{', '.join(f'{p:.2f}' for p in precisions)}; right label suggested: "
            f"{', '.join(f'{s:.2f}' for s in suggested)}"
        )
    # Chance is 0.1 and 0.2; 0.76 to 0.90 and 0.88 to 0.96 over more seeds.
    assert min(precisions) > 0.7
    assert min(suggested) > 0.8


def test_a_ranking_is_the_same_twice_and_its_lines_are_json(clean, tmp_path):
    noisy, _ = relabelled(clean, 0.1, 0)
    ranking = label_noise.rank(noisy)
    assert list(ranking.lines()) == list(label_noise.rank(noisy).lines())
    path = tmp_path / "review.jsonl"
    assert label_noise.write(ranking, path, limit=7) == 7
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(1, 8))
    of_name = {example.name: example for example in noisy}
    for line in lines:
        example = of_name[line["name"]]
        assert (line["text"], line["label"]) == (example.text, example.label)
        assert line["suggested"] in _PACKAGES
    # A review that somebody may have worked on is not overwritten.
    with pytest.raises(StoreError, match="File exists"):
        label_noise.write(ranking, path)
    assert label_noise.write(ranking, tmp_path / "all.jsonl") == len(noisy)


def test_rare_labels_are_left_out_and_named(clean):
    odd = [Example(f"odd{n}", "some text", "odd") for n in range(4)]
    ranking = label_noise.rank(odd + clean)
    assert ranking.rare == {"odd": 4}
    assert len(ranking.suspects) == len(clean)
    counts = collections.Counter(example.label for example in clean)
    assert [(label, n) for label, n, *_ in ranking.table()] == sorted(counts.items())
    with pytest.raises(StoreError, match="1 of 2 labels in 48 examples"):
        label_noise.rank([e for e in clean if e.label == "xml"] + odd)
    with pytest.raises(StoreError, match="0 of 0 labels"):
        label_noise.rank([])


def test_without_cleanlab_one_is_told_what_to_install(clean, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(StoreError, match=r"pip install 'switchyard\[quality\]'"):
        label_noise.rank(clean)


# ------------------------------------------------------------------------ the command


class _Source:
    """Documents in two shards."""

    def __init__(self, found: list[Document]):
        self._found = found

    def list_shards(self, split: str) -> list[str]:
        return ["even", "odd"]

    def documents(self, split: str, shard: int):
        return iter(self._found[shard::2])


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on documents, without SeqIO."""

    def run(
        found: list[Document], tasks: int = 1, plain: bool = True, **options
    ) -> int:
        task = SimpleNamespace(name="kinds", splits=("train",), source=_Source(found))
        by_name = {f"kinds{n}": task for n in range(tasks)}
        monkeypatch.setattr(
            seqio_tasks, "find", lambda *_: seqio_tasks.Found(by_name, {})
        )
        monkeypatch.setattr(documents, "is_plain", lambda task: plain)
        data = DataSettings("kinds", "tasks.kinds", {"targets": 8}, "store")
        train = SimpleNamespace(seed=0)
        config = SimpleNamespace(settings=SimpleNamespace(data=data, train=train))
        values = {
            "output": str(tmp_path / "review.jsonl"),
            "split": None,
            "limit": None,
            "allow_module": False,
            "quiet": True,
        }
        return review.run(config, review.ReviewOptions(**{**values, **options}))

    return run


def labelled(found: list[Example]) -> list[Document]:
    return [Document({"targets": e.text.encode()}, e.name, "", e.label) for e in found]


def test_the_command_writes_the_worst_labels_first(clean, command, tmp_path, capsys):
    noisy, wrong = relabelled(clean, 0.1, 0)
    unlabelled = Document({"targets": b"caf\xe9"}, "no label")
    assert command([*labelled(noisy), unlabelled], limit=10) == 0
    written = (tmp_path / "review.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in written]
    assert len(names) == 10
    assert len(wrong.intersection(names)) >= 8
    shown = capsys.readouterr().out
    assert "1 examples carry no label" in shown
    assert f"wrote 10 examples to {tmp_path}" in shown
    for name in names[:5]:
        assert name in shown
    with pytest.raises(UsageError, match="may hold a review"):
        command(labelled(noisy))


def test_a_target_is_the_label_where_there_are_inputs(clean, command, tmp_path):
    pairs = [
        Document({"inputs": e.text.encode(), "targets": e.label.encode()}, e.name)
        for e in clean
    ]
    assert command(pairs) == 0
    lines = (tmp_path / "review.jsonl").read_text().splitlines()
    given = {e.name: (e.text, e.label) for e in clean}
    for line in map(json.loads, lines):
        assert given[line["name"]] == (line["text"], line["label"])
    assert len(lines) == len(clean)


def test_a_task_that_seqio_has_to_run_is_read_through_it(
    clean, command, tmp_path, monkeypatch
):
    def read(task, split: str, shard: int, data: DataSettings):
        assert (data.vocabulary, data.bad_utf8) == ("bytes", "replace")
        for number, e in enumerate(clean[shard::2]):
            text = {"inputs": e.text, "targets": e.label}
            yield documents.Document(number, repr(e.name), text, {})

    monkeypatch.setattr(documents, "read", read)
    assert command([], plain=False) == 0
    lines = (tmp_path / "review.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == {e.name for e in clean}


def test_a_task_without_labels_a_mixture_and_bad_options_are_refused(command):
    plain = [Document({"targets": b"text"}, "a"), Document({"targets": b"text"}, "b")]
    with pytest.raises(StoreError, match="none of the 2 examples of split 'train'"):
        command(plain)
    with pytest.raises(StoreError, match=r"is a Mixture.*'kinds0', 'kinds1'"):
        command(plain, tasks=2)
    with pytest.raises(StoreError, match=r"--split=test is not a split.*'train'"):
        command(plain, split="test")
    with pytest.raises(UsageError, match="--limit=-1"):
        command(plain, limit=-1)
