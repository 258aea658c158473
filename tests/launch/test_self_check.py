"""The check before training: it passes what is right, and stops what is wrong."""

import dataclasses
import math
import re

import jax
import pytest

from launch.config import reader
from launch.errors import UserError
from launch.run import self_check
from launch.run.assemble import Run, assemble
from launch.run.self_check import Comparison, SelfCheckError
from moe.dispatch import all_to_all
from moe.model.attention import kernel, kernel_method
from moe.routing import token_choice

KNOBS = ("TRANSPORT='all_to_all'", "GROUP_SIZE=16")
ON_FOUR = ("SIMULATED_DEVICES=4", "MESH_DATA=2", "MESH_EXPERT=2")


def tiny_run(*knobs: str) -> Run:
    return assemble(reader.read(["runs/tiny.gin"], [*KNOBS, *knobs]))


def test_a_layer_that_is_right_passes_and_says_how_close_it_is():
    training, evaluation = self_check.compare(tiny_run(*ON_FOUR))
    assert training.differences.keys() == {
        "output",
        "tokens",
        "weights/router",
        "weights/experts/up",
        "weights/experts/down",
    }
    # Float32 on CPU: only the order of sums differs.
    assert training.worst == max(training.differences.values()) < 1e-5
    assert training.tolerance == 1e-4
    # Scoring draws nothing and has no gradient.
    assert evaluation.program == "evaluation"
    assert evaluation.differences.keys() == {"output"}
    assert evaluation.worst < 1e-5


def test_what_a_run_without_drops_computes_is_checked_in_rounds_too():
    knobs = ("TRANSPORT='auto'", "TRAIN_CAPACITY_FACTOR=0", *ON_FOUR)
    found = self_check.compare(tiny_run(*knobs))
    assert [c.program for c in found] == ["training", "evaluation", "rounds"]
    assert all(c.is_right and c.way == "ring" for c in found)
    assert found[2].differences.keys() == found[0].differences.keys()


def test_a_fault_of_evaluation_alone_stops_the_run(monkeypatch):
    def route(*given, original=token_choice.route, **named):
        assignment = original(*given, **named)
        return dataclasses.replace(assignment, gate_GSJ=1.01 * assignment.gate_GSJ)

    patched = iter([False, True])
    results = self_check._results

    def second_evaluation_is_wrong(s, execution, arguments, *, train):
        if not train and next(patched):
            monkeypatch.setattr(token_choice, "route", route)
        return results(s, execution, arguments, train=train)

    monkeypatch.setattr(self_check, "_results", second_evaluation_is_wrong)
    with pytest.raises(SelfCheckError) as caught:
        self_check.check(tiny_run())
    message = str(caught.value)
    assert "differs from the oracle in evaluation by 0.01" in message
    assert "in training" not in message


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
    assert message.endswith("or pass --self_check=off to go on all the same.")
    begins = "TRANSPORT = 'all_to_all' differs from the oracle in training by "
    assert message.startswith(begins)
    message = message.partition("in evaluation")[0]
    assert "on 1 cpu devices, and may by 0.0001:" in message
    told = {
        name: float(x) for name, x in re.findall(r"^  (\S+) +(\S+)$", message, re.M)
    }
    assert wrong <= {name for name, x in told.items() if not x < 5e-3}
    assert right <= {name for name, x in told.items() if x < 1e-5}


@pytest.mark.fast
def test_what_is_not_a_number_is_wrong(monkeypatch):
    differences = {"output": 0.0, "tokens": math.nan}
    found = Comparison("training", "ring", differences, tolerance=0.1)
    monkeypatch.setattr(self_check, "compare", lambda run: [found])
    with pytest.raises(SelfCheckError, match=r"'ring' differs .* in training by nan "):
        self_check.check(tiny_run())


@pytest.fixture
def cudnn_interpreted(monkeypatch):
    """Attends by cuDNN's function as jax computes it without cuDNN."""
    monkeypatch.setattr(
        kernel_method, "pick", lambda *_, **__: ("cudnn_interpreted", "for a test")
    )


KERNEL = ("MOE_EVERY=0", "ATTENTION_WINDOWS=(9, 0)")


def test_a_kernel_that_attends_is_checked_on_the_mesh(cudnn_interpreted):
    run = tiny_run(*KERNEL, "SIMULATED_DEVICES=4", "MESH_DATA=2", "MESH_MODEL=2")
    found = self_check.compare(run)
    assert [(c.program, c.way) for c in found] == [
        ("attention", "cudnn_interpreted")
    ] * 2
    assert found[0].differences.keys() == {"output", "queries", "keys", "values"}
    assert all(c.worst < 1e-5 for c in found)
    assert self_check.check(run).startswith("equal to the oracle: attention 'cudnn")


def test_a_fault_in_a_kernel_stops_the_run(cudnn_interpreted, monkeypatch):
    def attend(*given, original=kernel.attend, **named):
        return without_a_gradient(original(*given, **named))

    monkeypatch.setattr(kernel, "attend", attend)
    with pytest.raises(SelfCheckError) as caught:
        self_check.check(tiny_run(*KERNEL))
    message = str(caught.value)
    begins = "ATTENTION_KERNEL, here 'cudnn_interpreted', differs from the oracle in "
    assert message.startswith(begins + "attention by 1 on 1 cpu devices")
    assert "Set ATTENTION_KERNEL to 'off', look for" in message


@pytest.mark.fast
def test_a_model_without_experts_has_nothing_to_check():
    assert self_check.check(tiny_run("MOE_EVERY=0")) == ""
