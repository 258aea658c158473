"""Folders of safetensors: as the package of that name has them, or refused."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from damaged import damaged_bytes, damaged_json, fuzz
from hypothesis import strategies as st

from launch.exchange.header import DTYPES, Form, TensorsError
from launch.exchange.tensors import INDEX, WHOLE, open_tensors
from launch.exchange.writing import arriving, write_tensors

F32 = np.dtype(np.float32)
SHAPES = ((3, 5), (), (0, 4), (7,), (2, 1, 3))


def random_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of every type and of some shapes; any bytes, NaN too."""
    rng = np.random.default_rng(seed)
    made = {}
    for (name, dtype), shape in itertools.product(DTYPES.items(), SHAPES):
        content = rng.integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
        if dtype == np.bool_:
            content %= 2
        made[f"{name}.{len(made)}.é"] = content.view(dtype).reshape(shape)
    return made


def forms(tensors: dict[str, np.ndarray]) -> dict[str, Form]:
    return {name: Form(value.dtype, value.shape) for name, value in tensors.items()}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert forms(found) == forms(wanted)
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in open_tensors(path).items()}


def file_of(header: object, data: bytes = b"") -> bytes:
    """A file with any header: an object, or the text of one."""
    text = header if isinstance(header, str) else json.dumps(header)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def said(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------ beside the package


@pytest.mark.fast
def test_what_the_package_writes_is_read_bit_by_bit(tmp_path):
    wanted = random_tensors()
    safetensors.numpy.save_file(wanted, tmp_path / WHOLE, {"format": "pt"})
    assert_same(read_all(tmp_path), wanted)
    assert_same(read_all(tmp_path / WHOLE), wanted)
    assert {str(value.dtype) for value in wanted.values()} == {
        str(dtype) for dtype in DTYPES.values()
    }


@pytest.mark.fast
def test_the_package_reads_what_is_written_bit_by_bit(tmp_path):
    wanted = random_tensors()
    write_tensors(tmp_path, forms(wanted), wanted.__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    content = (tmp_path / WHOLE).read_bytes()
    found = dict(safetensors.deserialize(content))
    for name, value in wanted.items():
        assert DTYPES[found[name]["dtype"]] == value.dtype
        assert tuple(found[name]["shape"]) == value.shape
        assert bytes(found[name]["data"]) == value.tobytes()
    with safetensors.safe_open(tmp_path / WHOLE, framework="np") as opened:
        assert set(opened.keys()) == set(wanted)
        assert opened.metadata() == {"format": "pt"}
    for tensor in open_tensors(tmp_path).values():
        assert tensor.begin % tensor.form.dtype.itemsize == 0


@pytest.mark.fast
def test_shards_are_no_larger_than_told_and_are_read_as_one(tmp_path):
    sizes = {"a": 60, "b": 40, "c": 1, "d": 300, "e": 30, "f": 0, "g": 70}
    wanted = {name: np.arange(n, dtype=np.uint8) for name, n in sizes.items()}
    asked = []

    def tensor(name: str) -> np.ndarray:
        asked.append(name)
        return wanted[name]

    write_tensors(tmp_path, forms(wanted), tensor, shard_bytes=100)
    assert asked == list(wanted)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 501}
    held: dict[str, set[str]] = {}
    for name, file in index["weight_map"].items():
        held.setdefault(file, set()).add(name)
    assert held == {  # 60 + 40; 1; 300 alone; 30 + 0 + 70
        "model-00001-of-00004.safetensors": {"a", "b"},
        "model-00002-of-00004.safetensors": {"c"},
        "model-00003-of-00004.safetensors": {"d"},
        "model-00004-of-00004.safetensors": {"e", "f", "g"},
    }
    for file, names in held.items():
        assert set(safetensors.numpy.load_file(tmp_path / file)) == names
    assert_same(read_all(tmp_path), wanted)
    assert_same(read_all(tmp_path / INDEX), wanted)


# ------------------------------------------------------------------------------ memory


@pytest.fixture
def peak():
    """Says the most memory since it was asked last, in bytes."""
    tracemalloc.start()

    def most() -> int:
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return found

    yield most
    tracemalloc.stop()


@pytest.mark.fast
def test_a_tensor_of_a_large_file_takes_its_own_memory_and_no_more(tmp_path, peak):
    size = 8_000_000
    header = {f"t{n}": said(n * size, (n + 1) * size) for n in range(25)}
    start = file_of(header)
    with (tmp_path / WHOLE).open("wb") as file:  # 200 MB, a hole but for the header
        file.write(start)
        file.truncate(len(start) + 25 * size)
    tensors = open_tensors(tmp_path)
    assert peak() < 1_000_000
    assert not tensors["t24"].read().any()
    assert size <= peak() < size + 100_000


@pytest.mark.fast
def test_writing_has_one_tensor_at_a_time(tmp_path, peak):
    size = 4_000_000
    plan = {f"t{n}": Form(F32, (size // 4,)) for n in range(5)}
    write_tensors(tmp_path, plan, lambda _: np.zeros(size // 4, F32), 2 * size)
    assert size <= peak() < 1.5 * size
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


# --------------------------------------------------------------------- what is refused


A_LIST = "types that are read are F64, F32"
ONE = json.dumps(said(0, 1))
BAD_HEADERS = {
    "nothing": (b"", "has 0 bytes: a file of safetensors has 8"),
    "no length": (b"\1\0\0", "has 3 bytes"),
    "long": (b"\xff" * 16, r"has 18,446,744,073,709,551,615 bytes, and the most is"),
    "100 MB": ((100_000_001).to_bytes(8, "little"), "has 100,000,001 bytes"),
    "cut": (file_of({"a": said(0, 1)}, b"x")[:30], r"cut short: its header ends at"),
    "pointer": (b"version https://git-lfs", "is a pointer of Git LFS"),
    "no JSON": (file_of("{"), r"the header of \S+ is not JSON: Expecting"),
    "no UTF-8": (b"\2" + b"\0" * 7 + b"\xff\xff", "is not JSON: 'utf-8' codec"),
    "deep": (file_of("[" * 100_000), "is not JSON: "),
    "a long number": (file_of("9" * 5000), "is not JSON: Exceeds the limit"),
    "a list": (file_of([1]), r"is \[1\] and not a JSON object"),
    "twice": (file_of(f'{{"a": {ONE}, "a": {ONE}}}', b"x"), "has the name 'a' twice"),
    "twice within": (file_of('{"a": {"dtype": 1, "dtype": 2}}'), "'dtype' twice"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), r"has __metadata__ {'a': 1}"),
    "no text": (file_of({"\ud800": said(0, 0)}), r"tensor '\\ud800', which is no text"),
    "no object": (file_of({"a": 3}), "says 3 of tensor 'a'"),
    "no type": (file_of({"a": {"shape": []}}), f"'a' as None: {A_LIST}"),
    "a type": (file_of({"a": said(0, 1, "F4")}), f"tensor 'a' as 'F4': {A_LIST}"),
    "a type that is none": (file_of({"a": said(0, 1, [])}), r"as \[\]: types"),
    "no shape": (file_of({"a": said(0, 1, shape=3)}), "gives tensor 'a' the shape 3"),
    "below 0": (file_of({"a": said(0, 1, shape=[-1, -1])}), r"shape \[-1, -1\]"),
    "true": (file_of({"a": said(0, 1, shape=[True])}), r"the shape \[True\]"),
    "half": (file_of({"a": said(0, 1, shape=[1.0])}), r"the shape \[1.0\]"),
    "rank": (file_of({"a": said(0, 1, shape=[1] * 65)}, b"x"), "at most 64 numbers"),
    "huge": (file_of({"a": said(0, 1, shape=[2**40, 2**40])}), "which no memory"),
    "huge and empty": (
        file_of({"a": said(0, 0, shape=[0, 2**40, 2**40])}),
        "which no memory can hold",
    ),
    "no place": (file_of({"a": {"dtype": "U8", "shape": [1]}}), "'a' at None"),
    "back": (file_of({"a": said(3, 2, shape=[1])}), r"'a' at \[3, 2\]"),
    "size": (
        file_of({"a": said(0, 5, "F16", [3])}),
        r"has tensor 'a' in 5 bytes, and F16 of shape \[3\] takes 6",
    ),
    "over": (
        file_of({"a": said(0, 4), "b": said(3, 6)}, b"x" * 6),
        "has tensor 'b' at byte 3 of its data, within tensor 'a', which ends at 4",
    ),
    "alias": (
        file_of({"a": said(0, 4), "b": said(0, 4)}, b"x" * 4),
        "tensor 'b' at byte 0 of its data, within tensor 'a'",
    ),
    "hole": (
        file_of({"b": said(6, 8), "a": said(0, 4)}, b"x" * 8),
        "has tensor 'b' at byte 6 of its data, and the 2 bytes before it are of none",
    ),
    "short": (
        file_of({"a": said(0, 4)}, b"x" * 3),
        "is cut short: tensor 'a' ends at byte 4 of its data, of which 3 are there",
    ),
    "more": (
        file_of({"a": said(0, 4)}, b"x" * 1005),
        "goes on for 1,001 bytes after its last tensor",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_file_that_is_none_is_refused_in_a_sentence_that_names_it(what, tmp_path):
    content, why = BAD_HEADERS[what]
    path = tmp_path / WHOLE
    path.write_bytes(content)
    with pytest.raises(TensorsError, match=why) as error:
        open_tensors(tmp_path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_the_package_refuses_the_same_or_less(tmp_path):
    # What it takes and we do not: names that hide others, arrays NumPy cannot have.
    taken = set()
    for what, (content, _) in BAD_HEADERS.items():
        (tmp_path / what).write_bytes(content)
        with (
            contextlib.suppress(Exception),
            safetensors.safe_open(tmp_path / what, framework="np"),
        ):
            taken.add(what)
    assert taken == {"twice", "huge and empty", "rank"}


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder of two shards; outside of it lies another file."""
    folder = tmp_path / "outer" / "model"
    folder.mkdir(parents=True)
    (folder / "1.safetensors").write_bytes(file_of({"a": said(0, 2)}, b"aa"))
    (folder / "2.safetensors").write_bytes(file_of({"b": said(0, 2)}, b"bb"))
    (folder.parent / "3.safetensors").write_bytes(file_of({"c": said(0, 2)}, b"cc"))
    return folder


def write_index(folder: Path, **changes: object) -> None:
    file_of = {"a": "1.safetensors", "b": "2.safetensors"} | changes
    (folder / INDEX).write_text(json.dumps({"weight_map": file_of}))


def test_an_index_that_names_what_is_not_there_is_refused(shards):
    write_index(shards, c="3.safetensors", d="4.safetensors")
    why = "names 4 files, of which 2 are not there: '3.safetensors', '4.safetensors'"
    with pytest.raises(TensorsError, match=why):
        open_tensors(shards)
    write_index(shards, c="2.safetensors")
    why = r"2.safetensors holds no tensor 'c', which model\S+json says is in it"
    with pytest.raises(TensorsError, match=why):
        open_tensors(shards)
    (shards / INDEX).write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert set(open_tensors(shards)) == {"a"}
    (shards / "1.safetensors").write_bytes(
        file_of({"a": said(0, 2), "z": said(2, 4)}, b"aazz")
    )
    with pytest.raises(TensorsError, match=r"tensor 'z', which model\S+ does not name"):
        open_tensors(shards)


@pytest.mark.parametrize(
    "file",
    [
        "../3.safetensors", "./1.safetensors", "/3.safetensors", "..", "", ".",
        "..\\3.safetensors", "C:3.safetensors", "1.safetensors\0", "\n.safetensors",
        "sub/1.safetensors", "pytorch_model.bin", 1, None, ["1.safetensors"],
    ],
)  # fmt: skip
def test_no_name_in_an_index_leads_out_of_its_folder(file, shards):
    write_index(shards)
    assert read_all(shards)["b"].tobytes() == b"bb"
    write_index(shards, c=file)
    with pytest.raises(TensorsError, match=r"tensor 'c' in .* not the name of a"):
        open_tensors(shards)


@pytest.mark.fast
def test_a_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(TensorsError, match=f"holds neither {WHOLE} nor {INDEX}$"):
        open_tensors(tmp_path)
    for name in ("pytorch_model.bin", "x.pt"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(TensorsError, match=r"is a pickle, .*save_pretrained"):
                open_tensors(path)
    (tmp_path / "adapter.safetensors").write_bytes(file_of({}))
    with pytest.raises(TensorsError, match=r"but 'adapter.safetensors': name the file"):
        open_tensors(tmp_path)
    assert open_tensors(tmp_path / "adapter.safetensors") == {}
    (tmp_path / WHOLE).write_bytes(file_of({}))
    (tmp_path / INDEX).write_text('{"weight_map": []}')
    with pytest.raises(TensorsError, match="holds both"):
        open_tensors(tmp_path)
    with pytest.raises(TensorsError, match=r'has no "weight_map"'):
        open_tensors(tmp_path / INDEX)
    with pytest.raises(TensorsError, match="nowhere is not there"):
        open_tensors(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(TensorsError, match="is no file"):
        open_tensors(tmp_path / "pipe.safetensors")


@pytest.mark.fast
def test_a_file_that_changes_once_it_is_opened_is_refused(tmp_path):
    path = tmp_path / WHOLE
    path.write_bytes(file_of({"a": said(0, 4, "BOOL")}, b"\0\1\0\1"))
    tensor = open_tensors(tmp_path)["a"]
    assert tensor.read().tolist() == [False, True, False, True]
    late = dataclasses.replace(tensor, begin=tensor.begin + 3)  # as if cut meanwhile
    with pytest.raises(TensorsError, match="is cut short: it ends at byte"):
        late.read()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TensorsError, match="has changed since it was opened"):
        tensor.read()
    path.write_bytes(file_of({"a": said(0, 4, "BOOL")}, b"\0\1\2\1"))
    with pytest.raises(
        TensorsError, match="'a' as BOOL, with bytes other than 0 and 1"
    ):
        open_tensors(tmp_path)["a"].read()


@pytest.mark.parametrize("number", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_headers_and_indices_are_read_or_refused(number, tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": said(0, 8, "F32", [2, 1]),
        "b": said(8, 10, "BF16", []),
        "c": said(10, 10, "I64", [0]),
    }
    whole = file_of(header, b"0123456789")
    index = {"metadata": {"total_size": 10}, "weight_map": dict.fromkeys("abc", WHOLE)}

    def read(damage: tuple[str, bytes]) -> None:
        (tmp_path / INDEX).unlink(missing_ok=True)
        (tmp_path / WHOLE).write_bytes(whole)
        name, content = damage
        (tmp_path / name).write_bytes(content)
        read_all(tmp_path / name)

    headers = damaged_json(header).map(lambda one: file_of(one.decode(), whole[-10:]))
    damage = st.one_of(
        st.tuples(st.just(WHOLE), headers),
        st.tuples(st.just(WHOLE), damaged_bytes(whole)),
        st.tuples(st.just(INDEX), damaged_json(index)),
    )
    fuzz(damage, read, number)


# ------------------------------------------------------------------- all of it, or none


@pytest.mark.fast
def test_a_folder_gets_its_name_when_all_is_written(tmp_path):
    wanted = random_tensors()
    to = tmp_path / "new" / "model"
    with arriving(to) as part:
        write_tensors(part, forms(wanted), wanted.__getitem__, shard_bytes=300)
        (part / "config.json").write_text("{}")
        assert not to.exists()
    assert_same(read_all(to), wanted)
    assert (to / "config.json").exists()
    assert [path.name for path in to.parent.iterdir()] == ["model"]
    with pytest.raises(TensorsError, match="is there already"), arriving(to):
        pass
    assert_same(read_all(to), wanted)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    plan = {"a": Form(F32, (1000,)), "b": Form(F32, (3000,))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with (
            pytest.raises(TensorsError, match=r"^cannot write \S+: File too large$"),
            arriving(tmp_path / "model") as part,
        ):
            write_tensors(part, plan, lambda name: np.zeros(plan[name].shape, F32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(TensorsError, match=r"^cannot write \S+: No space left on \S+$"),
        arriving(tmp_path / "model") as part,
    ):
        write_tensors(part, plan, lambda name: np.zeros(plan[name].shape, F32))
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
def test_what_else_goes_wrong_is_not_called_a_full_disk(tmp_path):
    def tensor(name: str) -> np.ndarray:
        raise OSError(errno.EIO, "of the source")

    with (
        pytest.raises(OSError, match="of the source"),
        arriving(tmp_path / "x") as part,
    ):
        write_tensors(part, {"a": Form(F32, (1,))}, tensor)
    with pytest.raises(KeyboardInterrupt), arriving(tmp_path / "x"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
