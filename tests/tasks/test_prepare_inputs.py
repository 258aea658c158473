"""What people give to `prepare` that it cannot take, each said in one sentence."""

import dataclasses
import json
import re
import shutil

import pytest
import tokenizers
from corpus import MODULE, settings

from tasks import files
from tasks.errors import StoreError
from tasks.preparation import gathering, parts
from tasks.preparation import plan as plans
from tasks.prepare import prepare
from tasks.settings import FilterSettings
from tasks.store import open_store

TEXT = [("one", "some words to learn"), ("two", "and a few more of them")]


@pytest.fixture(scope="module")
def factories():
    from tasks import factories

    return factories


def words_tokenizer(folder):
    """A tokenizer of two words, with two special tokens that may end a document."""
    names = ("<pad>", "</s>", "<unk>", "[SEP]", "known", "words")
    model = tokenizers.models.WordLevel(
        {name: number for number, name in enumerate(names)}, "<unk>"
    )
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.add_special_tokens(["<pad>", "</s>", "<unk>", "[SEP]"])
    words.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def refused(data, words, **given):
    with pytest.raises(StoreError, match=words) as caught:
        prepare(data, allowed_modules=(MODULE,), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_text_that_becomes_nothing_is_refused(factories, tmp_path, split):
    known, strange = [("k", "known words")], [("u", "quite others"), ("v", "more")]
    splits = {"train": known, "validation": known, split: strange}
    name = f"unknown_{split}"
    factories.add_documents(
        name, {split: (lambda held=held: held) for split, held in splits.items()}
    )
    vocabulary = words_tokenizer(tmp_path)
    data = settings(tmp_path / "store", name, vocabulary=vocabulary)
    refused(
        data,
        rf"split '{split}' of task '{name}' becomes 5 tokens of VOCABULARY = "
        rf"'{re.escape(vocabulary)}' that stand for no text, though its 2 documents",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_fault_of_held_out_text_is_said_before_the_rest_is_tokenised(
    factories, tmp_path
):
    read = []
    factories.add_documents(
        "late", {"train": lambda: read.append(1) or TEXT, "validation": lambda: []}
    )
    refused(settings(tmp_path / "s", "late"), "'validation' of task 'late' holds no te")
    assert read == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("n", 5), "document 1 of shard 'train', 'n', has as its 'targets' 5 (int), "),
        (("n", None), "'n', has as its 'targets' None, which is no text: it must be"),
        (("n", ["a", ["b"]]), "'n', has as its 'targets' ['a', ['b']] (list), which"),
        (9, "document 1 of shard 'train' is 9 (int), and must be a name and a text"),
    ],
)
@pytest.mark.parametrize("by_seqio", [False, True])
def test_what_is_no_text_is_named(factories, tmp_path, capfd, given, why, by_seqio):
    name = f"no_text_{by_seqio}_{re.sub('[^a-z0-9]+', '_', str(given))}"
    factories.add_documents(
        name,
        {"train": lambda: [TEXT[0], given], "validation": lambda: TEXT},
        preprocessors=[lambda dataset: dataset] if by_seqio else [],
    )
    capfd.readouterr()
    refused(
        settings(tmp_path / "s", name),
        rf"task '{name}' in split 'train' failed: TypeError: .*{re.escape(why)}",
    )
    assert "Traceback" not in capfd.readouterr().err


def test_a_function_that_returns_nothing_is_named(factories, tmp_path):
    factories.add_documents("nothing", {"train": list, "validation": lambda: None})
    refused(
        settings(tmp_path / "s", "nothing"),
        r"'nothing' in split 'validation' failed: TypeError: its function returned No",
    )


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("numbers", r"field 'numbers' is no single text: it is TensorSpec"),
        ("meta.txt", r"field 'meta' has no field 'txt' of 'meta.txt' among 'text'"),
        ("bdy", r"there is no field 'bdy' among 'meta', 'numbers'"),
        ("numbers.x", r"field 'numbers' is no table, and has no field 'x' of 'num"),
    ],
)
def test_a_field_of_tensorflow_that_is_no_text_is_named(factories, field, why):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensors({"meta": {"text": "a"}, "numbers": [1, 2]})
    fields = factories._fields(field, None, None, "", "", "")
    with pytest.raises(ValueError, match=why):
        factories._renamed(dataset, fields)


def test_tokens_that_are_no_row_are_named(factories, tmp_path):
    import seqio
    import tensorflow as tf

    def untokenised(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensors({"targets": [[1, 2], [3, 4]]})

    seqio.TaskRegistry.add(
        "square",
        source=seqio.FunctionDataSource(untokenised, splits=("train", "validation")),
        preprocessors=[],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), rank=2)},
    )
    for vocabulary in ("bytes", "task"):
        data = settings(tmp_path / "s", "square", vocabulary=vocabulary)
        refused(data, r"of shard 0 in split .* of task 'square' is int32\[2, 2\] \(")


def test_a_mixture_needs_every_split_of_every_task(factories, tmp_path):
    import seqio

    factories.add_documents("whole", {"train": lambda: 1 / 0, "validation": list})
    factories.add_documents("learnt_only", {"train": lambda: 1 / 0})
    seqio.MixtureRegistry.add("halves", ["whole", "learnt_only"], default_rate=1.0)
    refused(
        settings(tmp_path / "s", "halves"),
        r"^HELDOUT_SPLIT = 'validation' is not a split of task 'learnt_only', which "
        r"has 'train': name one that every Task has, give this Task one, or leave it",
    )
    assert list(tmp_path.iterdir()) == []


def test_another_end_of_document_is_said_with_both(factories, tmp_path):
    known = [("k", "known words")]
    factories.add_documents(
        "two_words", {"train": lambda: known, "validation": lambda: known}
    )
    vocabulary = words_tokenizer(tmp_path)
    files.write(tmp_path / "tokenizer_config.json", b'{"eos_token": "[SEP]"}')
    data = settings(tmp_path / "store", "two_words", vocabulary=vocabulary)
    prepare(data, allowed_modules=(MODULE,))
    assert open_store(data.store_dir, data).vocabulary.eos_id == 3
    named = dataclasses.replace(data, eos_token="[SEP]")
    assert open_store(data.store_dir, named).vocabulary.eos_id == 3
    other = dataclasses.replace(data, eos_token="</s>")
    words = r"EOS_TOKEN is '</s>', but the store was prepared with '\[SEP\]'\. Set"
    with pytest.raises(StoreError, match=words):
        open_store(data.store_dir, other)
    (tmp_path / "tokenizer_config.json").unlink()  # another end of the same tokenizer
    with pytest.raises(StoreError, match=words):
        open_store(data.store_dir, data)
    (tmp_path / "tokenizer.json").unlink()  # as where a store was copied to
    assert open_store(data.store_dir, data).vocabulary.eos_id == 3
    assert open_store(data.store_dir, named).vocabulary.eos_id == 3
    with pytest.raises(StoreError, match=words):
        open_store(data.store_dir, other)


@pytest.mark.parametrize("kind", ["same", "link", "copy", "pattern"])
def test_a_file_that_is_learnt_and_scored_is_noted(factories, tmp_path, capfd, kind):
    train = tmp_path / "train.jsonl"
    train.write_text('{"text": "some words"}\n' * 9000)  # more than two blocks
    held = tmp_path / "held.jsonl"
    if kind == "link":
        held.symlink_to(train)
    elif kind == "copy":
        shutil.copy(train, held)
    held = {"same": train, "pattern": tmp_path / "tr*.jsonl"}.get(kind, held)
    name = f"shared_{kind}"
    factories.add_json_lines(name, {"train": train, "validation": held})
    data = settings(tmp_path / "store", name)
    prepare(data, allowed_modules=(MODULE,))
    said = capfd.readouterr().err
    assert f"TRAIN_SPLIT 'train' of task '{name}' and in HELDOUT_SPLIT 'valid" in said
    assert str(train) in said
    assert kind not in ("link", "copy") or str(held) in said
    # Where duplicates are left out, there is nothing to say; all of it is then.
    words = rf"'train' of task '{name}' holds no text \(9,000 exact_duplicates\)"
    exact = FilterSettings(duplicates="exact")
    refused(dataclasses.replace(data, store_dir=f"{tmp_path}/t"), words, filters=exact)
    assert "note" not in capfd.readouterr().err


def test_files_of_one_size_are_not_the_same(factories, tmp_path, capfd):
    for name, text in (("train", "abc"), ("held", "abd")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    factories.add_json_lines(
        "of_one_size",
        {"train": tmp_path / "train.jsonl", "validation": tmp_path / "held.jsonl"},
    )
    prepare(settings(tmp_path / "store", "of_one_size"), allowed_modules=(MODULE,))
    assert "note" not in capfd.readouterr().err


def test_parts_are_gathered_in_order_and_only_if_all_are_there(tmp_path):
    work, data = str(tmp_path), settings(tmp_path)
    plan = plans.Plan(
        data=data,
        filters=FilterSettings(),
        allowed_modules=(),
        shards={"made_up": {"train": ("a", "b", "c")}},
        rates={},
        features={"made_up": ("targets",)},
        state={},
    )
    sizes = {(0, 0): 5, (0, 1): 7, (1, 0): 0, (2, 0): 3, (2, 1): 4, (2, 2): 1}
    for (shard, number), tokens in sizes.items():
        unit = plans.Unit("made_up", "train", shard)
        part = parts.Part(
            unit=unit,
            number=number,
            consumed=0,
            last=(shard, number + 1) not in sizes,
            documents=1,
            tokens={"targets": tokens},
            text_bytes=tokens,
            digest="",
            languages={"en" if number else "de": (1, tokens, tokens)},
            replaced=shard,
            removed={"empty": number},
        )
        path = f"{parts._path(work, unit, number)}.json"
        files.write(path, json.dumps(dataclasses.asdict(part)).encode())
    found = gathering.gather(work, plan, "made_up", "train")
    assert found.places.tolist() == [list(place) for place in sizes]
    assert found.starts["targets"].tolist() == [0, 5, 12, 12, 15, 19, 20]
    assert (found.documents, found.text_bytes, found.replaced) == (6, 20, 7)
    assert found.removed == {"empty": 4}
    assert [name for names in found.language_names for name in names] == [
        *("de", "en", "de", "de", "en", "en")
    ]
    counts = {name: dataclasses.astuple(c) for name, c in found.languages.items()}
    assert counts == {"de": (3, 8, 8), "en": (3, 12, 12)}
    kept = gathering.kept(work, "made_up", "train", "targets.starts")
    assert kept.tolist() == found.starts["targets"].tolist()
    assert gathering.kept(work, "made_up", "train", "targets.starts") is kept
    for gone in ((0, 1), (1, 0), (2, 1), (2, 2)):
        unit = plans.Unit("made_up", "train", gone[0])
        path = f"{parts._path(work, unit, gone[1])}.json"
        content = files.read(path)
        files.delete(path)
        with pytest.raises(StoreError, match=f"shard {gone[0]} of .* is not finished"):
            gathering.gather(work, plan, "made_up", "train")
        files.write(path, content)
