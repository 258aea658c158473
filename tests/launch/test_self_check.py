"""The check before training: it passes what is right, and stops what is wrong."""

import math
import re

import jax
import pytest

from launch import gin_files, self_check
from launch.assemble import Run, assemble
from launch.errors import UserError
from launch.self_check import Comparison, SelfCheckError
from moe.dispatch import all_to_all

KNOBS = ("TRANSPORT='all_to_all'", "GROUP_SIZE=16")
ON_FOUR = ("SIMULATED_DEVICES=4", "MESH_DATA=2", "MESH_EXPERT=2")


def tiny_run(*knobs: str) -> Run:
    return assemble(gin_files.read(["runs/tiny.gin"], [*KNOBS, *knobs]))


def test_a_layer_that_is_right_passes_and_says_how_close_it_is():
    comparison = self_check.check(tiny_run(*ON_FOUR))
    assert comparison is not None
    assert comparison.differences.keys() == {
        "output",
        "tokens",
        "weights/router",
        "weights/experts/up",
        "weights/experts/down",
    }
    # Float32 on CPU: only the order of sums differs.
    assert comparison.worst == max(comparison.differences.values()) < 1e-5
    assert comparison.tolerance == 1e-4
    assert str(comparison).startswith("TRANSPORT 'all_to_all' equals the oracle, ")


def scaled(y_gSM):
    """A fault too small to be seen in a loss curve."""
    return 1.01 * y_gSM


def without_a_gradient(y_gSM):
    return jax.lax.stop_gradient(y_gSM)


@pytest.mark.parametrize(
    ("fault", "wrong", "right"),
    [
        (scaled, {"output", "tokens", "weights/experts/down"}, set()),
        pytest.param(
            without_a_gradient,
            {"tokens", "weights/experts/up"},
            {"output"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_fault_in_a_transport_stops_the_run(fault, wrong, right, monkeypatch):
    def combine(*args, original=all_to_all.combine):
        return fault(original(*args))

    monkeypatch.setattr(all_to_all, "combine", combine)
    with pytest.raises(SelfCheckError) as caught:
        self_check.check(tiny_run())
    assert isinstance(caught.value, UserError), "one readable error, no traceback"
    message = str(caught.value)
    assert message.startswith("TRANSPORT = 'all_to_all' differs from the oracle by ")
    assert "on 1 cpu devices, and may by 0.0001:" in message
    assert "pass --self_check=off" in message
    told = {
        name: float(x) for name, x in re.findall(r"^  (\S+) +(\S+)$", message, re.M)
    }
    assert wrong <= {name for name, x in told.items() if not x < 5e-3}
    assert right <= {name for name, x in told.items() if x < 1e-5}


@pytest.mark.fast
def test_what_is_not_a_number_is_wrong(monkeypatch):
    found = Comparison("ring", {"output": 0.0, "tokens": math.nan}, tolerance=0.1)
    monkeypatch.setattr(self_check, "compare", lambda run: found)
    with pytest.raises(SelfCheckError, match="'ring' differs from the oracle by nan "):
        self_check.check(tiny_run())


@pytest.mark.fast
def test_a_model_without_experts_has_nothing_to_check():
    assert self_check.check(tiny_run("MOE_EVERY=0")) is None
