"""BAD_UTF8 is obeyed and counted whichever way text arrives."""

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.errors import StoreError
from tasks.preparation import documents
from tasks.settings import DataSettings

GOOD = b"fine words"
BAD = b"caf\xe9 words"
MENDED = "caf\ufffd words"
HALF = "caf\ud83d words"  # which no UTF-8 has, however it is written


def text_array(kind):
    """A good and a bad text in a column of a kind, which nobody has checked."""
    column = pa.array([GOOD, BAD], pa.binary())
    if pa.types.is_dictionary(kind):
        return text_array(kind.value_type).dictionary_encode()
    if pa.types.is_fixed_size_binary(kind):
        return pa.array([GOOD.ljust(10), BAD], pa.binary(10))
    if kind == pa.string_view():
        return column.cast(pa.binary_view()).view(kind)
    if kind in (pa.string(), pa.large_string()):
        raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}[kind]
        return pa.Array.from_buffers(kind, 2, column.cast(raw).buffers())
    return column.cast(kind)


def parquet(folder, kind, depth=0):
    column, name = text_array(kind), "text"
    for _ in range(depth):
        column = pa.StructArray.from_arrays([column], [name.partition(".")[0]])
        name = f"meta.{name}" if name == "text" else f"outer.{name}"
    outer = name.partition(".")[0]
    pq.write_table(pa.table({outer: column}), folder / "a.parquet")
    return {"files": folder / "a.parquet", "text": name}


def packed(content, ending):
    return {
        "": lambda: content,
        ".gz": lambda: gzip.compress(content),
        ".zst": lambda: bytes(pa.compress(content, "zstd")),
    }[ending]()


def of_text(call, separator, ending=""):
    def register(name, folder, factories):
        path = folder / f"a.txt{ending}"
        path.write_bytes(packed(separator.join([GOOD, BAD]), ending))
        getattr(factories, call)(name, {"train": path, "validation": path})

    return register


def of_files(name, folder, factories):
    (folder / "1.txt").write_bytes(GOOD)
    (folder / "2.txt").write_bytes(BAD)
    files = folder / "*.txt"
    factories.add_text_files(name, {"train": files, "validation": files})


def of_json(second, ending="", text="text"):
    def register(name, folder, factories):
        good = json.dumps({"text": GOOD.decode(), "a": {"b": GOOD.decode()}}).encode()
        path = folder / f"a.jsonl{ending}"
        path.write_bytes(packed(good + b"\n" + second, ending))
        factories.add_json_lines(name, {"train": path, "validation": path}, text=text)

    return register


def of_parquet(kind, depth=0):
    def register(name, folder, factories):
        given = parquet(folder, kind, depth)
        files = {"train": given["files"], "validation": given["files"]}
        factories.add_parquet(name, files, text=given["text"])

    return register


def of_examples(call, ending=""):
    def register(name, folder, factories):
        import tensorflow as tf
        from array_record.python.array_record_module import ArrayRecordWriter

        records = [
            tf.train.Example(
                features=tf.train.Features(
                    feature={
                        "text": tf.train.Feature(
                            bytes_list=tf.train.BytesList(value=[text])
                        )
                    }
                )
            ).SerializeToString()
            for text in (GOOD, BAD)
        ]
        path = folder / f"a.records{ending}"
        if call == "add_tf_examples":
            packing = "GZIP" if ending else None
            with tf.io.TFRecordWriter(str(path), packing) as writer:
                for record in records:
                    writer.write(record)
        else:
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        getattr(factories, call)(name, {"train": path, "validation": path})

    return register


def of_python(bad, *, preprocessors=(), as_document=False):
    def register(name, folder, factories):
        from tasks.sources import Document

        def found():
            for number, text in enumerate((GOOD, bad)):
                given = Document({"targets": text}, str(number))
                yield given if as_document else (str(number), text)

        splits = {"train": found, "validation": found}
        factories.add_documents(name, splits, preprocessors=preprocessors)

    return register


def same(dataset):
    """A preprocessor, so that SeqIO runs the Task."""
    return dataset.map(dict)


def of_tensorflow(name, folder, factories):
    import seqio
    import tensorflow as tf

    def found(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": [GOOD, BAD]})

    source = seqio.FunctionDataSource(found, splits=("train", "validation"))
    factories.add_task(name, source, ("targets",))


def of_tfds(field):
    def register(name, folder, factories):
        import tensorflow as tf

        source = factories.TfdsSource("c4/en:3.1.0", {"train": "train"}, str(folder))
        found = {"text": [GOOD, BAD], "meta": {"text": [GOOD, BAD]}}
        source.list_shards = lambda split: ("one",)
        source.get_dataset = lambda *given, **more: tf.data.Dataset.from_tensor_slices(
            found
        )
        # As `add_tfds` does, of a dataset that is not on this disk.
        fields = factories._fields(field, None, None, "", "", "")
        renamed = factories.functools.partial(factories._renamed, fields=fields)
        factories.add_task(name, source, ("targets",), preprocessors=[renamed])

    return register


ESCAPED = json.dumps({"text": HALF, "a": {"b": HALF}}).encode()
RAW = b'{"text": "' + BAD + b'", "a": {"b": "' + BAD + b'"}}'
WAYS = {
    "text_files": of_files,
    "text_lines": of_text("add_text_lines", b"\n"),
    "text_lines_gz": of_text("add_text_lines", b"\n", ".gz"),
    "text_lines_zst": of_text("add_text_lines", b"\n", ".zst"),
    "text_blocks": of_text("add_text_blocks", b"\n\n"),
    "json": of_json(RAW),
    "json_gz": of_json(RAW, ".gz"),
    "json_zst": of_json(RAW, ".zst"),
    "json_nested": of_json(RAW, text="a.b"),
    "json_escaped": of_json(ESCAPED),
    "json_escaped_nested": of_json(ESCAPED, text="a.b"),
    "parquet_string": of_parquet(pa.string()),
    "parquet_large_string": of_parquet(pa.large_string()),
    "parquet_string_view": of_parquet(pa.string_view()),
    "parquet_binary": of_parquet(pa.binary()),
    "parquet_large_binary": of_parquet(pa.large_binary()),
    "parquet_binary_view": of_parquet(pa.binary_view()),
    "parquet_fixed_binary": of_parquet(pa.binary(10)),
    "parquet_dictionary": of_parquet(pa.dictionary(pa.int32(), pa.string())),
    "parquet_binary_dictionary": of_parquet(pa.dictionary(pa.int32(), pa.binary())),
    "parquet_nested": of_parquet(pa.string(), 1),
    "parquet_nested_binary": of_parquet(pa.large_binary(), 2),
    "tf_examples": of_examples("add_tf_examples"),
    "tf_examples_gz": of_examples("add_tf_examples", ".gz"),
    "array_records": of_examples("add_array_records"),
    "python_bytes": of_python(BAD),
    "python_str": of_python(HALF),
    "python_document": of_python(HALF, as_document=True),
    "python_bytes_by_seqio": of_python(BAD, preprocessors=[same]),
    "python_str_by_seqio": of_python(HALF, preprocessors=[same]),
    "tensorflow": of_tensorflow,
    "tfds": of_tfds("text"),
    "tfds_nested": of_tfds("meta.text"),
}


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """A Task of each way."""
    import seqio

    from tasks import factories

    tasks = {}
    for way, register in WAYS.items():
        register(f"utf8_{way}", tmp_path_factory.mktemp(way), factories)
        tasks[way] = seqio.TaskRegistry.get(f"utf8_{way}")
    return tasks


def settings(bad_utf8, vocabulary="bytes"):
    return DataSettings(
        "any", "", {"targets": 8}, "", bad_utf8=bad_utf8, vocabulary=vocabulary
    )


@pytest.mark.parametrize("bad_utf8", ["error", "replace", "drop"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_obeys_the_setting(registered, way, bad_utf8):
    found = documents.read(registered[way], "train", 0, settings(bad_utf8))
    good = next(found)
    assert good.text["targets"].rstrip() == GOOD.decode()
    assert good.fault == ""
    if bad_utf8 == "error":
        words = rf"document .* in split 'train' of task 'utf8_{way}' is not UTF-8 at by"
        with pytest.raises(StoreError, match=f"{words}te 3 .*BAD_UTF8 = 'replace'"):
            next(found)
        return
    (bad,) = found
    assert bad.fault == {"replace": "replaced", "drop": "bad_utf8"}[bad_utf8]
    # Half a character is three bytes, none of which is UTF-8.
    assert re.sub("\ufffd+", "\ufffd", bad.text["targets"]) == MENDED


@pytest.mark.parametrize(
    "bad_utf8", ["replace", pytest.param("drop", marks=pytest.mark.slow)]
)
def test_every_way_is_counted(registered, tmp_path, bad_utf8):
    import seqio

    from tasks.prepare import prepare

    names = [t.name for way, t in registered.items() if not way.startswith("tfds")]
    mixture = f"utf8_{bad_utf8}"
    seqio.MixtureRegistry.add(mixture, names, default_rate=1.0)
    data = DataSettings(
        mixture,
        "tasks.python_text",
        {"targets": 8},
        str(tmp_path / "store"),
        vocabulary="bytes",
        bad_utf8=bad_utf8,
    )
    manifest = prepare(data)
    assert set(manifest.tasks) == set(names)
    for name, task in manifest.tasks.items():
        for split in task.splits.values():
            left_out = split.removed.get("bad_utf8", 0)
            wanted = {"replace": (2, 1, 0), "drop": (1, 0, 1)}[bad_utf8]
            assert (split.documents, split.replaced_documents, left_out) == wanted, name


@pytest.mark.parametrize("bad_utf8", ["error", "drop"])
def test_a_task_that_keeps_its_own_tokens_obeys_too(registered, bad_utf8):
    data = settings(bad_utf8, "task")
    found = documents.read(registered["python_bytes"], "train", 0, data)
    assert next(found).fault == ""
    if bad_utf8 == "error":
        with pytest.raises(
            StoreError, match=r"document '1' in .* is not UTF-8 at byte"
        ):
            next(found)
    else:
        assert next(found).fault == "bad_utf8"
