"""Where nothing drops: a step that finds too little room is taken again."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from launch.config import reader
from launch.records.events import EventLog
from launch.run.assemble import Run, assemble
from launch.run.programs import Programs
from launch.training.steps import Launched, Steps
from launch.training.watch import Watch

pytestmark = pytest.mark.timeout(600)  # the first test compiles four programs

TIGHT, AMPLE = 2.0, 4.0
STEPS = 4
ADVERSARY = 2  # all tokens of this batch are one and the same


@functools.cache
def make_run(row_budget: float) -> Run:
    return assemble(
        reader.read(
            ["configs/runs/tiny.gin"],
            [
                'MODEL_DIR="unused"',
                'TRANSPORT="ragged"',
                "MESH_DATA=1",
                "MESH_EXPERT=4",
                "SIMULATED_DEVICES=8",
                "NUM_LAYERS=1",
                "MOE_EVERY=1",
                "TRAIN_CAPACITY_FACTOR=0",
                f"ROW_BUDGET={row_budget}",
                f"COMPILE_AHEAD={'all' if row_budget == TIGHT else 'train_step'}",
            ],
        )
    )


def batch(run: Run, index: int) -> dict:
    shape = (run.settings.train.batch_size, run.settings.data.length)
    token_BL = np.random.default_rng(index).integers(3, 200, shape)
    if index == ADVERSARY:
        token_BL[:] = 7
    ones_BL = np.ones(shape)
    features = {
        "decoder_target_tokens": token_BL,
        "decoder_input_tokens": token_BL,
        "decoder_loss_weights": ones_BL,
        "decoder_segment_ids": ones_BL,
        "decoder_positions": np.arange(shape[1]) * ones_BL,
    }
    features = {name: array.astype(np.int32) for name, array in features.items()}
    return jax.device_put(features, run.batch_sharding)


@dataclasses.dataclass
class Log:
    """What the loop would write."""

    records: list = dataclasses.field(default_factory=list)

    def add(self, launched: Launched, *, again: bool) -> None:
        self.records.append((launched.step, again, jax.device_get(launched.metrics)))


@functools.cache
def trained(row_budget: float):
    """The state after all batches, and the log."""
    run, log = make_run(row_budget), Log()
    waited = []
    with jax.set_mesh(run.mesh), Programs(run) as programs:
        programs.during = lambda message: contextlib.nullcontext(waited.append(message))
        programs.begin()
        programs.wait()
        step, rounds = programs.train_step(), programs.rounds
        watch = Watch(run.settings.loop, EventLog(None), print, None)
        steps = Steps(run.init_state(), step, rounds, log, watch)
        for index in range(STEPS):
            steps.take(Launched(index + 1, index, batch(run, index), 0.0))
        steps.settle()
    return jax.device_get(steps.state), log.records, waited


def test_what_a_run_may_need_is_compiled_before_its_first_step():
    assert trained(TIGHT)[2] == [
        "compiling the train step",
        "compiling evaluation",
        "compiling the step in rounds",
    ]
    assert not make_run(AMPLE).may_exceed_budget, "it never needs rounds"
    assert trained(AMPLE)[2] == ["compiling the train step"], "as COMPILE_AHEAD says"


@pytest.mark.fast
def test_an_evaluation_that_cannot_be_compiled_is_said_before_the_first_step(
    monkeypatch,
):
    def refused(run):
        raise RuntimeError("the compiler refuses it")

    monkeypatch.setattr(Run, "compile_train_step", lambda run, **_: "compiled")
    monkeypatch.setattr(Run, "compile_eval_step", refused)
    with Programs(make_run(TIGHT)) as programs:
        programs.begin()
        with pytest.raises(RuntimeError, match="the compiler refuses it"):
            programs.wait()


def test_a_step_without_room_is_taken_again_and_those_after_it_too():
    state, records, _ = trained(TIGHT)
    assert [step for step, _, _ in records] == [1, 2, 3, 4], "each step counts once"
    again = [step for step, again, _ in records if again]
    assert ADVERSARY + 1 in again
    assert len(again) < STEPS, "the next steps return to the tight budget"
    assert (state.step, state.data_index) == (STEPS, STEPS)
    for step, was_taken_again, metrics in records:
        assert metrics["state/taken"] == 1
        assert (metrics["router/over_budget_rows"] > 0) == was_taken_again, step
        assert metrics["ledger/dropped_choices"].sum() == 0


def test_its_result_is_that_of_ample_room():
    state, records, _ = trained(TIGHT)
    expected, ample, _ = trained(AMPLE)
    assert not any(again for _, again, _ in ample)
    for (_, _, metrics), (_, _, wanted) in zip(records, ample, strict=True):
        np.testing.assert_allclose(metrics["loss/total"], wanted["loss/total"], 2e-5)
        np.testing.assert_array_equal(metrics["router/load"], wanted["router/load"])
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, state.params, expected.params)


@pytest.mark.slow
def test_the_memory_of_a_step_in_rounds_does_not_grow_with_their_number():
    tight, ample = make_run(TIGHT), make_run(AMPLE)
    with jax.set_mesh(tight.mesh):
        in_rounds = tight.compile_train_step(rounds=True).memory_analysis()
        worst_case = ample.compile_train_step().memory_analysis()
    assert in_rounds.temp_size_in_bytes < 1.1 * worst_case.temp_size_in_bytes
