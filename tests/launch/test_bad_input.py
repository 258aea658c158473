"""What a user gets wrong is one readable error, exit code 1, and nothing half done."""

import dataclasses
import errno
import os
import re
import resource
import shutil
from pathlib import Path

import commands
import pytest
from commands import TINY, Done, inline

from launch.config import reader
from launch.evaluation.prompts import SampleError, encode_prompt
from launch.run.assemble import Run
from launch.training.folder import ModelDirError, owned
from tasks import vocabularies
from tasks.manifest import read_manifest, write_manifest


def error_of(done: Done) -> str:
    """The error of a command that failed as it should."""
    assert done.code == 1, done
    assert done.out == ""
    assert "Traceback" not in done.err
    lines = done.err.splitlines()
    (first,) = [i for i, line in enumerate(lines) if re.match(r"\w+Error: ", line)]
    return "\n".join(lines[first:])


def assert_nothing_begun(*folders: Path) -> None:
    """No checkpoint, and no folder that was meant to become one or a store."""
    for folder in folders:
        found = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        assert not [name for name in found if "incomplete" in name or "tmp" in name]
        assert not [name for name in found if name.startswith("checkpoints/")]


def flip(path: Path) -> None:
    """Turns over the bits of one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


# -------------------------------------------------------- before anything is imported


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tain", TINY], "UsageError: 'tain' is not a verb; nearest: train; the verbs"),
        (["train", TINY, "--gin.NUM_EXPRTS=8"], "NUM_EXPRTS is not a knob; nearest: "),
        (
            ["train", TINY, "--gin.model.num_experts=8"],
            "a gin file sets macros only; set the macro NUM_EXPERTS instead",
        ),
        (
            ["train", TINY, "--gin.VOCAB_SIZE=128"],
            "VOCAB_SIZE = 128 has no row for every one of the 259 ids of VOCABULARY",
        ),
        (
            ["train", TINY, "--gin.MESH_EXPERT=3", "--gin.SIMULATED_DEVICES=3"],
            "NUM_EXPERTS = 4 does not divide over the expert axis of size 3: use ",
        ),
        (
            ["train", TINY, "--gin.GROUP_SIZE=48"],
            "GROUP_SIZE = 48 does not divide a sequence of 64 tokens: nearest are 32 ",
        ),
        (
            ["train", TINY, "--gin.MESH_DATA=4"],
            "SIMULATED_DEVICES = 1 are fewer than the 4 of the mesh (MESH_DATA 4): set",
        ),
        (
            ["prepare", TINY, "--gin.VOCABULARY_PIECES='9'"],
            "must be an integer, without",
        ),
        (
            ["evaluate", "--model_dir=there"],
            "UsageError: there/config.gin is not there",
        ),
        (["generate", "--model_dir=."], "UsageError: config.gin is not there"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(
    words, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(inline(*words))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_all_problems_are_in_one_error(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    knobs = ["NUM_EXPRTS=8", "GROUP_SIZE=48", "BATCH_SIZE=0", "DTYPE=float16"]
    error = error_of(inline(verb, TINY, *(f"--gin.{knob}" for knob in knobs)))
    first, *problems = error.splitlines()
    assert first == "ConfigError: 4 problems in runs/tiny.gin"
    assert all(line.startswith("  ") for line in problems)
    for knob in knobs:
        macro = knob.partition("=")[0]
        assert len([line for line in problems if macro in line.split(" = ")[0]]) == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------- the store


def test_a_store_that_is_missing_is_said(trained, tmp_path):
    words = [f"--model_dir={trained.folder}", f"--gin.STORE_DIR={tmp_path}/nowhere"]
    error = error_of(inline("evaluate", *words))
    assert f"StoreError: there is no token store at {tmp_path}/nowhere" in error
    assert "switchyard prepare" in error
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_damaged_is_said(trained, tmp_path):
    store = shutil.copytree(trained.store, tmp_path / "store")
    folder = store / "python_topics_small" / "train" / "targets" / "tokens"
    flip(folder / "c" / "0")
    knobs = trained.knobs(tmp_path / "run", STORE_DIR=store, READ_RETRIES=1)
    error = error_of(trained.run("train", *knobs))
    assert "tried 2 times" in error
    assert f"StoreError: array {folder} is damaged" in error
    assert "Copy the store again from where it is whole, or delete it" in error
    assert_nothing_begun(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--num_workers=-1"], "--num_workers=-1: cannot be negative"),
        (["--runner=DirectRunner", "--num_workers=2"], "leave --num_workers out"),
        (["--runner_option=--x=1"], "--runner_option is for --runner"),
        (["--train_vocabulary=mine.txt"], "a SentencePiece model ends in .model"),
    ],
)
def test_options_of_prepare_that_mean_nothing_are_refused(
    trained, tmp_path, words, problem
):
    knobs = trained.knobs(tmp_path / "run", STORE_DIR=tmp_path / "store")
    assert problem in error_of(inline("prepare", *words, *knobs))


def test_a_vocabulary_that_is_there_is_not_overwritten(trained, tmp_path):
    path = tmp_path / "mine.model"
    path.write_bytes(b"years of work")
    knobs = trained.knobs(tmp_path / "run", STORE_DIR=tmp_path / "store")
    error = error_of(inline("prepare", f"--train_vocabulary={path}", *knobs))
    assert "is there already" in error
    assert path.read_bytes() == b"years of work"


def test_a_complete_run_is_not_that_of_another_objective(trained):
    knobs = trained.knobs(trained.folder, OBJECTIVE="prefix_lm")
    error = error_of(inline("train", *knobs))
    assert "does not fit this run, in 1 place:" in error
    assert "OBJECTIVE  'causal_lm'  'prefix_lm'" in error


def test_a_store_that_is_another_one_is_said(trained, tmp_path):
    knobs = {"VOCABULARY": "sentencepiece", "VOCAB_SIZE": 2048}
    error = error_of(inline("train", *trained.knobs(tmp_path / "run", **knobs)))
    assert (
        "VOCABULARY = 'sentencepiece', but the store was prepared with 'bytes'" in error
    )
    assert "Set STORE_DIR to a folder of its own" in error
    assert_nothing_begun(tmp_path / "run")


@pytest.fixture
def wider_store(trained, tmp_path) -> Path:
    """The same tokens, of a vocabulary with a hundred more ids."""
    store = shutil.copytree(trained.store, tmp_path / "wider")
    vocabulary = vocabularies.ByteVocabulary(extra_ids=100)
    for name, content in vocabularies.to_files(vocabulary).items():
        (store / name).write_bytes(content)
    manifest = dataclasses.replace(
        read_manifest(store),
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        vocabulary="task",
    )
    write_manifest(manifest, str(store))
    return store


def test_an_embedding_smaller_than_the_vocabulary_is_said(
    trained, wider_store, tmp_path
):
    knobs = {"STORE_DIR": wider_store, "VOCABULARY": "task", "VOCAB_SIZE": 300}
    error = error_of(inline("train", *trained.knobs(tmp_path / "run", **knobs)))
    assert "VOCAB_SIZE = 300 is smaller than the 359 ids of the vocabulary" in error
    assert "set VOCAB_SIZE to 384" in error
    assert_nothing_begun(tmp_path / "run")


def test_a_checkpoint_of_another_vocabulary_is_said(trained, wider_store):
    words = [f"--model_dir={trained.folder}", f"--gin.STORE_DIR={wider_store}"]
    words.append("--gin.VOCABULARY=task")
    error = error_of(inline("evaluate", *words))
    assert "checkpoints/20 does not fit this run, in 1 place:" in error
    assert "\n  vocabulary_fingerprint " in error


# ----------------------------------------------------------------------- the run


def test_a_mesh_larger_than_the_machine_is_said(trained, tmp_path):
    knobs = {"PLATFORM": "auto", "SIMULATED_DEVICES": 0}
    knobs |= {"MESH_DATA": 16, "BATCH_SIZE": 16}
    error = error_of(inline("train", *trained.knobs(tmp_path / "run", **knobs)))
    assert "the mesh data 16 needs 16 devices and 8 are here" in error
    assert "SIMULATED_DEVICES = 16" in error
    assert not (tmp_path / "run").exists()


def test_a_sample_beyond_the_learned_positions_is_said_before_anything_is_compiled(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(Run, "lower_train_step", None)
    knobs = {"POSITIONS": "learned", "MAX_POSITIONS": 64, "SAMPLE_PROMPT": "def "}
    knobs["SAMPLE_TOKENS"] = 128
    error = error_of(inline("train", *trained.knobs(tmp_path / "run", **knobs)))
    # The four bytes of the prompt, and the tokens.
    assert (
        "SampleError: MAX_POSITIONS = 64: a prompt of 4 tokens and SAMPLE_TOKENS = "
        in (error)
    )
    assert "SAMPLE_TOKENS = 128 need 132 positions" in error
    assert "lower SAMPLE_TOKENS (--num_tokens) to 60" in error
    assert_nothing_begun(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"prompt": "x" * 70}, "shorten the prompt to fewer than 64 tokens"),
        (
            {"prompt": "x" * 63, "num_tokens": 2},
            "lower SAMPLE_TOKENS (--num_tokens) to 1",
        ),
        ({"prompt": "x" * 63, "num_tokens": 1}, None),
    ],
)
def test_a_prompt_and_what_follows_need_a_position_each(changes, remedy):
    learned = ["POSITIONS=learned", "MAX_POSITIONS=64", "MODEL_DIR=unused"]
    settings = reader.read(["runs/tiny.gin"], learned).settings
    sample = dataclasses.replace(settings.sample, **changes)
    settings = dataclasses.replace(settings, sample=sample)
    vocabulary = vocabularies.ByteVocabulary()
    if remedy is None:
        assert len(encode_prompt(settings, vocabulary)) == 63
    else:
        with pytest.raises(SampleError, match=re.escape(remedy)):
            encode_prompt(settings, vocabulary)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_written_is_said(trained, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    error = error_of(inline("train", *trained.knobs(tmp_path / name)))
    assert f"ModelDirError: cannot write to MODEL_DIR = '{tmp_path}/{name}': " in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_is_said_before_anything_begins(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        words = r"cannot write to MODEL_DIR = .*: File too large$"
        with pytest.raises(ModelDirError, match=words), owned(tmp_path):
            raise AssertionError("the lock says nothing")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_the_lock_of_another_run_is_left_as_it_is(tmp_path):
    with owned(tmp_path):
        before = (tmp_path / "run.lock").read_text()
        assert before.split()[0] == str(os.getpid())
        words = rf"another run is writing to .* \(process {os.getpid()} on .*, since 2"
        with pytest.raises(ModelDirError, match=words), owned(tmp_path):
            raise AssertionError("two runs in one folder")
        assert (tmp_path / "run.lock").read_text() == before
    (tmp_path / "run.lock").write_text("a longer line, of a run that was killed\n")
    with owned(tmp_path):
        assert (tmp_path / "run.lock").read_text().split()[0] == str(os.getpid())


def test_a_second_run_is_kept_out_where_there_are_no_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    words = (
        rf"another run is writing to .* \(process {os.getpid()} on .*\): take another"
    )
    with owned(tmp_path) as still_ours:
        with pytest.raises(ModelDirError, match=words), owned(tmp_path):
            raise AssertionError("two runs in one folder")
        ended = []
        monkeypatch.setattr("launch.job.end.leave", ended.append)
        still_ours()
        assert ended == []
        (tmp_path / "run.owner").unlink()
        still_ours()
        assert ended == [1], "whoever took the folder has it now"
    with owned(tmp_path):
        pass


def test_a_run_without_a_checkpoint_is_said(trained, tmp_path):
    shutil.copy(trained.folder / "config.gin", tmp_path)
    error = error_of(inline("evaluate", f"--model_dir={tmp_path}"))
    assert f"CheckpointError: {tmp_path}/checkpoints holds no checkpoint yet" in error
    assert [path.name for path in tmp_path.iterdir()] == ["config.gin"]


# ------------------------------------------------------------------- its checkpoints


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A copy of the run, which a test may damage."""
    return shutil.copytree(trained.folder, tmp_path / "run")


def test_a_checkpoint_of_another_model_is_one_table(trained, folder):
    before = (folder / "config.gin").read_text()
    knobs = {"NUM_EXPERTS": 8, "EMBED_DIM": 48, "TRAIN_STEPS": 30}
    error = error_of(inline("train", *trained.knobs(folder, **knobs)))
    first, header, *rows, remedy = error.splitlines()
    assert first.startswith(f"CheckpointError: {folder}/checkpoints/20 does not fit")
    assert header.split() == ["saved", "wanted"]
    (router,) = [row for row in rows if row.startswith("  params/") and "router" in row]
    assert router.endswith("float32[1, 32, 4]      float32[1, 48, 8]")
    arrays = [row for row in rows if row.startswith(("  params/", "  opt_state/"))]
    assert len({row.index("float32") for row in arrays}) == 1
    knobs = [row.split() for row in rows if row not in arrays]
    assert knobs == [["EMBED_DIM", "32", "48"], ["NUM_EXPERTS", "4", "8"]]
    assert f"{folder}/config.gin" in remedy
    # It still says what the checkpoint was made with.
    assert (folder / "config.gin").read_text() == before


def test_another_order_of_the_data_is_said(trained, folder):
    knobs = {"SEED": 1, "BATCH_SIZE": 16, "TRAIN_STEPS": 30}
    error = error_of(inline("train", *trained.knobs(folder, **knobs)))
    first, _, *rows, remedy = error.splitlines()
    assert first.endswith("checkpoints/20 does not fit this run, in 2 places:")
    assert [row.split() for row in rows] == [
        ["BATCH_SIZE", "8", "16"],
        ["SEED", "0", "1"],
    ]
    assert f"{folder}/config.gin" in remedy


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_checkpoint_that_is_damaged_is_said(trained, folder, damage):
    state = folder / "checkpoints" / "20" / "state"
    files = [path for path in state.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "flip":
        flip(largest)
    elif damage == "truncate":
        largest.write_bytes(largest.read_bytes()[:1000])
    else:
        largest.unlink()
    # With an older one it is gone round: test_damage.py.
    shutil.rmtree(folder / "checkpoints" / "10")
    error = error_of(inline("train", *trained.knobs(folder, TRAIN_STEPS=30)))
    assert f"DamagedError: {folder}/checkpoints/20 is damaged: " in error
    assert error.endswith("no older one: take another MODEL_DIR to start afresh")
    assert len(error) < 800
    assert os.listdir(folder / "checkpoints") == ["20"]


def test_an_empty_folder_among_the_checkpoints_is_said(trained, folder):
    empty = folder / "checkpoints" / "999"
    empty.mkdir()
    words = f"{empty} is damaged: its manifest/metadata is missing"
    error = error_of(inline("evaluate", f"--model_dir={folder}"))
    assert error.endswith(f"{words}. The one before is of step 20")
    done = inline("train", *trained.knobs(folder))
    assert done.code == 0
    assert f"{words}; it is kept as 999.damaged, and the run goes on fr" in done.err
    assert "is complete: step 20 of 20" in done.out


def test_a_step_that_is_not_there_is_said_with_those_that_are(trained):
    error = error_of(inline("evaluate", f"--model_dir={trained.folder}", "--step=7"))
    assert error.endswith("has no checkpoint of step 7; there are: 10, 20")


# ---------------------------------------------------------------------- the documents

TASKS = """
from tasks.factories import add_documents

FINE = [("fine", b"one"), ("too", b"two")]
add_documents("latin", {
    "train": lambda: [*FINE, ("cafe", b"caf\\xe9")], "validation": lambda: FINE
})
add_documents("void", {
    "train": lambda: [("nothing", b"")], "validation": lambda: FINE
})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "task", "message"),
    [
        ("train", "latin", "document 'cafe' in split 'train' of task 'latin' is not "),
        ("prepare", "void", "split 'train' of task 'void' holds no text (1 empty)"),
    ],
)
def test_documents_that_cannot_be_learnt_are_said(
    trained, tmp_path, verb, task, message
):
    (tmp_path / "user_tasks.py").write_text(TASKS)
    run, stores = tmp_path / "run", tmp_path / "stores"
    knobs = {"MIXTURE_OR_TASK_NAME": task, "MIXTURE_OR_TASK_MODULE": "user_tasks"}
    words = trained.knobs(run, STORE_DIR=stores / "store", **knobs)
    path = f"{commands.ROOT}:{tmp_path}"
    refused = error_of(trained.run(verb, *words, PYTHONPATH=path))
    assert "importing it runs its code" in refused
    assert refused.endswith("add --allow_module to the command")
    error = error_of(trained.run(verb, *words, "--allow_module", PYTHONPATH=path))
    assert message in error
    assert_nothing_begun(run, stores)
    assert not stores.exists() or list(stores.iterdir()) == []
