"""Batches that grow: which rows each has, by loops, and no row twice or left out."""

import memory_store
import numpy as np
import pytest

from tasks import ramp
from tasks.batches import training
from tasks.settings import MixtureSettings

pytestmark = pytest.mark.fast

STEPS = ((0, 2), (3, 4), (5, 8))
ROWS = [2, 2, 2, 4, 4, 8, 8, 8, 8, 8]


def test_sizes_and_first_rows_are_those_of_loops():
    sizes = ramp.sizes(8, STEPS)
    assert [sizes.of(index) for index in range(10)] == ROWS
    assert [sizes.before(index) for index in range(10)] == [
        sum(ROWS[:index]) for index in range(10)
    ]
    assert sizes.each == (2, 4, 8)
    for rows in range(50):
        fewest = next(n for n in range(100) if sizes.before(n) >= rows)
        assert sizes.batches(rows) == fewest
    alike = ramp.sizes(8)
    assert (alike.of(7), alike.before(7), alike.batches(17)) == (8, 56, 3)


def test_growing_batches_are_the_same_rows_one_after_the_other():
    store = memory_store.text_store(big=60, small=11)
    data = memory_store.settings("causal_lm")
    mixture = MixtureSettings(rates={"big": 3.0, "small": 1.0})
    given = store, data, mixture
    growing = training(*given, batch_size=8, ramp=STEPS, seed=5)
    single = training(*given, batch_size=1, seed=5)
    row = 0
    for index, number in enumerate(ROWS):
        assert growing.progress(index) == single.progress(row)
        whole = growing.read(index, 0, number)
        half = growing.read(index, number // 2, number)
        for r in range(number):
            (one,) = single.read(row, 0, 1)["decoder_target_tokens"]
            np.testing.assert_array_equal(whole["decoder_target_tokens"][r], one)
            row += 1
        np.testing.assert_array_equal(
            half["decoder_target_tokens"],
            whole["decoder_target_tokens"][number // 2 :],
        )
        with pytest.raises(ValueError, match=f"a batch has rows 0 to {number}"):
            growing.read(index, 0, number + 1)


def test_rates_of_a_schedule_are_those_of_their_batch():
    store = memory_store.text_store(big=60, small=11)
    data = memory_store.settings("causal_lm")
    turning = {0: {"big": 1, "small": 0}, 4: {"big": 1, "small": 0}}
    turning[5] = {"big": 0, "small": 1}
    growing = training(
        *(store, data, MixtureSettings(schedule=turning)),
        batch_size=8,
        ramp=STEPS,
        seed=5,
    )
    # Batches 0 to 3 have 10 rows, batch 4 has 4, while rates turn: half of them.
    assert growing.progress(4)["small"].rows == 0
    assert growing.progress(5)["small"].rows == 2
    assert growing.progress(7)["big"].rows == 12


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (((1, 2), (3, 8)), "its steps must begin with 0, and rise"),
        (((0, 2), (3, 4), (3, 8)), "its steps must begin with 0, and rise"),
        (((0, 4), (3, 2), (5, 8)), "its sizes must be 1 or more, and rise"),
        (((0, 0), (3, 8)), "its sizes must be 1 or more, and rise"),
        (((0, 2), (3, 4)), "ends with 4 rows: that must be BATCH_SIZE = 8"),
    ],
)
def test_a_ramp_that_does_not_rise_to_the_size_of_the_batch_is_refused(steps, words):
    (problem,) = ramp.problems(8, steps)
    assert words in problem
    assert ramp.problems(8, STEPS) == ramp.problems(8, ()) == []
