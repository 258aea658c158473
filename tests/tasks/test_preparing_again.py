"""A preparation that was cut up, killed and taken up again gives the same store."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks import arrays, files
from tasks.preparation import engines, parts, plan
from tasks.preparation.plan import Plan
from tasks.settings import DataSettings, FilterSettings
from tasks.store import StoreError, open_store, work_dir

MODULE = "corpus_of_files"
SUPPORT = Path(__file__).parents[1] / "support"
LANGUAGES = {"en": "the of a row token é ", "zh": "語言模型的學習資料", "": "0101"}

# Forks from a process that has imported everything, so that a kill costs milliseconds.
# Until the fork nothing has started a thread.
KILLED = """
import json, os, random, signal, sys, time
from tasks import seqio_tasks
from tasks.preparation import engines
from tasks.prepare import prepare
from tasks.settings import DataSettings, FilterSettings

data, kills, longest, workers = json.loads(sys.argv[1])
data = DataSettings(**data)
seqio_tasks.find(data, ("corpus_of_files",))
rng = random.Random(0)
engine = engines.Processes(workers) if workers > 1 else engines.in_this_process
for attempt in range(kills + 1):
    child = os.fork()
    if child == 0:
        if workers > 1:
            os.setpgid(0, 0)
        prepare(data, filters=FilterSettings("exact"), part_bytes=20_000, engine=engine,
                allowed_modules=("corpus_of_files",))
        os._exit(0)
    if attempt < kills:
        time.sleep(rng.uniform(0.0, longest))
        try:
            (os.killpg if workers > 1 else os.kill)(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def write_corpus(folder: Path) -> None:
    """Three files of 300 lines, likewise of JSON, a tenth of them repeated, and one
    of none, or of one language.
    """
    rng = np.random.default_rng(0)
    for name in ("train-0", "train-1", "train-2", "validation"):
        lines, records = [], []
        for _ in range(30 if name == "validation" else 300):
            language = rng.choice(list(LANGUAGES))
            letters = list(LANGUAGES[language])
            text = "".join(rng.choice(letters, rng.integers(5, 90))).strip() or "x"
            if lines and rng.random() < 0.1:
                text = lines[rng.integers(len(lines))]
            lines.append(text)
            other = f"{text} {language}"  # what is in both files is a duplicate
            record = {"text": other, "question": f"{text[:9]}?", "language": language}
            records.append(json.dumps(record, ensure_ascii=False))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        (folder / f"{name}.jsonl").write_text("\n".join(records) + "\n")
    (folder / "train-15.txt").write_text("")  # between those of 1 and 2
    record = {"text": "語言 zh", "question": "語?", "language": "zh"}
    (folder / "train-15.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORPUS", str(folder))
        yield folder


def settings(store_dir, name="both", **changes) -> DataSettings:
    values = {"vocabulary": "sentencepiece", "vocabulary_size": 320, **changes}
    values.setdefault("task_feature_lengths", {"targets": 32})
    return DataSettings(name, MODULE, store_dir=str(store_dir), **values)


def prepare(data, **more):
    from tasks.prepare import prepare

    return prepare(data, allowed_modules=(MODULE,), **more)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The store of the Mixture, without exact duplicates, made in one go."""
    data = settings(tmp_path_factory.mktemp("undisturbed") / "store")
    filters = FilterSettings("exact")
    prepare(data, filters=filters)
    return open_store(data.store_dir, data, filters)


def digests(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def run_killed(data, *, kills, longest, workers=1) -> list[int]:
    argument = json.dumps([dataclasses.asdict(data), kills, longest, workers])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, argument],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return [int(code) for code in done.stdout.split()]


def test_killed_and_taken_up_again_the_store_is_bit_for_bit_the_same(
    undisturbed, tmp_path
):
    data = settings(tmp_path / "store")
    codes = run_killed(data, kills=6, longest=0.4)
    assert codes.count(-9) >= 3, codes
    assert codes[-1] == 0
    assert digests(data.store_dir) == digests(undisturbed.path)
    assert not Path(work_dir(data.store_dir)).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_a_hundred_times_the_store_is_the_same(undisturbed, tmp_path, workers):
    data = settings(tmp_path / "store")
    longest = 0.4 if workers == 1 else 30.0
    codes = run_killed(
        data, kills=100 if workers == 1 else 6, longest=longest, workers=workers
    )
    assert codes.count(-9) >= (50 if workers == 1 else 3), codes
    assert digests(data.store_dir) == digests(undisturbed.path)


@pytest.mark.slow
def test_processes_and_beam_make_the_same_store(undisturbed, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    for name, engine in (
        ("processes", engines.Processes(2)),
        ("beam", engines.Beam("DirectRunner")),
    ):
        data = settings(tmp_path / name)
        prepare(data, filters=FilterSettings("exact"), engine=engine, part_bytes=20_000)
        assert digests(data.store_dir) == digests(undisturbed.path), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine", [engines.Processes(2), engines.Beam("DirectRunner")], ids=["2", "beam"]
)
def test_a_fault_in_a_worker_is_said_in_one_line(corpus, tmp_path, engine, monkeypatch):
    monkeypatch.syspath_prepend(str(SUPPORT))
    broken = tmp_path / "corpus"
    broken.mkdir()
    write_corpus(broken)
    with open(broken / "train-1.txt", "ab") as file:
        file.write(b"caf\xe9\n")
    monkeypatch.setenv("CORPUS", str(broken))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from tasks.preparation import engines\n"
            "from tasks.prepare import prepare\n"
            "from tasks.settings import DataSettings\n"
            "if __name__ == '__main__':\n"
            "    data = DataSettings('lines', 'corpus_of_files', {'targets': 32}, "
            f"{str(tmp_path / 'store')!r}, vocabulary='bytes')\n"
            "    try:\n"
            "        prepare(data, allowed_modules=('corpus_of_files',), "
            f"engine=engines.{engine!r})\n"
            "    except ValueError as error:\n"
            "        sys.exit(str(error))\n",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
    )
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert "train-1.txt" in message
    assert "is not UTF-8 at byte 3 (0xe9)" in message
    assert "BAD_UTF8" in message


def test_a_mixture_holds_each_task_with_its_rate_and_languages(undisturbed):
    assert undisturbed.tasks == ("lines", "tongues")
    manifest = undisturbed.manifest
    assert [manifest.tasks[t].rate for t in undisturbed.tasks] == [3.0, 1.0]
    assert undisturbed.split("lines", "train").languages() is None
    part = undisturbed.split("tongues", "train")
    assert part.language_names == ("", "en", "zh")
    numbers = part.languages()
    offsets = part.offsets()
    for number, name in enumerate(part.language_names):
        mine = np.flatnonzero(numbers == number)
        told = part.manifest.languages[name]
        assert told.documents == len(mine)
        assert told.tokens == (offsets[mine + 1] - offsets[mine]).sum()
        texts = [part.document("targets", int(n)) for n in mine[:20]]
        assert all(text.endswith(f" {name}") for text in texts)
    assert sum(t.text_bytes for t in part.manifest.languages.values()) == (
        part.manifest.text_bytes
    )


def test_duplicates_go_and_what_is_held_out_is_not_learnt(undisturbed, corpus):
    held = set((corpus / "validation.txt").read_text().splitlines())
    lines = [
        line
        for number in range(3)
        for line in (corpus / f"train-{number}.txt").read_text().splitlines()
    ]
    part = undisturbed.split("lines", "train")
    kept = [part.document("targets", n) for n in range(part.num_documents)]
    assert kept == [line for line in dict.fromkeys(lines) if line not in held]
    removed = part.manifest.removed["exact_duplicates"]
    assert removed == len(lines) - len(kept) > 30


def test_pairs_keep_inputs_and_targets_together(corpus, tmp_path):
    data = settings(
        tmp_path / "store",
        "pairs",
        vocabulary="bytes",
        task_feature_lengths={"inputs": 16, "targets": 32},
        objective="seq2seq",
    )
    prepare(data)
    part = open_store(data.store_dir, data).split("pairs", "train")
    assert part.features == ("inputs", "targets")
    records = [
        json.loads(line)
        for path in sorted(corpus.glob("train-*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert part.num_documents == len(records)
    for number in (0, 1, 299, 300, 899):
        assert part.document("inputs", number) == records[number]["question"]
        assert part.document("targets", number) == records[number]["text"]


def test_another_plan_does_not_take_up_what_was_begun(corpus, tmp_path):
    data = settings(tmp_path / "store", "lines", vocabulary="bytes")

    def stop(progress):
        if progress.phase == "store":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, report=stop)
    other = dataclasses.replace(data, extra_ids=9)
    with pytest.raises(StoreError, match=r"extra_ids was 0 and is 9\. Add --force"):
        prepare(other)
    file = corpus / "train-1.txt"
    before = file.stat()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(StoreError, match=r"train-1.txt has changed"):
        prepare(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = prepare(data)
    assert manifest.extra_ids == 0
    assert prepare(other, force=True).extra_ids == 9


def test_parts_of_any_size_are_taken_up_in_their_middle(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 512)
    monkeypatch.setattr(arrays, "SHARD", 2048)
    wanted = {
        split: [
            json.loads(line)
            for path in sorted(corpus.glob(f"{split}*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        for split in ("train", "validation")
    }
    close, fingerprints = parts.PartWriter.close, set()

    def close_and_stop(self, consumed, *, last):
        close(self, consumed, last=last)
        closed.append(self)
        if len(closed) % 7 == 0:
            raise KeyboardInterrupt

    for part_bytes in (4_000, 1 << 20):
        closed: list[parts.PartWriter] = []
        data = settings(
            tmp_path / f"store{part_bytes}",
            "pairs",
            vocabulary="bytes",
            task_feature_lengths={"inputs": 16, "targets": 32},
            objective="seq2seq",
        )
        monkeypatch.setattr(parts.PartWriter, "close", close_and_stop)
        for _ in range(30):
            with contextlib.suppress(KeyboardInterrupt):
                manifest = prepare(data, part_bytes=part_bytes)
                break
        assert len(closed) > 14 if part_bytes < 10_000 else len(closed) == 5
        fingerprints.add(manifest.fingerprint)
        store = open_store(data.store_dir, data)
        digests_of = collections.defaultdict(list)
        for split, feature in itertools.product(wanted, ("inputs", "targets")):
            field = {"inputs": "question", "targets": "text"}[feature]
            ids = [[b + 3 for b in doc[field].encode()] + [1] for doc in wanted[split]]
            ends = np.cumsum([0, *map(len, ids)])
            part = store.split("pairs", split)
            np.testing.assert_array_equal(part.offsets(feature), ends)
            (tokens,) = part.read(feature, [0], [ends[-1]])
            np.testing.assert_array_equal(tokens, np.concatenate(ids))
            digests_of[split, "tokens"] += [
                hashlib.sha256(tokens[start : start + 2048].astype("<u4")).hexdigest()
                for start in range(0, len(tokens), 2048)
            ]
            digests_of[split, "offsets"] += [hashlib.sha256(ends).hexdigest()]
        for split in wanted:
            content = "".join(digests_of[split, "tokens"]).encode()
            content += bytes.fromhex("".join(digests_of[split, "offsets"]))
            digest = hashlib.sha256(content).hexdigest()[:32]
            assert manifest.split("pairs", split).fingerprint == digest
    assert len(fingerprints) == 1


def test_what_a_full_disk_left_is_not_in_the_way(corpus, tmp_path, monkeypatch):
    data = settings(tmp_path / "store", "lines", vocabulary="bytes")
    write = files.write

    def full(path, content):
        if "vocabulary.json" in str(path) and ".preparing" not in str(path):
            write(path, content)
            raise StoreError("no space left")
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(StoreError, match="no space left"):
        prepare(data)
    monkeypatch.setattr(files, "write", write)
    assert list(tmp_path.iterdir()) == []
    prepare(data)


def test_a_store_that_was_half_deleted_is_made_again(corpus, tmp_path, monkeypatch):
    data = settings(tmp_path / "store", "lines", vocabulary="bytes")
    first = prepare(data)
    delete = files.delete_folder

    def half(folder):
        if str(folder) == data.store_dir:
            raise KeyboardInterrupt
        delete(folder)

    monkeypatch.setattr(files, "delete_folder", half)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, force=True)
    monkeypatch.setattr(files, "delete_folder", delete)
    with pytest.raises(StoreError, match="the same command goes on with it"):
        open_store(data.store_dir)
    assert prepare(data) == first


def test_a_store_may_be_a_link_and_its_path_go_up(corpus, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path / "here")
    data = settings("../link", "lines", vocabulary="bytes")
    assert prepare(data) == prepare(data, force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "manifest.json").exists()


class Answers:
    """A worker that was killed after it had said so much."""

    stdin = io.StringIO()

    def __init__(self, said):
        self.stdout = io.StringIO(said)

    def wait(self):
        return -9


@pytest.mark.parametrize("said", ["", '{"documents": 3}\n', '{"docum'])
def test_a_worker_that_is_killed_is_said_and_not_waited_for(said):
    orders, reports = queue.SimpleQueue(), queue.SimpleQueue()
    orders.put({"task": "lines", "shard": 3})
    engines._drive(Answers(said), orders, reports)
    while not isinstance(last := reports.get(timeout=1), BaseException):
        pass
    assert isinstance(last, StoreError)
    assert '"shard": 3} ended with code -9: run the same command' in str(last)


def test_a_worker_ends_with_who_started_it(tmp_path):
    command = [sys.executable, "-m", "tasks.preparation.worker", str(tmp_path), "sign"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def test_more_languages_than_fit_are_refused():
    parts.refuse_too_many([""] * parts.MOST_LANGUAGES)
    with pytest.raises(StoreError, match="more than 65,536 languages, such as 'a'"):
        parts.refuse_too_many(["a"] * (parts.MOST_LANGUAGES + 1))


def test_what_differs_from_what_was_begun_is_listed(tmp_path):
    data = settings(tmp_path / "store")
    before = Plan(
        data=data,
        filters=FilterSettings(),
        allowed_modules=(),
        shards={"a": {"train": ("x", "y")}, "b": {"train": ("z",)}},
        rates={},
        features={"a": ("targets",), "b": ("targets",)},
        state={"x": (1, 2)},
    )
    assert plan.differences(before, before) == []
    for changes, words in (
        ({"shards": {"a": {"train": ("x",)}, "b": {"train": ("z",)}}}, "other shards"),
        ({"shards": {"a": {"train": ("x", "y")}}}, "task 'b' was in it"),
        ({"features": {**before.features, "a": ("inputs", "targets")}}, "has other f"),
        ({"state": {"x": (1, 3)}}, "x has changed"),
        ({"data": dataclasses.replace(data, bad_utf8="drop")}, "bad_utf8 was"),
    ):
        (told,) = plan.differences(before, dataclasses.replace(before, **changes))
        assert words in told
    free = dataclasses.replace(data, objective="prefix_lm", read_retries=9)
    now = dataclasses.replace(before, data=free, rates={"a": 3.0}, part_bytes=1)
    assert plan.differences(before, now) == []
