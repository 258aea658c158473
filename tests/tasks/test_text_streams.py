"""Files as people have them: marked, padded, cut short, or not what their name says."""

import gzip
import json
import re
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks import records, sources
from tasks.errors import StoreError
from tasks.records import Fields
from tasks.sources import Document, Shard, document_of

pytestmark = pytest.mark.fast

TEXT = Fields({"targets": "text"})
MARK = b"\xef\xbb\xbf"


def read_json_lines(shard):
    return records.read_json_lines(shard, TEXT)


def texts(read, path, range_bytes=1 << 20):
    return [
        document.features["targets"]
        for shard in sources.byte_ranges(path, range_bytes)
        for document in read(shard)
    ]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("read", "content"),
    [
        (sources.read_files, b"some words"),
        (sources.read_lines, b"some words\n"),
        (sources.read_blocks, b"some words\n\n"),
        (read_json_lines, b'{"text": "some words"}\n'),
    ],
)
def test_a_mark_of_utf8_is_no_text(tmp_path, read, content, ending):
    path = tmp_path / f"a.txt{ending}"
    packed = {"": bytes, ".gz": gzip.compress, ".zst": lambda c: pa.compress(c, "zstd")}
    path.write_bytes(packed[ending](MARK + content))
    assert texts(read, path) == [b"some words"]
    path.write_bytes(packed[ending](MARK))
    wanted = [b""] if read is sources.read_files else []
    assert texts(read, path) == wanted


@pytest.mark.parametrize("range_bytes", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("read", [sources.read_lines, sources.read_blocks])
def test_a_marked_file_may_be_cut_anywhere(tmp_path, read, range_bytes):
    path = tmp_path / "a.txt"
    separator = b"\n" if read is sources.read_lines else b"\n\n"
    path.write_bytes(MARK + separator.join([b"one", b"two", MARK + b"three"]))
    assert texts(read, path, range_bytes) == [b"one", b"two", MARK + b"three"]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("utf-16", "UTF-16 (little-endian)"),
        ("utf-16-be", "UTF-16 (big-endian)"),
        ("utf-32", "UTF-32 (little-endian)"),
        ("utf-32-be", "UTF-32 (big-endian)"),
    ],
)
def test_another_encoding_is_refused_by_name(tmp_path, encoding, named):
    path = tmp_path / "a.txt"
    marked = "\ufeff" * encoding.endswith("be") + "some words\n" * 9
    path.write_bytes(marked.encode(encoding))
    for shard in sources.byte_ranges(path, 20):  # also by those of later ranges
        with pytest.raises(StoreError, match=re.escape(f"{path} is {named}, as the")):
            list(sources.read_lines(shard))


def test_zeros_behind_gzip_data_are_noted(tmp_path, capfd):
    path = tmp_path / "a.txt.gz"
    members = gzip.compress(b"one\n"), gzip.compress(b""), gzip.compress(b"two\n")
    path.write_bytes(b"".join(members) + bytes(3 << 20))
    assert texts(sources.read_lines, path) == [b"one", b"two"]
    assert texts(sources.read_lines, path) == [b"one", b"two"]
    said = f"note: {path}: {3 << 20:,} zeros behind its gzip data are passed over\n"
    assert capfd.readouterr().err == said
    # Between two members too.
    path.write_bytes(members[0] + bytes(5) + members[2])
    assert texts(sources.read_lines, path) == [b"one", b"two"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c + b"rubbish", "from byte {size:,} on, which begins with b'rubb"),
        (
            lambda c: c + b"\0\0\x1f",
            "from byte {after:,} on, which begins",
        ),
        (lambda c: c[:-9], "cut short at byte {cut:,}, where the file ends"),
        (lambda c: c[:3], "cut short at byte 3, where the file ends"),
        (lambda c: c[:1], "it is no gzip data, which begins with b'\\x1f'"),
        (lambda c: b"plain text", "it is no gzip data, which begins with b'plain te'"),
        (lambda c: c[:40] + b"\xff" * 40 + c[80:], "its gzip data are damaged behind"),
        (lambda c: c[:-8] + bytes(8), "incorrect data check"),
    ],
)
def test_gzip_that_is_not_whole_is_refused_with_its_place(tmp_path, change, why):
    whole = gzip.compress(b"".join(b"%d\n" % (n * n) for n in range(1000)))
    path = tmp_path / "a.txt.gz"
    path.write_bytes(change(whole))
    size = len(whole)
    why = why.format(size=size, after=size + 2, cut=size - 9)
    with pytest.raises(StoreError, match=re.escape(f"{path} cannot be read: ")) as said:
        texts(sources.read_lines, path)
    assert why in str(said.value)
    assert zlib.decompress(whole, wbits=31).endswith(b"998001\n")  # so it was whole


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c[:-5], "Truncated compressed stream, up to byte"),
        (lambda c: c + b"rubbish", "Unknown frame descriptor, up to byte"),
    ],
)
def test_zstandard_that_is_not_whole_is_refused_with_its_place(tmp_path, change, why):
    content = change(bytes(pa.compress(b"words\n" * 1000, "zstd")))
    path = tmp_path / "a.txt.zst"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=f"{why} {len(content)} of the file"):
        texts(sources.read_lines, path)


def test_numbers_of_any_length_stop_no_document(tmp_path):
    digits = "9" * 5000
    path = tmp_path / "a.jsonl"
    path.write_text(
        f'{{"text": "fine", "id": {digits}, "more": [-{digits}, {{"x": {digits}}}]}}\n'
        f'{{"text": {digits}, "id": 7}}\n{{"text": -{digits}}}\n{{"text": 12}}\n'
    )
    wanted = ["fine", digits, f"-{digits}", "12"]
    assert texts(read_json_lines, path) == [text.encode() for text in wanted]
    path.write_text(f'{{"id": {digits}, "text": }}\n')
    with pytest.raises(StoreError, match=r"line 1: .*: this is no JSON"):
        texts(read_json_lines, path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mta.body.text", "there is no field 'mta' of 'mta.body.text' among 'meta'"),
        ("meta.bdy.text", "field 'meta' has no field 'bdy' of 'meta.bdy.text' among "),
        ("meta.body.txt", "field 'meta.body' has no field 'txt' of 'meta.body.txt' am"),
        ("meta.size.text", "field 'meta.size' is "),
    ],
)
def test_the_level_that_is_missing_is_named(tmp_path, name, why):
    row = {"meta": {"body": {"text": "some"}, "size": 3}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path, read in (
        (tmp_path / "a.jsonl", records.read_json_lines),
        (tmp_path / "a.parquet", records.read_parquet),
    ):
        shard = Shard((str(path),))
        with pytest.raises(StoreError, match=re.escape(why)):
            list(read(shard, Fields({"targets": name})))
        (found,) = read(shard, Fields({"targets": "meta.body.text"}))
        assert found.features == {"targets": b"some"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("n", 5), "document 3, 'n', has as its 'targets' 5 (int), which is no text"),
        (("n", None), "has as its 'targets' None, which is no text"),
        (("n", bytearray(b"x")), "has as its 'targets' bytearray(b'x') (bytearray), "),
        (("n", [["a"], "b"]), "has as its 'targets' [['a'], 'b'] (list), which"),
        (("n", "y" * 99), ""),
        ((None, "text"), "document 3 has as its name None, and must be a str"),
        ("text", "document 3 is 'text' (str), and must be a name and a text"),
        (("a", "b", "c"), "document 3 is ('a', 'b', 'c') (tuple), and must be a"),
        (7, "document 3 is 7 (int), and must be a name and a text"),
        (Document({"inputs": b"a"}, "n"), "has no text 'targets' among 'inputs'"),
        (Document({"targets": b"a"}, "n", 1), "has as its language 1 (int), and must"),
        (Document({"targets": 1.5}, "n"), "has as its 'targets' 1.5 (float), which"),
    ],
)
def test_what_is_no_text_is_named(given, why):
    if not why:
        assert document_of(given, ("targets",), "document 3").name == "n"
        return
    with pytest.raises(TypeError, match=re.escape(why)):
        document_of(given, ("targets",), "document 3")


def test_what_is_text_becomes_bytes():
    for given in (("1", "é"), (1, "é".encode()), Document({"targets": "é"}, "1")):
        found = document_of(given, ("targets",), "document 3")
        assert found == Document({"targets": "é".encode()}, "1")
