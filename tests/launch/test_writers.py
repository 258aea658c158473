import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from launch.records import lines, loads
from launch.records.lines import last_step, newest
from launch.records.read import Records, read_metrics
from launch.records.write import MetricWriter

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[2]


def _train(step, **extra):
    return {"step": step, "split": "train", "loss/nats_per_token": step / 10, **extra}


def _events(folder):
    """Every event of a folder's files, read by the format's definition.

    A record is: length (8 bytes), its masked CRC, the data, its masked CRC.
    """

    def masked(data):
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            data = content[at + 12 : at + 12 + length]
            assert struct.unpack_from("<I", content, at + 8) == (
                masked(content[at : at + 8]),
            )
            assert struct.unpack_from("<I", content, at + 12 + length) == (
                masked(data),
            )
            found.append(Event.FromString(data))
            at += length + 16
    return found


def _scalars(folder):
    return {
        (event.step, value.tag): value.simple_value
        for event in _events(folder)
        for value in event.summary.value
    }


def test_records_come_back_as_they_were_written(tmp_path):
    records = [
        _train(1, **{"router/entropy_nats_per_layer": [0.1, 1 / 3]}),
        {"step": 1, "split": "heldout", "loss/bits_per_byte": 1.25, "tokens": 7},
        _train(2),
    ]
    with MetricWriter(tmp_path) as writer:
        for record in records:
            writer.write(record)
    assert read_metrics(tmp_path) == records


def test_a_record_is_readable_before_the_writer_closes(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(1))
        assert read_metrics(tmp_path) == [_train(1)]


def test_arrays_become_numbers_and_lists(tmp_path):
    with MetricWriter(tmp_path) as writer:
        record = {"loss/total": np.float32(0.5), "router/load": np.full((2, 4), 0.25)}
        writer.write(_train(np.int64(3), **record))
    (read,) = read_metrics(tmp_path)
    assert read["step"] == 3
    assert read["loss/total"] == 0.5
    assert read["router/load_variation_per_layer"] == [0.0, 0.0]


def test_non_finite_numbers_keep_the_file_valid_and_come_back(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(1, a=math.nan, b=-math.inf, c=[[1.0, math.inf]]))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    stored = json.loads(line, parse_constant=refuse)
    assert (stored["a"], stored["b"], stored["c"]) == ("nan", "-inf", [[1.0, "inf"]])
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["a"])
    assert read["b"] == -math.inf
    assert read["c"] == [[1.0, math.inf]]


def test_resuming_removes_the_records_of_later_steps(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30, 40):
            writer.write(_train(step, life=1))
    with MetricWriter(tmp_path, resume_step=20) as writer:
        assert [r["step"] for r in read_metrics(tmp_path)] == [10, 20]
        writer.write(_train(30, life=2))
    lives = [(record["step"], record["life"]) for record in read_metrics(tmp_path)]
    assert lives == [(10, 1), (20, 1), (30, 2)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("resume_step", [None, 10])
def test_a_line_torn_by_a_kill_is_left_out(tmp_path, resume_step):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(10))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "split": "tra')
    assert read_metrics(tmp_path) == [_train(10)]
    with MetricWriter(tmp_path, resume_step=resume_step) as writer:
        writer.write(_train(12))
    assert read_metrics(tmp_path) == [_train(10), _train(12)]


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 11, "split": "tra', b"\0" * 200_000, b"\xff\xfe\n\n", b"[" * 99_999],
    ids=["half a line", "zeros", "no text", "brackets"],
)
def test_whatever_is_at_the_end_is_cut_off_and_said(tmp_path, capsys, torn):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(10))
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(torn)
    assert read_metrics(tmp_path) == [_train(10)]
    with MetricWriter(tmp_path, resume_step=10) as writer:
        writer.write(_train(12))
    assert read_metrics(tmp_path) == [_train(10), _train(12)]
    (said,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"warning: {path}: \d lines? at the end could not be read and "
        "(was|were) cut off",
        said,
    )


def test_a_last_record_without_a_newline_is_whole(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(_train(10)))
    with MetricWriter(tmp_path, resume_step=10) as writer:
        writer.write(_train(12))
    assert read_metrics(tmp_path) == [_train(10), _train(12)]
    assert capsys.readouterr().err == ""


def test_damage_inside_the_file_is_left_out_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    bad = ["{oops", '{"step": 5}', "[]", '{"step": "5", "split": "train"}', "7", "\0"]
    good = [json.dumps(_train(step)) for step in (1, 2, 3)]
    path.write_text("\n".join([good[0], *bad, good[1], good[2]]) + "\n")
    assert read_metrics(tmp_path) == [_train(1), _train(2), _train(3)]
    (note,) = Records(tmp_path).notes
    assert note == (
        f"{path}: 6 lines cannot be read and were left out: line 2, 3, 4, 5, 6, ..."
    )
    # Resuming reads from the end, as far as the step that is resumed.
    MetricWriter(tmp_path, resume_step=2).close()
    assert path.read_text().splitlines() == [good[0], *bad, good[1]]
    MetricWriter(tmp_path, resume_step=1).close()
    assert path.read_text().splitlines() == [good[0]]


def test_resuming_reads_only_what_it_cuts_off(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(_train(s)) + "\n" for s in range(1, 20_001)))
    read = []

    def parsed(line, original=lines.parse):
        read.append(line)
        return original(line)

    monkeypatch.setattr(lines, "parse", parsed)
    MetricWriter(tmp_path, resume_step=19_990).close()
    assert len(read) == 11
    assert path.read_bytes().endswith(read[-1])
    assert [r["step"] for r in read_metrics(tmp_path)] == [*range(1, 19_991)]
    MetricWriter(tmp_path, resume_step=0).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("length", [1, 7, 1 << 16, (1 << 16) + 1, 300_000])
def test_lines_are_found_from_the_end_whatever_their_length(tmp_path, length):
    wanted = [b"a" * length + b"\n", b"\n", b"b" * length + b"\n", b"c" * 9]
    path = tmp_path / "file"
    path.write_bytes(b"".join(wanted))
    with open(path, "rb") as file:
        found = [*lines.backwards(file)]
    assert [line for _, line in reversed(found)] == wanted
    starts = [sum(map(len, wanted[:n])) for n in range(4)]
    assert [start for start, _ in reversed(found)] == starts


def test_scores_of_a_step_are_found_from_the_end(tmp_path):
    assert newest(tmp_path, "heldout", 10) is None
    with MetricWriter(tmp_path) as writer:
        writer.write({"step": 5, "split": "heldout"})
        writer.write(_train(10))
        writer.write({"step": 10, "split": "heldout", "tokens": 1})
        writer.write({"step": 10, "split": "heldout", "tokens": 2})
        writer.write(_train(11))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "spl')
    assert newest(tmp_path, "heldout", 10)["tokens"] == 2
    assert newest(tmp_path, "heldout", 11) is None
    assert newest(tmp_path, "heldout", 5) == {"step": 5, "split": "heldout"}
    assert (last_step(tmp_path), last_step(tmp_path / "new")) == (11, None)


def test_a_step_scored_twice_counts_once_and_the_later_stands(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(10, life=1))
        writer.write({"step": 10, "split": "heldout"})
        writer.write(_train(10, life=2))
    records = read_metrics(tmp_path)
    assert len(records) == 2
    assert Records(tmp_path).notes == (
        f"{tmp_path / 'metrics.jsonl'}: 1 record stands twice, the first of step 10; "
        "the later of each counts",
    )
    assert [r["life"] for r in records if r["split"] == "train"] == [2]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_record_without_step_or_split_is_refused(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="split"):
        writer.write({"step": 1})


def test_a_line_has_a_summary_of_the_loads_and_a_file_has_all(tmp_path):
    # Means 1/4 and, of the two experts that layer 1 has, 1/2.
    load = [[0.5, 0.25, 0.25, 0.0], [0.2, 0.8, math.nan, math.nan]]
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(7, **{"router/load": load}))
        writer.write({"step": 7, "split": "heldout", "router/load": load})
    for record in read_metrics(tmp_path):
        del record["split"], record["step"]
        variation = record.pop("router/load_variation_per_layer")
        # Deviations 1, 0, 0, 1 and 0.6, 0.6.
        np.testing.assert_allclose(variation, [0.5**0.5, 0.6])
        record.pop("loss/nats_per_token", None)
        assert record == {
            "router/load_most": 2.0,
            "router/load_most_layer": 0,
            "router/load_most_expert": 0,
            "router/load_least": 0.0,
            "router/load_least_layer": 0,
            "router/load_least_expert": 3,
        }
    for split in ("train", "heldout"):
        ((step, path),) = loads.saved(tmp_path, split)
        assert step == 7
        np.testing.assert_array_equal(np.load(path), np.array(load, np.float32))


def test_whole_loads_come_with_the_first_record_at_or_after_each_period(tmp_path):
    def steps_of(folder):
        return [step for step, _ in loads.saved(folder, "train")]

    load = {"router/load": [[0.5, 0.5]]}
    every = [3, 6, 9, 12]
    for period, wanted in ((0, []), (4, every), (6, [3, 6, 12]), (1, every)):
        folder = tmp_path / str(period)
        with MetricWriter(folder, load_period_steps=period) as writer:
            for step in every:
                writer.write(_train(step, **load))
        assert steps_of(folder) == wanted
    with MetricWriter(tmp_path / "6", resume_step=6, load_period_steps=6) as writer:
        assert steps_of(tmp_path / "6") == [3, 6]
        for step in (9, 12):
            writer.write(_train(step, **load))
    assert steps_of(tmp_path / "6") == [3, 6, 12]


KILLED = """
import os, sys
import numpy as np
from launch.records import loads

def killed(*given, original=os.replace):
    print("here", flush=True)
    os.kill(os.getpid(), 9)

if sys.argv[2] == "before":
    os.replace = killed
else:
    np.save = lambda file, *_, **__: (file.write(b"half"), file.flush(), killed())
loads.save(__import__("pathlib").Path(sys.argv[1]), "train", 3, np.ones((2, 4)))
"""


@pytest.mark.parametrize("when", ["before", "half"])
def test_a_matrix_that_a_kill_left_unfinished_is_none(tmp_path, when):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(2, **{"router/load": [[0.5, 0.5]]}))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), when], cwd=ROOT)
    assert done.returncode == -9
    folder = tmp_path / "loads" / "train"
    assert len(list(folder.iterdir())) == 2
    assert [step for step, _ in loads.saved(tmp_path, "train")] == [2]
    MetricWriter(tmp_path, resume_step=3).close()
    assert len(list(folder.iterdir())) == 1


def test_a_run_that_goes_back_rewinds_its_records_and_what_is_held_back(tmp_path):
    load = {"router/load": [[0.5, 0.5]]}
    with MetricWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(_train(step, life=1, **load))
        held = [_train(4, life=1, **load)]
        writer.before_flush = lambda: [writer.write(held.pop()) for _ in held[:]]
        writer.rewind(2)
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
        assert [step for step, _ in loads.saved(tmp_path, "train")] == [1, 2]
        writer.write(_train(3, life=2, **load))
        held.append(_train(4, life=2, **load))
    assert [r["life"] for r in read_metrics(tmp_path)] == [1, 1, 2, 2]
    assert [step for step, _ in loads.saved(tmp_path, "train")] == [1, 2, 3, 4]
    starts = [
        event.step
        for event in _events(tmp_path / "tensorboard" / "train")
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [1, 3]


def test_what_is_held_back_is_written_before_a_flush(tmp_path):
    with MetricWriter(tmp_path) as writer:
        held = [_train(1)]
        writer.before_flush = lambda: [writer.write(held.pop()) for _ in held[:]]
        assert read_metrics(tmp_path) == []
        writer.flush()
        assert read_metrics(tmp_path) == [_train(1)]
        held.append(_train(2))
    assert read_metrics(tmp_path) == [_train(1), _train(2)]


def test_what_follows_from_a_record_of_training_is_added(tmp_path):
    def derive(record):
        return {"twice": 2 * record["step"]}

    with MetricWriter(tmp_path, derive=derive) as writer:
        writer.write(_train(4))
        writer.write({"step": 4, "split": "heldout"})
    train, heldout = read_metrics(tmp_path)
    assert train["twice"] == 8
    assert "twice" not in heldout


def test_tensorboard_gets_every_number_under_its_own_name(tmp_path):
    record = {
        "router/load": [[0.25, 0.75], [0.5, 0.5]],
        "router/entropy_nats_per_layer": [0.5, 0.625],
    }
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(5, **record))
        writer.write({"step": 5, "split": "heldout", "loss/bits_per_byte": 2.0})
    board = tmp_path / "tensorboard"
    assert _scalars(board / "train") == {
        (5, "loss/nats_per_token"): 0.5,
        (5, "router/load_most"): 1.5,
        (5, "router/load_most_layer"): 0.0,
        (5, "router/load_most_expert"): 1.0,
        (5, "router/load_least"): 0.5,
        (5, "router/load_least_layer"): 0.0,
        (5, "router/load_least_expert"): 0.0,
        (5, "router/load_variation_per_layer/layer_00"): 0.5,
        (5, "router/load_variation_per_layer/layer_01"): 0.0,
        (5, "router/entropy_nats_per_layer/layer_00"): 0.5,
        (5, "router/entropy_nats_per_layer/layer_01"): 0.625,
    }
    assert _scalars(board / "heldout") == {(5, "loss/bits_per_byte"): 2.0}


def test_foreign_files_beside_those_of_tensorboard_are_said_and_left_alone(
    tmp_path, capsys
):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(1))
    board = tmp_path / "tensorboard"
    (board / ".DS_Store").touch()
    (board / "notes").mkdir()
    (board / "train" / ".DS_Store").touch()
    (board / "heldout").touch()
    with MetricWriter(tmp_path, resume_step=1) as writer:
        writer.write(_train(2))
        writer.write({"step": 2, "split": "heldout"})
    assert len(read_metrics(tmp_path)) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"warning: {board} holds what is not of this run: .DS_Store, heldout, notes"
    )
    assert second.startswith("warning: TensorBoard gets nothing of the split 'heldout'")
    assert [*(board / "notes").iterdir()] == []


def test_flush_puts_the_events_on_disk(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(1))
        writer.flush()
        assert (1, "loss/nats_per_token") in _scalars(
            tmp_path / "tensorboard" / "train"
        )


def test_tensorboard_is_told_to_purge_what_comes_after_the_resumed_step(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(30))
        writer.write({"step": 30, "split": "heldout", "tokens": 1})
    MetricWriter(tmp_path, resume_step=20).close()
    for split in ("train", "heldout"):
        folder = tmp_path / "tensorboard" / split
        assert len(list(folder.iterdir())) == 2  # the first life's file is still there
        starts = [
            event.step
            for event in _events(folder)
            if event.session_log.status == SessionLog.START
        ]
        assert starts == [21]
