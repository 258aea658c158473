"""Whatever a file holds, it is read or refused in a message: nothing else comes out."""

import json
import shutil
from pathlib import Path

import memory_store
import numpy as np
import pytest
import sentencepiece
import tokenizers
from damaged import NAMES, damaged_bytes, damaged_json, fuzz
from hypothesis import strategies as st

from launch.checkpoints import compare
from launch.checkpoints.provenance import provenance
from launch.checkpoints.store import Checkpoints
from launch.config import reader
from launch.config.diff import changes
from launch.config.syntax import statements
from launch.records.lines import METRICS_FILE
from launch.records.read import Records
from tasks import files, vocabularies
from tasks.arrays import Array
from tasks.errors import StoreError
from tasks.manifest import MANIFEST, read_manifest
from tasks.preparation import parts
from tasks.preparation.plan import Unit
from tasks.store import open_store, split_path

CONFIGS = Path(reader.__file__).resolve().parents[2] / "configs"
TEXT = "def main(x):\n    return ▁x + 1  # été\n"


def each(daily: int, slow: int):
    """Few examples every day, many in `make test-all`."""
    return pytest.mark.parametrize(
        "number", [daily, pytest.param(slow, marks=pytest.mark.slow)]
    )


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """A small store, outside of which nothing may be opened."""
    folder = tmp_path / "outer" / "store"
    memory_store.on_disk(memory_store.pair_store(a=12, b=5), folder)
    kvstore = files.kvstore

    def inside(path):
        assert Path(path).resolve().is_relative_to(folder), path
        return kvstore(path)

    monkeypatch.setattr(files, "kvstore", inside)
    return folder


def read_all(folder: Path) -> None:
    """Reads all of a store."""
    opened = open_store(folder)
    for task, of_task in opened.manifest.tasks.items():
        for split in of_task.splits:
            part = opened.split(task, split)
            part.offsets()
            part.languages()
            for number in range(min(part.num_documents, 2)):
                part.document("targets", number)


@each(60, 3000)
def test_a_manifest_of_a_store_is_read_or_refused(store, number):
    path = store / MANIFEST
    whole = path.read_bytes()

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_all(store)

    damage = st.one_of(damaged_json(json.loads(whole)), damaged_bytes(whole))
    fuzz(damage, read, number)


@each(40, 1500)
def test_headers_and_chunks_of_a_store_are_read_or_refused(store, number):
    folder = store / "a" / "train" / "targets" / "tokens"
    header, chunk = folder / "zarr.json", folder / "c" / "0"
    whole = {path: path.read_bytes() for path in (header, chunk)}

    def read(damage: tuple[Path, bytes]) -> None:
        for path, content in whole.items():
            path.write_bytes(content)
        damage[0].write_bytes(damage[1])
        array = Array(str(folder))
        array.read([0], [min(array.size, 100)])
        read_all(store)

    damage = st.one_of(
        st.tuples(st.just(header), damaged_json(json.loads(whole[header]))),
        st.tuples(st.just(header), damaged_bytes(whole[header])),
        st.tuples(st.just(chunk), damaged_bytes(whole[chunk])),
    )
    fuzz(damage, read, number)


@each(60, 3000)
def test_descriptions_of_vocabularies_are_read_or_refused(number):
    whole = vocabularies.to_files(vocabularies.ByteVocabulary(5))
    description = whole[vocabularies.DESCRIPTION]

    def read(content: bytes) -> None:
        def file(name: str) -> bytes | None:
            assert name in {"vocabulary.json", "vocabulary.model", "tokenizer.json"}
            return content if name == vocabularies.DESCRIPTION else None

        vocabularies.from_files(file, "here").decode([3, 70, 10**6])

    fields = json.loads(description) | {"eos_token": ""}
    fuzz(st.one_of(damaged_json(fields), damaged_bytes(description)), read, number)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    """A small SentencePiece model."""
    prefix = tmp_path_factory.mktemp("model") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{TEXT} {i} {i * 7919}" for i in range(50)]),
        model_prefix=str(prefix),
        vocab_size=300,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.fixture(scope="module")
def tokenizer() -> dict:
    """A small tokenizer.json."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return json.loads(made.to_str())


def use(vocabulary) -> None:
    """Does with a vocabulary what preparing and drawing do."""
    vocabulary.decode([*vocabulary.encode(TEXT), 0, 10**6, -1])
    _ = vocabulary.size, vocabulary.has_padding, vocabulary.fingerprint


@each(60, 3000)
def test_sentencepiece_models_are_read_or_refused(model, tmp_path, number):
    path = tmp_path / "small.model"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        use(vocabularies.from_file(path))

    fuzz(damaged_bytes(model), read, number)


@each(60, 3000)
def test_tokenizers_are_read_or_refused(tokenizer, tmp_path, number):
    path = tmp_path / "tokenizer.json"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        use(vocabularies.from_file(path))

    whole = json.dumps(tokenizer).encode()
    fuzz(st.one_of(damaged_json(tokenizer), damaged_bytes(whole)), read, number)


@each(80, 4000)
def test_records_of_metrics_are_read_or_passed_over(tmp_path, number):
    told = set[bool]()
    record = {
        "step": 1,
        "split": "train",
        "loss/nats": 2.5,
        "load": [[1, 2.0], ["nan"]],
    }
    line = json.dumps(record).encode()

    def read(damage: bytes) -> None:
        (tmp_path / METRICS_FILE).write_bytes(b"\n".join([line, damage, line]) + b"\n")
        records = Records(tmp_path)
        for found in records.all():
            assert isinstance(found["step"], int)
        told.add(any("cannot be read" in note for note in records.notes))

    strategy = st.one_of(damaged_json(record), damaged_bytes(line))
    fuzz(strategy, read, number, refuses=False)
    assert told == {True, False}, "damaged lines are said"


@each(30, 1500)
def test_manifests_of_checkpoints_are_read_or_refused(trained, tmp_path, number):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    (path,) = (folder / "checkpoints" / "20" / "manifest").glob("metadata")
    whole = path.read_bytes()
    operative = (folder / "config.gin").read_text()
    now = provenance(operative, read_manifest(str(trained.store)))

    with Checkpoints(str(folder), keep=1, read_only=True) as saved:

        def read(content: bytes) -> None:
            path.write_bytes(content)
            manifest = saved.manifest(20)
            rows = compare.arrays(manifest["arrays"], {}, partial=False)
            rows += compare.data(manifest, now, partial=False)
            compare.table(rows)
            changes(manifest["config"], operative)

        damage = st.one_of(damaged_json(json.loads(whole)), damaged_bytes(whole))
        fuzz(damage, read, number)


GIN = (CONFIGS / "runs" / "tiny.gin").read_bytes()
_WORDS = st.sampled_from(
    [
        "MODEL_DIR", "NUM_LAYERS", " = ", "'x'", "%NUM_LAYERS", "@f()", "include ",
        "import os", "(", ")", "[", "{", "}", ",", ":", "\n", "\\\n", '"""', "#", "/",
        "model.num_layers", "1e999", "9" * 5000, "-", "\0", "\t", "\ud7ff", "b'x'",
        "(" * 300, "[" * 5000, "{1:" * 200, "f''", "~1", "1 if 1 else 2", "\x0c",
        '"/dev/zero"', '"/"', '"../../../etc/passwd"', '"runs/tiny.gin"',
    ]
)  # fmt: skip


@each(60, 3000)
def test_gin_files_are_read_or_refused(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.gin"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        text = content.decode(errors="replace")
        list(statements(text))
        reader.read([str(path)], [text[:60]])

    words = st.lists(_WORDS, max_size=12).map(lambda found: "".join(found).encode())
    fuzz(st.one_of(damaged_bytes(GIN), words, words.map(GIN.__add__)), read, number)


# --------------------------------------------------------------------------- paths


@pytest.mark.fast
@each(200, 5000)
def test_no_name_of_a_task_or_split_leads_out_of_the_store(tmp_path, number):
    names = st.one_of(NAMES, st.text(min_size=1, max_size=6))

    def read(pair: tuple[str, str]) -> None:
        path = split_path(f"{tmp_path}/store", *pair)
        inside = path.removeprefix(f"{tmp_path}/store/").split("/")
        assert len(inside) == 2
        assert not {"..", "."} & set(inside)
        assert not set("\0\\:") & set(path)
        if not all(pair):
            raise StoreError("refused when the manifest is read")

    fuzz(st.tuples(names, names), read, number)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["", " ", "a\0b", "a\nb"])
@pytest.mark.parametrize("place", ["task", "split", "feature"])
def test_a_manifest_with_a_name_that_is_none_is_refused(name, place, tmp_path):
    memory_store.on_disk(memory_store.text_store(a=5), tmp_path)
    fields = json.loads((tmp_path / MANIFEST).read_text())
    holder = {
        "task": fields["tasks"],
        "split": fields["tasks"]["a"]["splits"],
        "feature": fields["tasks"]["a"]["splits"]["train"]["tokens"],
    }[place]
    holder[name] = holder.pop(next(iter(holder)))
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(StoreError, match="lacks what it should say"):
        read_manifest(str(tmp_path))


@pytest.mark.fast
def test_a_feature_that_is_a_path_is_refused(tmp_path):
    memory_store.on_disk(memory_store.text_store(a=5), tmp_path)
    fields = json.loads((tmp_path / MANIFEST).read_text())
    tokens = fields["tasks"]["a"]["splits"]["train"]["tokens"]
    tokens["../../../elsewhere"] = 1
    (tmp_path / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(StoreError, match=r"it names features \['../../../elsewhere'"):
        open_store(tmp_path)


@pytest.mark.fast
def test_a_part_is_what_its_place_says_and_not_its_description(tmp_path):
    unit = Unit("a", "train", 0)
    writer = parts.PartWriter(
        str(tmp_path), unit, 0, types={"targets": np.dtype("u2")}, size=300
    )
    written = writer.close(0, last=True)
    (path,) = tmp_path.rglob("*-000000.json")
    fields = json.loads(path.read_text())
    fields["unit"] = {"task": "..", "split": "/etc", "shard": "../../x"}
    path.write_text(json.dumps(fields | {"number": "../9"}))
    assert parts.finished(str(tmp_path), unit) == [written]
    with pytest.raises(ValueError, match="format code 'd'"):
        parts._path(str(tmp_path), Unit("a", "train", "../../x"), 0)
    path.write_text("[" * 100_000)
    with pytest.raises(StoreError, match="cannot be read"):
        parts.finished(str(tmp_path), unit)


@pytest.mark.fast
def test_what_a_link_points_to_is_not_deleted_with_a_store(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work").write_text("years")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "folder").symlink_to(tmp_path / "mine")
    (tmp_path / "store" / "file").symlink_to(tmp_path / "mine" / "work")
    files.delete_folder(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert (tmp_path / "mine" / "work").read_text() == "years"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shape": [], "chunk_shape": []}, "of rank 0, not a row of integers"),
        ({"data_type": "float32"}, "holds float32 of rank 1"),
        ({"chunk_shape": [1 << 40]}, "is cut in pieces that no memory should"),
    ],
)
def test_an_array_that_is_none_of_a_store_is_refused(changes, fault, tmp_path):
    header = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [10],
        "data_type": "uint16",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": changes.pop("chunk_shape", [10])},
        },
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": 0,
        **changes,
    }
    (tmp_path / "zarr.json").write_text(json.dumps(header))
    with pytest.raises(StoreError, match=fault):
        Array(str(tmp_path))
