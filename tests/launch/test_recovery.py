"""A run that learns nothing any more goes back, passes over the data, or gives up."""

import itertools
import json
import math
import types
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch.checkpoints import replicas
from launch.config.settings import LoopSettings
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_NON_FINITE
from launch.job import together
from launch.records import goodput
from launch.records.events import EventLog, read
from launch.run.assemble import Run
from launch.training import start
from launch.training.spikes import Spikes
from launch.training.watch import Watch


def manifest_of(folder: Path, step: int) -> dict:
    path = folder / "checkpoints" / str(step) / "manifest" / "metadata"
    return json.loads(path.read_text())


def events_of(folder: Path, kind: str) -> list[dict]:
    return [event for event in read(folder)[0] if event["event"] == kind]


@pytest.fixture
def spoilt(monkeypatch):
    """Makes losses of some batches count as spikes, on the device itself."""

    def spoil(batches) -> None:
        def compile_train_step(run, *, rounds=False, original=Run.compile_train_step):
            step = original(run, rounds=rounds)

            def spoilt_step(state, batch, index, limit):
                bad = int(index) in batches
                return step(state, batch, index, np.float32(-1) if bad else limit)

            return spoilt_step

        monkeypatch.setattr(Run, "compile_train_step", compile_train_step)

    return spoil


SKIP = {"SPIKE_ACTION": "skip", "MAX_SKIPPED_STEPS": 3, "SELF_CHECK": "off"}


def test_a_burst_is_passed_over_from_the_checkpoint_before(trained, spoilt, tmp_path):
    folder = tmp_path / "run"
    spoilt({12, 13, 14, 15})  # of steps 13 to 16; the third in a row goes back
    done = commands.inline("train", *trained.knobs(folder, **SKIP))
    assert done.code == EXIT_DONE, done.err
    (back,) = events_of(folder, "rollback")
    assert (back["step"], back["passed_over_batches"]) == (10, 5)
    assert "3 steps in a row were left out: goes back to step 10, and" in done.err
    # Batches 10 to 14 are passed over; 15 is skipped again, alone.
    manifest = manifest_of(folder, 20)
    assert manifest["data_index"] == 25
    assert manifest["watch"]["rollbacks"] == 0, "a checkpoint was saved since"
    assert [e["batch"] for e in events_of(folder, "skipped")] == [12, 13, 14, 15]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["split"] == "train"]
    assert steps == list(range(1, 21)), "each step was recorded once"
    spent = events_of(folder, "done")[0]
    assert spent["steps"] == 20
    assert spent["seconds"]["lost"] > 0


def test_a_run_does_not_go_back_for_ever(trained, spoilt, tmp_path):
    folder = tmp_path / "run"
    spoilt(range(5, 10**6))
    knobs = SKIP | {"MAX_ROLLBACKS": 2, "CHECKPOINT_PERIOD": 4}
    done = commands.inline("train", *trained.knobs(folder, **knobs))
    assert done.code == EXIT_NON_FINITE, done.err
    assert len(events_of(folder, "rollback")) == 2
    assert "MAX_ROLLBACKS = 2 rollbacks did not help" in done.err
    assert "the newest checkpoint is of step 4" in done.err


def test_a_step_that_is_computed_twice_comes_out_the_same(trained, tmp_path):
    folder = tmp_path / "run"
    words = trained.knobs(folder, REPLAY_PERIOD=7, SELF_CHECK="off")
    done = commands.inline("train", *words)
    assert done.code == EXIT_DONE, done.err
    assert [e["step"] for e in events_of(folder, "replayed")] == [7, 14]
    arrays = manifest_of(folder, 20)["arrays"]
    words = trained.knobs(tmp_path / "other", SELF_CHECK="off")
    assert commands.inline("train", *words).code == EXIT_DONE
    assert arrays == manifest_of(tmp_path / "other", 20)["arrays"]


def test_a_device_that_computes_wrong_once_is_noticed(trained, tmp_path, monkeypatch):
    folder, calls = tmp_path / "run", []

    def compile_train_step(run, *, rounds=False, original=Run.compile_train_step):
        step = original(run, rounds=rounds)

        def faulty(state, batch, index):
            calls.append(int(index))
            state, metrics = step(state, batch, index)
            if calls.count(6) == 1 and int(index) == 6:
                norm = state.params["decoder"]["norm"]["scale"]
                state.params["decoder"]["norm"]["scale"] = norm.at[0].add(1e-7)
            return state, metrics

        return faulty

    monkeypatch.setattr(Run, "compile_train_step", compile_train_step)
    words = trained.knobs(folder, REPLAY_PERIOD=7, SELF_CHECK="off")
    done = commands.inline("train", *words)
    assert done.code == EXIT_FAULT, done.err
    assert "step 7 came out otherwise when it was computed again, in par" in done.err
    assert events_of(folder, "fault")[0]["step"] == 7
    assert not list((folder / "checkpoints").iterdir())


@pytest.mark.fast
def test_devices_that_hold_other_bits_of_the_same_piece_are_named(meshes):
    mesh = meshes["d2e4"]
    spec = PartitionSpec("expert")  # on two devices each, one of "data" 0 and of 1
    place = NamedSharding(mesh, spec)
    whole = np.arange(32, dtype=np.float32).reshape(8, 4)
    index = place.devices_indices_map(whole.shape)
    copies = {device: whole[piece].copy() for device, piece in index.items()}

    def array():
        return jax.make_array_from_single_device_arrays(
            whole.shape, place, [jax.device_put(c, d) for d, c in copies.items()]
        )

    alone = jax.device_put(
        whole, NamedSharding(mesh, PartitionSpec(("data", "expert")))
    )
    assert replicas.differing({"same": array(), "alone": alone}) == []
    device = mesh.devices.flat[5]
    copies[device].view("u4")[1, 2] ^= 1  # one bit
    (found,) = replicas.differing({"same": alone, "odd": array()})
    assert found.startswith("odd: device ")
    assert "holds other bits than 1 of 2 devices do" in found


def flipped(array: jax.Array) -> jax.Array:
    """The array, of which the last device holds one bit otherwise."""
    copies = [np.array(shard.data) for shard in array.addressable_shards]
    copies[-1].view("u4").flat[0] ^= 1
    devices = [shard.device for shard in array.addressable_shards]
    placed = [jax.device_put(c, d) for c, d in zip(copies, devices, strict=True)]
    place = array.sharding
    return jax.make_array_from_single_device_arrays(array.shape, place, placed)


def test_a_run_whose_devices_disagree_is_not_saved(trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def compile_train_step(run, *, rounds=False, original=Run.compile_train_step):
        step = original(run, rounds=rounds)

        def faulty(state, batch, index):
            state, metrics = step(state, batch, index)
            if index == 4:
                norm = state.params["decoder"]["norm"]
                norm["scale"] = flipped(norm["scale"])
            return state, metrics

        return faulty

    monkeypatch.setattr(Run, "compile_train_step", compile_train_step)
    knobs = {"COMPARE_REPLICAS": "on", "MESH_DATA": 2, "SIMULATED_DEVICES": 2}
    words = trained.knobs(folder, CHECKPOINT_PERIOD=5, SELF_CHECK="off", **knobs)
    done = commands.inline("train", *words)
    assert done.code == EXIT_FAULT, done.err
    assert "at step 5 devices that hold the same piece of an array hold ot" in done.err
    assert "params/decoder/norm/scale: device 1 of process 0 holds oth" in done.err
    assert not list((folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------- by hand


def plain_limits(losses: list[float], stddevs: float) -> list[float]:
    """The limit of each step, written out: of what came up to two steps before."""
    limits = []
    for step in range(1, len(losses) + 1):
        count, mean, variance = 0, 0.0, 0.0
        for loss in losses[: max(step - 2, 0)]:
            limit = mean + stddevs * math.sqrt(variance) if count >= 100 else math.inf
            if not math.isfinite(loss) or loss > limit:
                continue
            count += 1
            part = max(1 / count, 0.01)
            variance = (1 - part) * (variance + part * (loss - mean) ** 2)
            mean += part * (loss - mean)
        found = mean + stddevs * math.sqrt(variance) if count >= 100 else math.inf
        limits.append(found)
    return limits


@pytest.mark.fast
def test_limits_are_those_written_out_and_outlive_a_stop():
    rng = np.random.default_rng(0)
    losses = (3 + 0.1 * rng.normal(size=260)).tolist()
    losses[40], losses[180], losses[200] = math.nan, 9.0, math.inf
    wanted = plain_limits(losses, 4.0)
    assert losses[180] > wanted[180] > max(losses[181:199])
    spikes, found = Spikes(4.0), []
    for step, loss in enumerate(losses, 1):
        if step % 50 == 0:  # saved, and gone on from
            spikes = Spikes.restored(4.0, json.loads(json.dumps(spikes.kept())))
        found.append(spikes.limit(step))
        if step % 7:  # the loss before is known late, as in the loop
            spikes.add(step, loss)
        else:
            assert math.isfinite(loss)
            spikes.add(step, loss)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("action", ["none", "skip", "rollback"])
def test_a_spike_is_dealt_with_as_is_asked(tmp_path, action):
    loop = LoopSettings(model_dir="", spike_action=action, log_period_steps=1000)
    watch = Watch(loop, EventLog(tmp_path), print, None)
    calm = {"state/skipped_in_a_row": 0}
    for step in range(1, 151):
        given = watch.limit(step)
        metrics = calm | {"loss/total": 3 + 0.1 * (step % 3)}
        watch.saw(step, step - 1, metrics, fitted=True)
    assert len(given) == (action == "skip"), "the device itself compares"
    assert all(3.2 < limit < 4 for limit in given)
    watch.limit(151)
    watch.saw(151, 150, calm | {"loss/total": 9.0}, fitted=True)
    watch.saw(152, 151, calm | {"loss/total": 3.0}, fitted=True)  # launched already
    if action == "rollback":
        assert watch.going_back.startswith("the loss of step 151 was 9, above 3.")
        assert watch.resume_index == 151, "only what had spiked is passed over"
    else:
        assert not watch.going_back


@pytest.mark.fast
def test_each_rollback_of_a_job_asks_anew(monkeypatch):
    # What process 0 says under one name it can say once.
    asked = []
    monkeypatch.setattr(
        together, "as_first_finds", lambda what, find: asked.append(what)
    )
    run = types.SimpleNamespace(init_state=lambda: "first state")
    saved = types.SimpleNamespace(latest=None)
    numbers = itertools.count(1)
    for _ in range(3):
        assert start._newest(run, saved, {}, numbers) == ("first state", None)
    assert len({*asked}) == 3


@pytest.mark.fast
def test_goodput_by_hand():
    def spent(**seconds):
        return dict.fromkeys(goodput.PARTS, 0.0) | seconds

    events = [
        {"event": "start", "life": 1},
        {"event": "saved", "life": 1, "steps": 10, "seconds": spent(step=20, other=5)},
        {"event": "start", "life": 2},  # the first was killed in step 14
        {"event": "resume", "life": 2, "lost_steps": 3},
        {"event": "done", "life": 2, "steps": 30, "seconds": spent(step=60, compile=9)},
    ]
    total = goodput.of_events(events)
    assert total["step"] == 80
    assert total["lost"] == 3 * 2.0, "at the pace of the first life"
    assert goodput.fraction(total) == 80 / (80 + 5 + 9 + 6)
    assert goodput.words(total) == (
        "80 % of 1 min 40 s: compiling 9.0 s, steps that were taken again after a kill "
        "or a rollback 6.0 s, everything else 5.0 s"
    )


@pytest.mark.fast
def test_events_outlive_torn_and_damaged_lines(tmp_path):
    log = EventLog(tmp_path)
    log.note("start")
    log.note("saved", 3, loss=math.nan)
    log.close()
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "sav')
    log = EventLog(tmp_path)
    assert log.life == 2
    log.note("start")
    log.close()
    damaged = path.read_bytes().replace(b'"loss": "nan"', b"\x00\xff")
    path.write_bytes(damaged + b'{"event": 7}\n[]\n\n')
    events, number = read(tmp_path)
    assert [event["event"] for event in events] == ["start", "start"]
    assert number == 4
    EventLog(None).note("start")
