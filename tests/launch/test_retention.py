"""Which checkpoints stay, and when one is due."""

from types import SimpleNamespace

import pytest

from launch.checkpoints.retention import Retention, kept, losses_of
from launch.checkpoints.times import Times
from launch.config import reader
from launch.errors import ConfigError

pytestmark = pytest.mark.fast


def after(saves, **how):
    """The steps that are left when steps were saved one after the other."""
    stays = Retention(**how)
    left = []
    for step in saves:
        left.append(step)
        found = stays.should_preserve(
            [SimpleNamespace(step=s) for s in left], context=None
        )
        left = [s for s, stay in zip(left, found, strict=True) if stay]
    return left


def test_the_newest_stay():
    assert after(range(10, 80, 10), newest=3) == [50, 60, 70]


def test_the_first_of_every_period_stays_for_good():
    assert after(range(10, 100, 10), newest=1, period_steps=30) == [30, 60, 90]
    # Steps need not be multiples of it: by minutes they are any.
    assert after([7, 19, 31, 44, 61, 75], newest=1, period_steps=20) == [31, 44, 61, 75]


def test_the_best_stay_and_of_equals_the_later():
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.0, 50: float("nan"), 60: 4.0}
    saves = range(10, 80, 10)
    assert after(saves, newest=1, best=1, losses=losses) == [40, 70]
    assert after(saves, newest=1, best=2, losses=losses) == [20, 40, 70]


def test_skipped_steps_push_no_other_out():
    saves = [10, 20, 30, 31, 32, 33]
    assert after(saves, newest=2, stalled={31, 32, 33}) == [20, 30, 33]
    # With progress again, what was stalled makes room first.
    assert after([*saves, 40], newest=2, stalled={31, 32, 33}) == [30, 40]
    assert kept([31], newest=1, losses={}, stalled={31}) == {31}


def test_losses_are_those_of_held_out_text():
    name = "loss/nats_per_token"
    records = [
        {"step": 5, "split": "train", name: 9.0},
        {"step": 5, "split": "heldout", name: 2.5},
        {"step": 6, "split": "heldout", "tasks/bleu": 1.0},
    ]
    assert losses_of(records) == {5: 2.5}


def test_a_checkpoint_is_due_by_minutes_as_by_steps():
    now = [0.0]
    times = Times(2, clock=lambda: now[0])
    assert times.due({"score"}, 1) == {"score"}
    now[0] = 119
    assert times.due(set(), 2) == set()
    assert times.due({"save"}, 2) == {"save"}
    now[0] = 120
    assert times.due(set(), 3) == {"save"}
    times.saved()
    assert times.due(set(), 4) == set()
    assert Times(0, clock=lambda: 1e9).due(set(), 1) == set()


def test_a_checkpoint_waits_for_a_step_that_is_taken():
    times = Times(0)
    assert times.unless_stalled({"save", "score"}, 2) == {"score"}
    assert times.due(set(), 6) == {"save"}
    assert times.unless_stalled({"save"}, 3) == set()
    assert times.unless_stalled(times.due(set(), 7), 0) == {"save"}
    times.saved()
    assert times.due(set(), 8) == set()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (["CHECKPOINT_MINUTES=-1"], "CHECKPOINT_MINUTES = -1.0: cannot be negative"),
        (["KEEP_PERIOD=-5"], "KEEP_PERIOD = -5: cannot be negative"),
        (["KEEP_BEST=-1"], "KEEP_BEST = -1: cannot be negative"),
        (
            ["KEEP_BEST=1", "EVAL_PERIOD=7", "CHECKPOINT_PERIOD=10"],
            "CHECKPOINT_PERIOD = 10 must be a multiple of EVAL_PERIOD = 7",
        ),
    ],
)
def test_knobs_of_retention_that_cannot_be_are_said(knobs, said):
    with pytest.raises(ConfigError) as raised:
        reader.read(["runs/tiny.gin"], knobs)
    assert said in str(raised.value)
