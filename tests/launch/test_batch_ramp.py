"""A run whose batches grow: its programs, its place in the data, its next life."""

import json
import shutil

import commands
import pytest

from launch.records.read import read_metrics

KNOBS = {
    "BATCH_RAMP": "((0,2),(3,4),(6,8))",
    "BATCH_SIZE": 8,
    "TRAIN_STEPS": 8,
    "CHECKPOINT_PERIOD": 4,
    "EVAL_PERIOD": 8,
    "LAST_EVAL_BATCHES": 1,
    "WARMUP_STEPS": 2,
    "MOE_EVERY": 0,
    "SELF_CHECK": "off",
    "COMPILE_AHEAD": "train_step",
}


def events_of(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def arrays_of(folder, step):
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    return manifest["arrays"], manifest["data_index"]


@pytest.fixture(scope="module")
def ramp(trained, tmp_path_factory):
    """The whole run, and one that was lost after its checkpoint of step 4."""
    whole = tmp_path_factory.mktemp("ramp") / "whole"
    done = commands.inline("train", *trained.knobs(whole, **KNOBS))
    assert done.code == 0, done.err
    resumed = whole.parent / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    again = commands.inline("train", *trained.knobs(resumed, **KNOBS))
    assert again.code == 0, again.err
    return whole, resumed, again


def test_a_run_lost_in_the_ramp_goes_on_bit_for_bit(ramp):
    whole, resumed, again = ramp
    assert f"resuming from {resumed}/checkpoints/4" in again.err
    assert arrays_of(resumed, 8) == arrays_of(whole, 8)
    assert arrays_of(whole, 8)[1] == 8


def test_records_count_the_rows_that_were_read(ramp):
    whole, _, _ = ramp
    records = [r for r in read_metrics(whole) if r["split"] == "train"]
    rows = [r["data/rows/python_topics_small"] for r in records]
    assert rows == [2, 4, 6, 10, 14, 18, 26, 34]
    grown = [e for e in events_of(whole) if e["event"] == "grown"]
    assert [(e["step"], e["rows"]) for e in grown] == [(4, 4), (7, 8)]
    first, second = (
        e["seconds"]["compile"] for e in events_of(whole) if e["event"] == "saved"
    )
    assert second > first, "what is compiled on the way counts as compiling"
