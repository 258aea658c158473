import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpus import MODULE, settings, texts

from tasks.manifest import read_manifest
from tasks.prepare import prepare
from tasks.store import StoreError, open_store
from tasks.train_vocabulary import train_sentencepiece


def prepared_by(data, report=None):
    prepare(data, report, allowed_modules=(MODULE,))
    return open_store(data.store_dir, data)


def stored_texts(store, split: str) -> list[str]:
    (task,) = store.tasks
    part = store.split(task, split)
    return [part.document("targets", n) for n in range(part.num_documents)]


def file_digests(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def test_every_document_comes_back_in_its_order(prepared):
    for split, count in (("train", 60), ("validation", 7)):
        corpus = texts(split, count)
        assert stored_texts(prepared, split) == corpus
        manifest = prepared.manifest.split("made_up", split)
        assert manifest.documents == len(corpus) == count - 1
        assert manifest.removed == {"empty": 1}
        assert manifest.text_bytes == sum(len(text.encode()) for text in corpus)
        part = prepared.split("made_up", split)
        offsets = part.offsets()
        (tokens,) = part.read("targets", [0], [offsets[-1]])
        ends = np.flatnonzero(tokens == prepared.vocabulary.eos_id)
        assert ends.tolist() == (offsets[1:] - 1).tolist()
    assert prepared.vocabulary.size == prepared.manifest.vocabulary_size == 320


def test_preparing_twice_gives_the_same_files(prepared, tmp_path):
    data = settings(tmp_path / "b", vocabulary="sentencepiece", vocabulary_size=320)
    again = prepared_by(data)
    assert again.manifest == prepared.manifest
    assert again.manifest.fingerprint == prepared.manifest.fingerprint
    # One was packed since, perhaps; what prepare wrote is compared.
    first, second = file_digests(prepared.path), file_digests(again.path)
    assert len(second) > 10
    assert {name: first[name] for name in second} == second


def test_the_manifest_holds_the_baselines(prepared):
    held = prepared.manifest.split("made_up", "validation")
    found = prepared.manifest.tasks["made_up"].baselines
    assert found == read_manifest(prepared.path).tasks["made_up"].baselines
    assert found["compressed_text_bytes"] == held.text_bytes
    nats = found["unigram_nats_per_token"]
    assert found["unigram_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / held.bytes_per_token
    )
    counts = []
    for split in ("train", "validation"):
        part = prepared.split("made_up", split)
        (tokens,) = part.read("targets", [0], [part.num_tokens()])
        counts.append(np.bincount(tokens, minlength=320))
    p = (counts[0] + 1) / (counts[0].sum() + 320)
    assert nats == pytest.approx(-(counts[1] * np.log(p)).sum() / counts[1].sum())


def test_a_model_file_gives_the_same_tokens(prepared, tmp_path):
    path = tmp_path / "copy.model"
    path.write_bytes(Path(prepared.path, "vocabulary.model").read_bytes())
    again = prepared_by(settings(tmp_path / "store", vocabulary=str(path)))
    assert again.manifest.vocabulary == "model"
    assert again.manifest.fingerprint == prepared.manifest.fingerprint
    path.write_bytes(train_sentencepiece(texts("train", 50), 320).model)
    with pytest.raises(StoreError, match="another model than the store was prepared"):
        open_store(again.path, settings(again.path, vocabulary=str(path)))


@pytest.mark.parametrize("name", ["made_up", "made_up_with_eos"])
def test_bytes_and_a_tasks_own_bytes_agree(tmp_path, name):
    by_us = prepared_by(settings(tmp_path / "us", name))
    by_task = prepared_by(settings(tmp_path / "task", name, vocabulary="task"))
    assert by_us.manifest.fingerprint == by_task.manifest.fingerprint
    assert stored_texts(by_us, "validation") == texts("validation", 7)
    # The end is there once, whether the Task appends it or not.
    part = by_us.split(name, "train")
    (tokens,) = part.read("targets", [0], [part.offsets()[1]])
    assert (tokens[-2:] == 1).tolist() == [False, True]


def test_a_tasks_own_vocabulary_keeps_its_size(tmp_path):
    data = settings(tmp_path / "a", "made_up_extra", vocabulary="task")
    assert prepared_by(data).vocabulary.size == 359
    data = settings(tmp_path / "b", "made_up_extra")
    assert prepared_by(data).vocabulary.size == 259


def test_progress_ends_every_phase(tmp_path):
    seen = []
    store = prepared_by(settings(tmp_path / "store"), seen.append)
    last = {progress.phase: progress for progress in seen}
    assert list(last) == ["SeqIO", "tokens", "store", "baselines"]
    both = store.manifest.tasks["made_up"].splits.values()
    assert last["tokens"].documents == sum(split.documents + 1 for split in both)
    assert last["tokens"].tokens == sum(split.tokens["targets"] for split in both)
    assert last["tokens"].text_bytes == sum(split.text_bytes for split in both)


def test_an_interrupted_preparation_leaves_the_older_store(tmp_path):
    data = settings(tmp_path / "store")
    before = file_digests(prepared_by(data).path)

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, stop, allowed_modules=(MODULE,), force=True)
    assert file_digests(tmp_path / "store") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


def test_replaced_characters_are_counted(tmp_path):
    store = prepared_by(settings(tmp_path / "s", "made_up_bad", bad_utf8="replace"))
    assert store.manifest.split("made_up_bad", "train").replaced_documents == 1
    assert store.manifest.split("made_up_bad", "validation").replaced_documents == 0
    assert stored_texts(store, "train") == ["fine", "caf\ufffd and so on"]
    store = prepared_by(settings(tmp_path / "t", "made_up_bad", bad_utf8="drop"))
    assert store.manifest.split("made_up_bad", "train").removed == {"bad_utf8": 1}
    assert stored_texts(store, "train") == ["fine"]
    # What became of them is part of the store; of one without any it is not.
    asked = settings(store.path, "made_up_bad", bad_utf8="replace")
    with pytest.raises(StoreError, match=r"BAD_UTF8 = 'replace', but .* 'drop'"):
        open_store(store.path, asked)


def test_a_vocabulary_that_loses_text_is_told(tmp_path):
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "return": 2}, "<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    path = tmp_path / "tokenizer.json"
    words.save(str(path))
    lossy = prepared_by(settings(tmp_path / "a", vocabulary=str(path)))
    assert lossy.manifest.lossy_fraction > 0.9
    assert prepared_by(settings(tmp_path / "b")).manifest.lossy_fraction == 0


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("made_upp", {}, "'made_upp' is not registered .* nearest are 'made_up'"),
        ("made_up_words", {}, "from 250 to 269, so the Task tokenises by itself"),
        ("made_up_words", {"vocabulary": "task"}, "uses a PassThroughVocabulary"),
        (
            "made_up_strange",
            {"vocabulary": "task"},
            "ids from 250 to 269, but VOCABULARY = 'task' found a vocabulary of 259",
        ),
        ("made_up_empty", {}, r"'validation' .* holds no text \(1 empty\)"),
        (
            "made_up_failing",
            {},
            "'made_up_failing' in split .* failed: .* no disk today",
        ),
        ("made_up_none", {}, r"'validation' .* holds no text \(no documents at all\)"),
        ("made_up_bad", {}, r"'latin' in split 'train' .* at byte 3 \(0xe9\)"),
        ("made_up", {"heldout_split": "test"}, "HELDOUT_SPLIT = 'test' is not a split"),
        ("made_up", {"heldout_split": "train"}, "must not be learnt"),
        ("made_up", {"vocabulary": "words"}, "VOCABULARY = 'words' is not 'bytes'"),
        (
            "made_up",
            {"vocabulary": "sentencepiece", "vocabulary_size": 60_000},
            "VOCABULARY_PIECES = 60000: SentencePiece cannot",
        ),
    ],
)
def test_a_fault_is_said_and_leaves_nothing(tmp_path, name, changes, words):
    data = settings(tmp_path / "store", name, **changes)
    with pytest.raises(StoreError, match=words) as caught:
        prepare(data, allowed_modules=(MODULE,))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_module_is_imported_only_if_it_is_ours_or_allowed(tmp_path):
    data = settings(tmp_path / "store")
    for module in ("antigravity", "tasksx", "tests.x"):
        foreign = dataclasses.replace(data, mixture_or_task_module=module)
        with pytest.raises(StoreError, match=f"'{module}' .* --allow_module to"):
            prepare(foreign, allowed_modules=(MODULE,))
    missing = dataclasses.replace(data, mixture_or_task_module="tasks.nowhere")
    with pytest.raises(StoreError, match=r"'tasks\.nowhere' cannot be imported"):
        prepare(missing)


@pytest.mark.parametrize("name", ["tasks.py", "tasks/"])
def test_a_module_that_ours_hides_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.mkdir() if name.endswith("/") else file.write_text("")
    data = dataclasses.replace(settings("store"), mixture_or_task_module="tasks")
    said = rf"a package of the name `tasks`, which hides your {name}: give that another"
    with pytest.raises(StoreError, match=said):
        prepare(data, allowed_modules=("tasks",))


def test_a_file_in_the_way_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="store' cannot be made: Not a directory"):
        prepared_by(settings(tmp_path / "file" / "store"))
