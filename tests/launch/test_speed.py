"""How well a run uses its devices."""

import dataclasses
import types

import jax
import pytest
from commands import TINY

from launch.config import reader
from launch.run import speed
from launch.run.assemble import assemble

pytestmark = pytest.mark.fast

RECORD = {"perf/step_seconds": 0.25, "perf/tokens_per_second": 8_000.0}


def run_on(kind, platform="gpu", number=4):
    """A run whose mesh is of other devices."""
    run = assemble(reader.read([TINY.partition("=")[2]]), jax.devices()[:1])
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    devices = types.SimpleNamespace(flat=[device] * number)
    return dataclasses.replace(run, mesh=types.SimpleNamespace(devices=devices))


def test_utilization_is_the_models_operations_over_those_of_all_chips():
    run = run_on("NVIDIA H100 80GB HBM3")
    found = speed.derive(run)(RECORD)
    counts = speed.count(run.settings.layers, run.settings.data.length)
    flops = 3 * counts.forward_flops_per_token * RECORD["perf/tokens_per_second"]
    utilization = flops / (4 * 989e12)
    assert found["perf/model_flops_utilization"] == pytest.approx(utilization)
    assert found["perf/tokens_per_second_per_device"] == 2_000.0


def test_where_the_chip_is_not_known_nothing_is_said_of_its_use():
    assert speed.derive(run_on("cpu", "cpu"))(RECORD) == {
        "perf/tokens_per_second_per_device": 2_000.0
    }


def test_the_greatest_memory_of_any_device_is_said_where_it_is_counted(monkeypatch):
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    some = [device({"peak_bytes_in_use": n}) for n in (5, 7, 6)]
    monkeypatch.setattr(jax, "local_devices", lambda: [*some, device({}), device(None)])
    assert speed.memory_peak_bytes() == 7
    assert speed.derive(run_on("cpu", "cpu"))(RECORD)["perf/memory_peak_bytes"] == 7
    monkeypatch.setattr(jax, "local_devices", lambda: [device(None)])
    assert speed.memory_peak_bytes() is None
