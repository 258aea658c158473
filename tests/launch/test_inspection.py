"""What `prepare --inspect` shows of a store, beside loops over its documents."""

import dataclasses
import re
import types
from collections import Counter

import memory_store
import numpy as np
import pytest
from memory_store import VOCABULARY, on_disk, pair_store, text_store

from launch.data import inspection
from launch.data.opening import training_batches
from tasks.manifest import LanguageManifest, write_manifest
from tasks.settings import MixtureSettings
from tasks.store import TokenStore, open_store

pytestmark = pytest.mark.fast


def settings(objective="causal_lm", **changes):
    return types.SimpleNamespace(
        data=memory_store.settings(objective, shuffle=False, **changes),
        mixture=MixtureSettings(),
        train=types.SimpleNamespace(batch_size=4, batch_ramp=(), seed=0),
    )


def as_text(ids) -> str:
    """One token after the other; all of the made-up text is one-byte or no UTF-8."""
    return inspection.readable(np.asarray(ids), VOCABULARY)


def test_ends_and_sentinels_have_names():
    word = VOCABULARY.encode("né")
    top = VOCABULARY.size - 1
    assert as_text([*word, 1, *word, top, top - 1, *word]) == "né⏹né<0><1>né"
    assert as_text([top - memory_store.EXTRA_IDS + 1]) == "<29>"
    assert as_text([]) == ""
    assert as_text(VOCABULARY.encode("a\x1b[1m\x00\n\tb")) == "a␛[1m␀\n\tb"


def spans(text) -> list[tuple[str, str]]:
    """What is shown, by how, in order."""
    shown = [(s.start, s.end, str(s.style)) for s in text.spans]
    assert sum(end - start for start, end, _ in shown) <= len(text.plain)
    places = [""] * len(text.plain)
    for start, end, style in shown:
        places[start:end] = [style] * (end - start)
    found: list[tuple[str, str]] = []
    for letter, style in zip(text.plain, places, strict=True):
        if found and found[-1][1] == style and letter != "│":
            found[-1] = (found[-1][0] + letter, style)
        else:
            found.append((letter, style))
    return found


def test_a_row_shows_what_is_given_and_predicted_and_where_pairs_begin(tmp_path):
    made = pair_store(a=9)
    store, given = on_disk(made, tmp_path / "store"), settings("seq2seq")
    part = made.splits["a"]["train"]
    wanted, rows, room = [], [], 0
    for inputs, targets in zip(
        part.documents["inputs"], part.documents["targets"], strict=True
    ):
        pair = inputs[:20], targets[:9]
        size = sum(map(len, pair))
        if size > room:
            rows.append([])
            room = 29
        room -= size
        rows[-1].append(pair)
    for pairs in rows:
        row = []
        for inputs, targets in pairs:
            row += [("│", inspection._BOUNDARY), (f"‹{as_text(inputs)}›", "dim")]
            row.append((as_text(targets), ""))
        if padding := 29 - sum(len(part) for pair in pairs for part in pair):
            row.append((f"[{padding} of padding]", "dim"))
        wanted.append([(text, style) for text, style in row if text])
    batches = training_batches(store, given)
    texts = inspection._examples(store, batches, len(rows))
    assert len(rows) > 5, "of more than one batch"
    assert [spans(text) for text in texts] == wanted


def test_documents_and_their_lengths_are_counted(tmp_path, capsys):
    made = text_store(a=50, b=7)
    store = with_counts(on_disk(made, tmp_path / "store"), tmp_path / "store")
    given = settings()
    inspection.show(store, given, 1)
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()]
    batches = training_batches(store, given)
    for task in ("a", "b"):
        part = made.splits[task]["train"]
        lengths = [len(document) for document in part.documents["targets"]]
        (row,) = [words for words in table if words[:2] == [task, "train"]]
        assert row[2:4] == [str(len(lengths)), f"{sum(lengths):,}"]
        assert row[5] == str(batches.rows(task))
        said = out[out.index(f"{task}: tokens per document") :].split("\n\n")[0]
        assert f"longest {max(lengths)}" in said.splitlines()[0]
        powers = Counter(next(p for p in range(9) if n <= 2**p) for n in lengths)
        shown = re.findall(r"^≤ +(\d+) +(\d+) (█*)$", said, re.MULTILINE)
        assert {int(bound): int(n) for bound, n, _ in shown if n != "0"} == {
            2**power: n for power, n in powers.items()
        }
        longest = max(powers.values())
        assert all(len(bar) == round(40 * int(n) / longest) for _, n, bar in shown)
    assert ["a", "validation", "11"] in [words[:3] for words in table]
    assert "3 low quality, 2 mended, and kept" in out
    assert ["zh", "4", "90", "2.50"] in table
    assert f"{100 * batches.padding_fraction:.1f} % padding" in out
    assert "\nrow 0\n" in out
    assert "\nrow 1\n" not in out


def with_counts(store: TokenStore, folder) -> TokenStore:
    """The same, with languages, and what was left out or repaired."""
    tasks = dict(store.manifest.tasks)
    counts = dataclasses.replace(
        tasks["a"].splits["train"],
        removed={"low_quality": 3},
        replaced_documents=2,
    )
    held = dataclasses.replace(
        tasks["b"].splits["validation"], languages={"zh": LanguageManifest(4, 90, 225)}
    )
    memory_store.write_array(
        f"{folder}/b/validation/languages", np.zeros(held.documents, np.uint16)
    )
    for task, split, new in (("a", "train", counts), ("b", "validation", held)):
        splits = {**tasks[task].splits, split: new}
        tasks[task] = dataclasses.replace(tasks[task], splits=splits)
    write_manifest(dataclasses.replace(store.manifest, tasks=tasks), str(folder))
    return open_store(folder)
