"""Steps that are launched ahead, and taken again if their rows found no room."""

import dataclasses
import itertools

import pytest

from launch.config.settings import LoopSettings
from launch.records.events import EventLog
from launch.training.steps import Launched, Steps
from launch.training.watch import Watch

pytestmark = pytest.mark.fast

STEPS = 5


@dataclasses.dataclass
class Devices:
    """Stands for the compiled steps: a state is the list of batches learnt from.

    Attributes:
        too_many: rows beyond the budget, of the batches that have them.
        launched: whether in rounds, and the batch, in the order of launches.
    """

    too_many: dict[int, int]
    launched: list[tuple[bool, int]] = dataclasses.field(default_factory=list)
    compiled_rounds: int = 0

    def step(self, state, batch, index, rounds=False):
        self.launched.append((rounds, int(index)))
        assert batch == f"batch {index}"
        excess = 0 if rounds else self.too_many.get(int(index), 0)
        taken = int(index) == len(state) and excess == 0
        metrics = {"state/taken": int(taken), "router/over_budget_rows": excess}
        metrics |= {"state/skipped_in_a_row": 0, "loss/total": 1.0}
        return [*state, int(index)] if taken else state, metrics

    def in_rounds(self):
        self.compiled_rounds += 1
        return lambda *arguments: self.step(*arguments, rounds=True)


@dataclasses.dataclass
class Log:
    records: list[tuple] = dataclasses.field(default_factory=list)

    def add(self, launched, *, again):
        metrics = launched.metrics
        self.records.append(
            (
                launched.step,
                metrics["state/taken"],
                metrics["router/over_budget_rows"],
                again,
            )
        )


def steps_of(devices, log) -> Steps:
    watch = Watch(LoopSettings(model_dir=""), EventLog(None), print, None)
    return Steps([], devices.step, devices.in_rounds, log, watch)


def learn(too_many, settled_after=()):
    """Takes STEPS steps and waits for the last, and for those it is told to."""
    devices, log = Devices(too_many), Log()
    steps = steps_of(devices, log)
    for index in range(STEPS):
        steps.take(Launched(index + 1, index, f"batch {index}", 0.0))
        if index in settled_after:
            steps.settle()
            assert steps.state == list(range(index + 1)), "as a checkpoint needs it"
    steps.settle()
    steps.settle()  # of nothing
    return devices, log, steps.state


@pytest.mark.parametrize("settled_after", [(), (2,), range(STEPS)])
def test_every_batch_is_learnt_from_once_and_in_order(settled_after):
    patterns = itertools.product([0, 7], repeat=STEPS)
    for rows in patterns:
        too_many = {index: n for index, n in enumerate(rows) if n}
        devices, log, state = learn(too_many, settled_after)
        assert state == list(range(STEPS))
        assert log.records == [
            (index + 1, 1, n, n > 0) for index, n in enumerate(rows)
        ], "each step is logged once, when it was taken, with the rows that were over"
        assert [i for rounds, i in devices.launched if rounds] == list(too_many)


def test_a_step_is_launched_before_the_one_before_is_looked_at():
    devices, log = Devices({}), Log()
    steps = steps_of(devices, log)
    for index in range(3):
        steps.take(Launched(index + 1, index, f"batch {index}", 0.0))
        assert len(devices.launched) == index + 1
        assert len(log.records) == index
    assert devices.compiled_rounds == 0, "rounds are compiled only if they are needed"


def test_a_step_without_room_costs_the_one_launched_after_it_too():
    devices, _, _ = learn({1: 7})
    launches = [0, 1, 2, "1 in rounds", 2, 3, 4]
    assert [
        f"{index} in rounds" if rounds else index for rounds, index in devices.launched
    ] == launches
