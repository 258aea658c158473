"""All that needs SeqIO and TensorFlow about where text comes from, in one process."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tasks.errors import StoreError
from tasks.sources import Document, Shard
from tasks.vocabularies import ByteVocabulary, SentencePieceVocabulary

TEXTS = ["def f():\n    return 'é'", "", "床前明月光，疑是地上霜。", "x  y\t🙂"] * 30
ROWS = [
    {"text": text, "answer": str(n), "lang": "en" if n % 2 else "zh", "kind": n % 3}
    for n, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def factories():
    from tasks import factories

    return factories


@pytest.fixture(scope="module")
def seqio():
    import seqio

    return seqio


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The same rows in every format, in two files each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path_factory.mktemp("corpus")
    for part, rows in enumerate((ROWS[:50], ROWS[50:])):
        lines = [json.dumps(row) for row in rows]
        (folder / f"a{part}.jsonl").write_text("\n".join(lines))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"a{part}.parquet")
        protos = [example_of(tf, row).SerializeToString() for row in rows]
        with tf.io.TFRecordWriter(f"{folder}/a{part}.tfrecord") as writer:
            for proto in protos:
                writer.write(proto)
        packed = ArrayRecordWriter(
            f"{folder}/a{part}.arrayrecord", "group_size:1,uncompressed"
        )
        for proto in protos:
            packed.write(proto)
        packed.close()
        flat = [row["text"].replace("\n", " ") for row in rows]
        (folder / f"a{part}.txt").write_text("\n".join(flat) + "\n")
        (folder / f"a{part}.blocks").write_text(
            "\n\n".join(row["text"] for row in rows)
        )
    return folder


def example_of(tf, row):
    features = {
        name: tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        if isinstance(value, int)
        else tf.train.Feature(bytes_list=tf.train.BytesList(value=[value.encode()]))
        for name, value in row.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=features))


def documents_of(task, split):
    source = task.source
    shards = range(len(source.list_shards(split)))
    return [d for shard in shards for d in source.documents(split, shard)]


def texts_of(task):
    return [d.features["targets"].decode() for d in documents_of(task, "train")]


def examples_of(task, split, **options):
    dataset = task.get_dataset(
        None, split, shuffle=False, try_in_mem_cache=False, **options
    )
    return list(dataset.as_numpy_iterator())


RECORDS = {"jsonl": "json_lines", "parquet": "parquet", "tfrecord": "tf_examples"}
RECORDS["arrayrecord"] = "array_records"


@pytest.mark.parametrize("ending", RECORDS)
def test_seqio_gives_the_examples_that_the_source_gives(factories, corpus, ending):
    add = getattr(factories, f"add_{RECORDS[ending]}")
    files = {"train": f"{corpus}/a*.{ending}", "validation": f"{corpus}/a1.{ending}"}
    task = add(f"text_{ending}", files, language_field="lang", label="kind")
    found = documents_of(task, "train")
    assert [d.features["targets"].decode() for d in found] == TEXTS
    assert [d.language for d in found] == [row["lang"] for row in ROWS]
    assert [d.label for d in found] == [str(row["kind"]) for row in ROWS]
    same_as_seqio(task, "train")
    assert len(documents_of(task, "validation")) == len(TEXTS) - 50

    pairs = add(f"pairs_{ending}", files, inputs="text", targets="answer")
    assert [d.features for d in documents_of(pairs, "train")] == [
        {"inputs": row["text"].encode(), "targets": row["answer"].encode()}
        for row in ROWS
    ]
    same_as_seqio(pairs, "validation")


@pytest.mark.parametrize("ending", ["txt", "blocks"])
def test_text_files_are_documents_three_ways(factories, corpus, ending):
    files = {"train": f"{corpus}/a*.{ending}"}
    lines = factories.add_text_lines(f"lines_{ending}", files, language="en")
    blocks = factories.add_text_blocks(f"blocks_{ending}", files)
    whole = factories.add_text_files(f"files_{ending}", files)
    content = [Path(f"{corpus}/a{n}.{ending}").read_text() for n in range(2)]
    wanted = {
        lines: [line for text in content for line in text.splitlines()],
        blocks: [text for text in TEXTS if text] if ending == "blocks" else None,
        whole: content,
    }
    for task, texts in wanted.items():
        if texts is not None:
            found = [
                d.features["targets"].decode() for d in documents_of(task, "train")
            ]
            assert found == texts
        same_as_seqio(task, "train")
    assert {d.language for d in documents_of(lines, "train")} == {"en"}


def same_as_seqio(task, split):
    """SeqIO's examples are the source's documents, tokenised."""
    documents = documents_of(task, split)
    examples = examples_of(task, split)
    assert len(documents) == len(examples) > 0
    for document, example in zip(documents, examples, strict=True):
        for feature, text in document.features.items():
            ids = example[feature]
            assert (ids - 3).astype(np.uint8).tobytes() == text
            assert example[f"{feature}_pretokenized"] == text
        told = [example[key].decode() for key in ("name", "language", "label")]
        assert told == [document.name, document.language, document.label]


def test_seqio_reads_shard_by_shard(factories, corpus, seqio):
    task = factories.add_json_lines("sharded", {"train": f"{corpus}/a*.jsonl"})
    assert len(task.source.list_shards("train")) == 2
    assert task.source.files("train") == tuple(
        f"{corpus}/a{part}.jsonl" for part in range(2)
    )
    for shard in range(2):
        examples = examples_of(task, "train", shard_info=seqio.ShardInfo(shard, 2))
        names = [document.name for document in task.source.documents("train", shard)]
        assert [example["name"].decode() for example in examples] == names


def test_shuffling_is_of_shards_and_seeded(factories):
    shards = [lambda n=n: [(f"{n}", b"%d" % n), (f"{n}b", b"x")] for n in range(9)]
    task = factories.add_documents("many_shards", {"train": shards})

    def order(seed):
        dataset = task.source.get_dataset("train", shuffle=True, seed=seed)
        return [e["name"].decode() for e in dataset.as_numpy_iterator()]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == sorted(d.name for d in documents_of(task, "train"))
    assert task.source.list_shards("train")[3] == "train/3"


def test_functions_may_yield_pairs_of_texts(factories):
    pair = Document({"inputs": b"2 + 2", "targets": b"4"}, "sum", "en", "easy")
    task = factories.add_documents(
        "sums", {"train": lambda: [pair]}, features=("inputs", "targets")
    )
    assert documents_of(task, "train") == [pair]
    same_as_seqio(task, "train")
    with pytest.raises(StoreError, match=r"features = \('text',\): must be"):
        factories.add_documents("other", {"train": list}, features=("text",))
    with pytest.raises(StoreError, match="there is no split 'test': there are 'train'"):
        task.source.list_shards("test")
    with pytest.raises(StoreError, match="inputs = 'q' and targets = None: give both"):
        factories.add_json_lines("half", {"train": "x"}, inputs="q")


def test_nothing_is_looked_for_before_it_is_read(factories, tmp_path):
    task = factories.add_json_lines("later", {"train": f"{tmp_path}/*.jsonl"})
    with pytest.raises(StoreError, match="no file matches"):
        task.source.list_shards("train")
    (tmp_path / "a.jsonl").write_text('{"text": "here now"}')
    assert documents_of(task, "train")[0].features == {"targets": b"here now"}


def test_preprocessors_see_the_text(factories, corpus, seqio):
    import tensorflow as tf

    def upper(dataset):
        return dataset.map(lambda x: {**x, "targets": tf.strings.upper(x["targets"])})

    task = factories.add_json_lines(
        "upper", {"train": f"{corpus}/a0.jsonl"}, preprocessors=[upper]
    )
    assert examples_of(task, "train")[0]["targets_pretokenized"].startswith(b"DEF F()")
    assert task.preprocessors[-1] is seqio.preprocessors.tokenize


def test_buckets_are_read_like_folders(factories, corpus):
    import tensorflow as tf

    for name in ("a0.jsonl", "a1.jsonl", "a0.parquet", "a1.parquet"):
        content = (corpus / name).read_bytes()
        with tf.io.gfile.GFile(f"ram://bucket/{name}", "wb") as file:
            file.write(content)
    for ending in ("jsonl", "parquet"):
        add = getattr(factories, f"add_{RECORDS[ending]}")
        task = add(f"remote_{ending}", {"train": f"ram://bucket/a*.{ending}"})
        assert texts_of(task) == TEXTS
    missing = factories.add_text_lines("remote_none", {"train": "ram://bucket/b*"})
    with pytest.raises(StoreError, match=r"no file matches 'ram://bucket/b\*'"):
        missing.source.list_shards("train")
    foreign = factories.add_text_lines("remote_s3", {"train": "s3://bucket/b*"})
    with pytest.raises(StoreError, match=r"s3://bucket/b\* cannot be read: "):
        foreign.source.list_shards("train")


def test_damaged_records_are_named(factories, corpus, tmp_path):
    for ending in ("tfrecord", "arrayrecord"):
        content = bytearray((corpus / f"a0.{ending}").read_bytes())
        path = tmp_path / f"bad.{ending}"
        add = getattr(factories, f"add_{RECORDS[ending]}")
        task = add(f"bad_{ending}", {"train": path})
        found = content.index("床前".encode())  # stored as it is in both
        for damaged in (content[:found] + b"?" + content[found + 1 :], content[:found]):
            path.write_bytes(damaged)
            with pytest.raises(StoreError, match=rf"bad\.{ending}"):
                documents_of(task, "train")
        lacking = add(f"lacking_{ending}", {"train": corpus / f"a0.{ending}"}, text="t")
        with pytest.raises(StoreError, match=r":0: there is no field 't' among 'ans"):
            documents_of(lacking, "train")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c, ""),
        (lambda c: c + bytes(700), ""),
        (lambda c: c + c, ""),
        (
            lambda c: c + b"rubbish",
            r"byte [\d,]+ on, which begins with b'rubbish'",
        ),
        (lambda c: c[:-4], r"its gzip data are cut short at byte"),
        (lambda c: c[:-40], r"its gzip data are cut short at byte"),
        (lambda c: gzip.compress(b"no records"), "record 0 has no valid length"),
        (
            lambda c: gzip.compress(gzip.decompress(c)[:-5]),
            "it ends within record 49",
        ),
    ],
)
def test_compressed_records_are_whole_or_refused(corpus, tmp_path, change, why):
    from tasks import examples
    from tasks.records import Fields

    path = tmp_path / "a.tfrecord.gz"
    content = gzip.compress((corpus / "a0.tfrecord").read_bytes())
    path.write_bytes(change(content))
    read = examples.read_tf_records(Shard((str(path),)), Fields({"targets": "text"}))
    if why:
        with pytest.raises(StoreError, match=rf"a\.tfrecord\.gz cannot be read.*{why}"):
            list(read)
        return
    found = [document.features["targets"].decode() for document in read]
    assert found[:50] == TEXTS[:50]
    assert len(found) == 50 * gzip.decompress(path.read_bytes()).count(b"text") // (
        gzip.decompress(content).count(b"text")
    )


def test_datasets_that_are_not_there_say_what_to_run(seqio, tmp_path):
    from tasks import tfds_tasks  # noqa: F401

    names = set(seqio.TaskRegistry.names())
    wanted = {"c4_en", "c4_multilingual_zh", "wmt14_en_de", "glue_sst2", "glue_stsb"}
    assert wanted < names
    with seqio_data_dir(seqio, tmp_path):
        for name, dataset in (("c4_en", "c4/en:3.1.0"), ("glue_rte", "glue/rte:2.0.0")):
            task = seqio.TaskRegistry.get(name)
            assert "validation" in task.splits
            for ask in (
                lambda task=task: examples_of(task, "train"),
                lambda task=task: task.source.list_shards("train"),
                lambda task=task: task.source.num_input_examples("train"),
            ):
                with pytest.raises(StoreError, match=f"run `tfds build {dataset} "):
                    ask()


def test_datasets_on_disk_become_text_to_text(seqio, tmp_path):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from tasks import tfds_tasks  # noqa: F401

    rows = {
        "glue/mrpc": {
            "sentence1": ["a b", "c"],
            "sentence2": ["a", "d"],
            "label": [1, -1],
            "idx": [0, 1],
        },
        "glue/stsb": {
            "sentence1": ["a", "b"],
            "sentence2": ["c", "d"],
            "label": [2.33, 5.0],
            "idx": [0, 1],
        },
    }
    features = {
        "sentence1": tfds.features.Text(),
        "sentence2": tfds.features.Text(),
        "idx": np.int32,
    }
    labels = {
        "glue/mrpc": tfds.features.ClassLabel(names=["not_equivalent", "equivalent"]),
        "glue/stsb": np.float32,
    }
    for name, columns in rows.items():
        tfds.dataset_builders.store_as_tfds_dataset(
            name="glue",
            config=name.partition("/")[2],
            version="2.0.0",
            data_dir=tmp_path,
            split_datasets={"train": tf.data.Dataset.from_tensor_slices(columns)},
            features=tfds.features.FeaturesDict({**features, "label": labels[name]}),
            disable_shuffling=True,
        )
    with seqio_data_dir(seqio, tmp_path):
        pairs = [
            (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode())
            for name in ("glue_mrpc", "glue_stsb")
            for e in examples_of(seqio.TaskRegistry.get(name), "train")
        ]
    assert pairs == [
        ("mrpc sentence1: a b sentence2: a", "equivalent"),
        ("mrpc sentence1: c sentence2: d", "<unk>"),
        ("stsb sentence1: a sentence2: c", "2.4"),  # 2.33 * 5 = 11.65 -> 12 / 5
        ("stsb sentence1: b sentence2: d", "5.0"),
    ]
    mrpc, stsb = map(seqio.TaskRegistry.get, ("glue_mrpc", "glue_stsb"))
    found = [
        mrpc.postprocess_fn(text) for text in ("equivalent", "not_equivalent", "x")
    ]
    assert found == [1, 0, -1]
    assert [stsb.postprocess_fn(text) for text in ("2.4", "x")] == [2.4, -1.0]
    assert len(mrpc.predict_metric_fns) == len(stsb.predict_metric_fns) == 2


class seqio_data_dir:  # noqa: N801
    """Reads TFDS data from another folder for a while."""

    def __init__(self, seqio, folder):
        self.seqio, self.folder = seqio, str(folder)

    def __enter__(self):
        self.forget()
        self.seqio.set_tfds_data_dir_override(self.folder)

    def __exit__(self, *error):
        self.seqio.set_tfds_data_dir_override(None)
        self.forget()

    def forget(self):
        self.seqio.utils.LazyTfdsLoader._MEMOIZED_BUILDERS.clear()
        for name in ("c4_en", "glue_rte", "glue_mrpc", "glue_stsb"):
            source = self.seqio.TaskRegistry.get(name).source
            source.tfds_dataset._data_dir_override = None


def test_ids_are_those_of_seqio(seqio, tmp_path):
    from tasks.train_vocabulary import train_sentencepiece

    trained = train_sentencepiece(TEXTS, 300)
    extra = SentencePieceVocabulary(trained.model, extra_ids=2)
    path = str(tmp_path / "v.model")
    Path(path).write_bytes(trained.model)
    pairs = [
        (ByteVocabulary(100), seqio.ByteVocabulary(extra_ids=100)),
        (ByteVocabulary(), seqio.ByteVocabulary()),
        (trained, seqio.SentencePieceVocabulary(path)),
        (extra, seqio.SentencePieceVocabulary(path, extra_ids=2)),
    ]
    for ours, theirs in pairs:
        assert (ours.size, ours.pad_id, ours.eos_id) == (
            theirs.vocab_size,
            theirs.pad_id,
            theirs.eos_id,
        )
        for text in TEXTS[:4]:
            assert ours.encode(text) == list(theirs.encode(text))
