import json
import math
import struct

import numpy as np
import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog

from launch.records.read import read_metrics
from launch.records.write import MetricWriter

pytestmark = pytest.mark.fast


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
    assert read["router/load"] == [[0.25] * 4] * 2


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


def test_damage_inside_the_file_is_an_error_and_not_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(_train(1))}\n{{oops\n{json.dumps(_train(2))}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_a_step_scored_twice_counts_once_and_the_later_stands(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(_train(10, life=1))
        writer.write({"step": 10, "split": "heldout"})
        writer.write(_train(10, life=2))
    records = read_metrics(tmp_path)
    assert len(records) == 2
    assert [r["life"] for r in records if r["split"] == "train"] == [2]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_record_without_step_or_split_is_refused(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="split"):
        writer.write({"step": 1})


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
        (5, "router/load/layer_00/expert_00"): 0.25,
        (5, "router/load/layer_00/expert_01"): 0.75,
        (5, "router/load/layer_01/expert_00"): 0.5,
        (5, "router/load/layer_01/expert_01"): 0.5,
        (5, "router/entropy_nats_per_layer/layer_00"): 0.5,
        (5, "router/entropy_nats_per_layer/layer_01"): 0.625,
    }
    assert _scalars(board / "heldout") == {(5, "loss/bits_per_byte"): 2.0}


def test_tensorboard_gets_only_the_extremes_of_very_many_experts(tmp_path):
    row = [0.0] * 2000
    row[7] = 1.0
    with MetricWriter(tmp_path) as writer:
        writer.write({"step": 1, "split": "train", "router/load": [row]})
    assert _scalars(tmp_path / "tensorboard" / "train") == {
        (1, "router/load/layer_00/most"): 1.0,
        (1, "router/load/layer_00/least"): 0.0,
    }


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
