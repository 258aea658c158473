"""What a record of several steps says, and when there is one."""

import math

import numpy as np
import pytest

from launch.records import loads
from launch.records.read import read_metrics
from launch.records.write import MetricWriter
from launch.run import chip_peaks
from launch.training import log as training_log
from launch.training.log import Log
from launch.training.steps import Launched

LAYERS, EXPERTS, TOKENS = 3, 4, 64


class Progress:
    """Takes what would be shown."""

    def __init__(self):
        self.shown = []

    def update(self, record):
        self.shown.append(record)


class Clock:
    """Counts two seconds from one look to the next."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 2.0
        return self.now


def metrics_of(rng, *, skipped=0, in_a_row=0):
    """What a train step of three layers would return, of counts that fit together."""
    tokens_P = rng.integers(40, TOKENS + 1, LAYERS)
    chosen_PE = np.stack([rng.multinomial(n, [0.7, 0.2, 0.1, 0.0]) for n in tokens_P])
    dropped_P = rng.integers(0, 9, LAYERS)
    learnt = int(tokens_P.min())
    lost = math.nan if in_a_row else 1.0
    scalars = {
        "loss/nats_per_token": lost * rng.uniform(1, 5),
        "loss/output_z": lost * rng.uniform(),
        "loss/balance": lost * rng.uniform(1, 2),
        "loss/total": lost * rng.uniform(1, 5),
        "accuracy/fraction": rng.uniform(),
        "loss/target_tokens": np.float32(learnt),
        "router/logit_rms": lost * rng.uniform(),
        "router/max_violation": rng.uniform(0, 3),
        "router/dead_experts": 3,
        "router/over_budget_rows": rng.integers(0, 3),
        "router/dropped_fraction": dropped_P.sum() / tokens_P.sum(),
        "router/spilled_fraction": 0.0,
        "router/tokens_without_expert_fraction": dropped_P.sum() / tokens_P.sum(),
        "router/entropy_nats": math.nan,  # follows from the layers
        "optimizer/gradient_norm": lost * rng.uniform(),
        "optimizer/parameter_norm": rng.uniform(),
        "optimizer/learning_rate": rng.uniform(),
        "state/taken": 1,
        "state/skipped_steps": skipped,
        "state/skipped_in_a_row": in_a_row,
    }
    return {name: np.asarray(value) for name, value in scalars.items()} | {
        "router/load": (chosen_PE / tokens_P[:, None]).astype(np.float32),
        "router/dropped_fraction_per_layer": dropped_P / tokens_P,
        "router/entropy_nats_per_layer": rng.uniform(0, 1, LAYERS),
        "ledger/routed_choices": tokens_P + 5,
        "ledger/computed_choices": tokens_P - dropped_P,
        "ledger/spilled_choices": dropped_P // 2,
        "ledger/dropped_choices": dropped_P,
        "ledger/padding_choices": np.full(LAYERS, 5),
        "ledger/tokens": tokens_P,
        "ledger/tokens_without_expert": dropped_P,
    }


def logged(folder, metrics, period, *, start=0, last=0, save_after=()):
    """Writes the records of steps, and returns what was shown."""
    progress = Progress()
    with MetricWriter(folder, load_period_steps=1) as writer:
        log = Log(
            *(writer, progress, lambda index: {"data/rows/a": index}),
            period_steps=period,
            last_step=last or start + len(metrics),
            tokens_of=lambda index: 100,
        )
        for step, each in enumerate(metrics, start + 1):
            log.add(Launched(step, step - 1, None, 0.5, each), again=step == 4)
            if step in save_after:
                writer.flush()
    return progress.shown


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(training_log, "time", clock)
    return clock


def train_records(folder):
    return [r for r in read_metrics(folder) if r["split"] == "train"]


def by_hand(records):
    """Merges records of one step each, with what they are means of."""
    good = [n for n, r in enumerate(records) if not r["state/skipped_in_a_row"]]
    kept = [records[n] for n in good]

    def mean(name, weights):
        pairs = zip(kept, weights, strict=True)
        return sum(r[name] * w for r, w in pairs) / sum(weights)

    targets = [r["loss/target_tokens"] for r in kept]
    ledger = {
        name: sum(r[name] for r in kept) for name in kept[0] if name[:7] == "ledger/"
    }
    chosen = ledger["ledger/dropped_choices"] + ledger["ledger/computed_choices"]
    found = ledger | {
        name: mean(name, targets)
        for name in (
            *("loss/nats_per_token", "loss/output_z", "loss/balance", "loss/total"),
            "accuracy/fraction",
        )
    }
    weights = [r["ledger/tokens"] for r in kept]
    square = sum(
        r["router/logit_rms"] ** 2 * w for r, w in zip(kept, weights, strict=True)
    )
    last = records[-1]
    return found | {
        "loss/target_tokens": sum(targets),
        "router/logit_rms": math.sqrt(square / sum(weights)),
        "router/max_violation": max(r["router/max_violation"] for r in kept),
        "router/over_budget_rows": sum(r["router/over_budget_rows"] for r in kept),
        "router/dropped_fraction": ledger["ledger/dropped_choices"] / chosen,
        "router/spilled_fraction": ledger["ledger/spilled_choices"] / chosen,
        "router/tokens_without_expert_fraction": (
            ledger["ledger/tokens_without_expert"] / ledger["ledger/tokens"]
        ),
        "optimizer/gradient_norm": mean("optimizer/gradient_norm", [1] * len(kept)),
        "optimizer/parameter_norm": last["optimizer/parameter_norm"],
        "optimizer/learning_rate": last["optimizer/learning_rate"],
        "state/taken": 1,
        "state/skipped_steps": last["state/skipped_steps"],
        "state/skipped_in_a_row": max(r["state/skipped_in_a_row"] for r in records),
        "state/steps": len(records),
        "state/steps_skipped": len(records) - len(kept),
        "perf/steps_since_start": last["perf/steps_since_start"],
        "perf/steps_taken_again": last["perf/steps_taken_again"],
        "perf/step_seconds": np.mean([r["perf/step_seconds"] for r in records]),
        "perf/tokens_per_second": 50.0,
        "perf/data_wait_seconds": 0.5,
        "data/rows/a": last["data/rows/a"],
    }


def steps(number, skipped=()):
    """Metrics of steps, some of which were skipped."""
    rng, found, count, in_a_row = np.random.default_rng(0), [], 0, 0
    for step in range(1, number + 1):
        in_a_row = in_a_row + 1 if step in skipped else 0
        count += step in skipped
        found.append(metrics_of(rng, skipped=count, in_a_row=in_a_row))
    return found


@pytest.mark.fast
@pytest.mark.parametrize("skipped", [(), (7,), (8, 9, 10)], ids=str)
def test_a_record_of_five_steps_is_theirs_merged_by_hand(tmp_path, skipped):
    metrics = steps(15, skipped)
    logged(tmp_path / "each", metrics, 1)
    logged(tmp_path / "five", metrics, 5)
    each, found = train_records(tmp_path / "each"), train_records(tmp_path / "five")
    assert [r["step"] for r in each] == [*range(1, 16)]
    assert [r["step"] for r in found] == [1, 5, 10, 15]
    saved = dict(loads.saved(tmp_path / "five", "train"))
    for record, (start, stop) in zip(
        found, [(0, 1), (1, 5), (5, 10), (10, 15)], strict=True
    ):
        wanted = by_hand(each[start:stop])
        for name, value in wanted.items():
            assert record[name] == pytest.approx(value, rel=1e-6), name
        # Of arrays, what is a mean of choices, and of tokens.
        kept = [
            m for m in metrics[start:stop] if not m["state/skipped_in_a_row"]
        ] or metrics[start:stop]
        chosen_PE = sum(m["router/load"] * m["ledger/tokens"][:, None] for m in kept)
        load_PE = chosen_PE / chosen_PE.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(np.load(saved[stop]), load_PE, rtol=1e-5)
        relative_PE = load_PE * EXPERTS
        assert record["router/load_most"] == pytest.approx(relative_PE.max())
        np.testing.assert_allclose(
            record["router/load_variation_per_layer"], relative_PE.std(axis=1), 1e-5
        )
        assert record["router/dead_experts"] == (chosen_PE == 0).sum() >= LAYERS
        tokens_P = sum(m["ledger/tokens"] for m in kept)
        entropy_P = sum(
            m["router/entropy_nats_per_layer"] * m["ledger/tokens"] for m in kept
        )
        np.testing.assert_allclose(
            record["router/entropy_nats_per_layer"], entropy_P / tokens_P
        )
        assert record["router/entropy_nats"] == pytest.approx(
            np.mean(entropy_P / tokens_P)
        )
        dropped_P = sum(m["ledger/dropped_choices"] for m in kept)
        np.testing.assert_allclose(
            record["router/dropped_fraction_per_layer"], dropped_P / tokens_P
        )
        assert not any(
            isinstance(value, float) and math.isnan(value) for value in record.values()
        )


@pytest.mark.fast
def test_where_every_step_was_skipped_the_record_says_what_they_had(tmp_path):
    metrics = steps(10, skipped=range(6, 11))
    logged(tmp_path, metrics, 5)
    _, second, third = train_records(tmp_path)
    assert math.isfinite(second["loss/nats_per_token"])
    assert math.isnan(third["loss/nats_per_token"])
    assert (third["state/steps"], third["state/steps_skipped"]) == (5, 5)
    assert third["state/skipped_in_a_row"] == 5


@pytest.mark.fast
def test_no_step_is_missing_from_the_records_where_a_run_is_saved_and_goes_on(tmp_path):
    metrics = steps(20)
    logged(tmp_path, metrics[:13], 5, last=20, save_after=[13])
    assert [r["step"] for r in train_records(tmp_path)] == [1, 5, 10, 13]
    logged(tmp_path, metrics[13:], 5, start=13)
    records = train_records(tmp_path)
    assert [r["step"] for r in records] == [1, 5, 10, 13, 15, 20]
    assert sum(r["state/steps"] for r in records) == 20
    routed = sum(int(m["ledger/routed_choices"].sum()) for m in metrics)
    assert sum(r["ledger/routed_choices"] for r in records) == routed


@pytest.mark.fast
def test_every_step_is_shown_and_the_first_of_a_start_is_not_in_the_mean(
    tmp_path, clock
):
    metrics = steps(4)
    progress = Progress()
    with MetricWriter(tmp_path) as writer:
        log = Log(
            *(writer, progress, lambda index: {}),
            period_steps=2,
            last_step=99,
            tokens_of=lambda index: 100,
        )
        for step, each in enumerate(metrics, 11):
            clock.now += 60.0 * (step == 11)  # the first of a start
            log.add(Launched(step, step, None, 0.5, each), again=False)
        assert log.skipped_in_a_row == 0
    assert [r["step"] for r in progress.shown] == [11, 12, 13, 14]
    shown = [r["loss/nats_per_token"] for r in progress.shown]
    assert shown == [float(m["loss/nats_per_token"]) for m in metrics]
    assert [r["perf/step_seconds"] for r in train_records(tmp_path)] == [2.0, 2.0]


@pytest.mark.slow
def test_a_run_with_sparser_records_merges_what_every_step_said(trained, tmp_path):
    given = trained.knobs(tmp_path / "run", LOG_PERIOD=5, LOAD_PERIOD=1)
    done = trained.run("train", *given, "--gin.SELF_CHECK=off")
    assert done.code == 0, done.err
    each, found = train_records(trained.folder), train_records(tmp_path / "run")
    assert [r["step"] for r in found] == [1, 5, 10, 15, 20]
    for record, (start, stop) in zip(
        found, [(0, 1), (1, 5), (5, 10), (10, 15), (15, 20)], strict=True
    ):
        wanted = by_hand_of(each[start:stop])
        for name, value in wanted.items():
            assert record[name] == pytest.approx(value, rel=1e-5), name


def by_hand_of(records):
    """What is merged by hand, without speed and rows of another Task."""
    found = by_hand([record | {"data/rows/a": 0} for record in records])
    return {n: v for n, v in found.items() if n[:5] not in ("perf/", "data/")}


# ------------------------------------------------------------------- what devices can


@pytest.mark.fast
@pytest.mark.parametrize(
    ("platform", "kind", "teraflops"),
    [
        ("tpu", "TPU v5 lite", 197),
        ("tpu", "TPU v5p", 459),
        ("tpu", "TPU7x", 2307 / 2),  # two devices per chip
        ("gpu", "NVIDIA H100 80GB HBM3", 989),
        ("gpu", "NVIDIA H200", 989),
        ("gpu", "NVIDIA A100-SXM4-40GB", 312),
        ("gpu", "Tesla V100-SXM2-16GB", 125),
        ("gpu", "NVIDIA H100 PCIe", None),  # slower, and not in the table
        ("gpu", "NVIDIA GeForce RTX 4090", None),
        ("cpu", "cpu", None),
        ("tpu", "TPU v99", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(platform, kind, teraflops):
    peak = chip_peaks.peak_flops(platform, kind)
    assert peak == (None if teraflops is None else teraflops * 1e12)
