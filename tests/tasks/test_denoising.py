"""Span corruption against T5's preprocessors written out in plain loops."""

import collections
import itertools
import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_store import settings as data_settings

from tasks import denoising
from tasks.denoising import UL2, Denoiser, corrupt, noise_mask
from tasks.draws import bits

pytestmark = pytest.mark.fast

T5 = Denoiser(3, 0.15)
SIZE, EXTRA, EOS = 1000, 110, 1
WORDS = types.SimpleNamespace(size=SIZE, extra_ids=EXTRA, eos_id=EOS)
DENOISERS = st.sampled_from([T5, *UL2, Denoiser(1, 0.5), Denoiser(2.5, 0.7)])


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """Masked tokens and spans; Python rounds ties to even, as TensorFlow does."""
    product = np.float32(length) * np.float32(density)
    noise = min(max(round(float(product)), 1), length - 1)
    return noise, max(round(float(np.float32(noise) / np.float32(mean))), 1)


def t5_helper(inputs_length: int, density: float, mean: float) -> tuple[int, int]:
    """How many tokens fill inputs: more and more of them, until they do not fit."""

    def encoded(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while encoded(tokens + 1)[0] <= inputs_length:
        tokens += 1
    if density == 0.5 and encoded(tokens)[1] > encoded(tokens)[0]:
        tokens -= 1
    return tokens, encoded(tokens)[1]


def t5_replace(tokens: list[int], mask: list[bool]) -> list[int]:
    """Each run of masked tokens becomes the next sentinel from the top."""
    replaced, before, sentinel = [], False, SIZE
    for token, masked in zip(tokens, mask, strict=True):
        if masked and not before:
            sentinel -= 1
            replaced.append(sentinel)
        if not masked:
            replaced.append(token)
        before = masked
    return replaced


def runs(mask) -> list[tuple[bool, int]]:
    return [(bool(key), len(list(group))) for key, group in itertools.groupby(mask)]


def put_together(inputs: list[int], targets: list[int], extra_ids: int) -> list[int]:
    """The tokens that inputs and targets are made of."""
    spans, current = {}, None
    for token in targets[:-1]:
        if token >= SIZE - extra_ids:
            spans[token] = current = []
        else:
            current.append(token)
    tokens = []
    for token in inputs[:-1]:
        tokens += spans.pop(token, []) if token >= SIZE - extra_ids else [token]
    return tokens + [token for span in spans.values() for token in span]


@given(st.integers(2, 700), DENOISERS, st.integers(0, 2**62))
@settings(max_examples=150, deadline=None)
def test_masks_have_exactly_the_tokens_and_spans_of_t5(length, denoiser, key):
    mask = noise_mask(length, denoiser, bits(length, key))
    assert len(mask) == length
    if denoiser.mean:
        noise, spans = t5_counts(length, denoiser.density, denoiser.mean)
        spans = min(spans, length - noise)  # where T5 fails
    else:
        noise, spans = t5_counts(length, denoiser.density, 1)[0], 1
    assert mask.sum() == noise
    turns = [masked for masked, _ in runs(mask)]
    if spans == 1 and denoiser.mode in ("R", "X"):
        assert turns in ([False, True], [False, True, False])
    else:
        assert turns == [False, True] * spans


@given(st.integers(1, 200), DENOISERS, st.integers(0, 2**62))
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_t5_and_nothing_is_lost(length, denoiser, key):
    tokens = bits(length, key, 1) % 800 + 2
    mask = noise_mask(length, denoiser, bits(length, key))
    row = corrupt(tokens.astype(np.int64), mask, SIZE, EOS)
    assert row.inputs.tolist() == [*t5_replace(tokens.tolist(), mask), EOS]
    spans = t5_replace(tokens.tolist(), ~mask)
    if mask.any() and not mask[-1]:
        spans.pop()  # the last sentinel would stand for nothing
    assert row.targets.tolist() == [*spans, EOS]
    again = put_together(row.inputs.tolist(), row.targets.tolist(), EXTRA)
    assert again == tokens.tolist()
    if length > 1:
        lengths = denoising.lengths(length, denoiser)
        modes = 1 if denoiser.mode else 0
        assert (len(row.inputs) + modes, len(row.targets)) == lengths
    for target, source in zip(row.targets[:-1], row.sources[:-1], strict=True):
        if target < SIZE - EXTRA:
            assert tokens[source] == target
        elif length > 1:  # a sentinel is of the first token that it stands for
            assert mask[source]
            assert not mask[source - 1]
    assert row.sources[-1] == row.sources[-2]


def test_corruption_by_hand():
    # Eight tokens, of which the third and fourth and the last are masked.
    mask = np.asarray([0, 0, 1, 1, 0, 0, 0, 1], bool)
    row = corrupt(np.arange(10, 18), mask, SIZE, EOS)
    assert row.inputs.tolist() == [10, 11, 999, 14, 15, 16, 998, 1]
    assert row.targets.tolist() == [999, 12, 13, 998, 17, 1]
    assert row.sources.tolist() == [2, 2, 3, 7, 7, 7]


def test_lengths_are_those_of_t5():
    assert denoising.span_corruption_lengths(512, 0.15, 3.0) == (568, 114)
    different = []
    for inputs, (density, mean) in itertools.product(
        range(8, 1100, 3), [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.25, 5.0)]
    ):
        ours = denoising.span_corruption_lengths(inputs, density, mean)
        theirs = t5_helper(inputs, density, mean)
        denoiser = Denoiser(mean, density)
        exact = denoising.lengths(ours[0], denoiser)
        assert exact[0] <= inputs
        assert exact[1] == ours[1]
        different += [] if ours == theirs else [(inputs, ours, theirs)]
    # Only where T5 counts a tie otherwise than its masks do (see the docstring), and
    # where it takes off one target for two.
    assert len(different) < 0.1 * 4 * 364
    assert all(abs(o[0] - t[0]) <= 1 and abs(o[1] - t[1]) <= 2 for _, o, t in different)


def test_all_masks_are_equally_likely():
    # Of 10 tokens, 5 are masked in 2 spans: 4·4 = 16 masks.
    denoiser, draws = Denoiser(2.5, 0.5), 8000
    counts = collections.Counter(
        noise_mask(10, denoiser, bits(10, 7, n)).tobytes() for n in range(draws)
    )
    assert len(counts) == 16
    expected = draws / 16
    chi_squared = sum((c - expected) ** 2 / expected for c in counts.values())
    assert chi_squared < 37.7  # 15 degrees of freedom: above in 1 of 1,000 seeds


def test_a_single_span_of_ul2_is_anywhere_and_of_t5_at_the_end():
    long = Denoiser(64, 0.15, "X")
    starts = [int(np.argmax(noise_mask(20, long, bits(20, n)))) for n in range(3000)]
    counts = np.bincount(starts, minlength=18)
    assert counts[0] == 0
    # 17 places of 3 tokens in 20, 176 of each ± 4 standard deviations of 13.
    assert np.abs(counts[1:18] - 3000 / 17).max() < 52
    mask = noise_mask(20, Denoiser(64, 0.15), bits(20, 1))
    assert runs(mask) == [(False, 17), (True, 3)]


def test_a_row_is_a_function_of_its_key():
    ask = denoising.of_denoisers(UL2, 100, WORDS).ask
    tokens = np.arange(2, 102)
    first = ask(tokens, (1, 2, 3))
    np.random.default_rng(0).random(5)  # and of no other state
    again = ask(tokens, (1, 2, 3))
    assert first.inputs.tolist() == again.inputs.tolist()
    rows = {ask(tokens, (1, 2, n)).inputs.tobytes() for n in range(60)}
    assert len(rows) > 45  # the S-denoiser draws nothing: all its rows are alike
    for key in ((2, 2, 3), (1, 3, 3), (12, 3)):
        assert ask(tokens, key).inputs.tolist() != first.inputs.tolist()


def test_ul2_draws_its_seven_denoisers_alike_and_announces_them():
    ask = denoising.of_denoisers(UL2, 200, WORDS).ask
    tokens = np.arange(2, 202)
    modes = collections.Counter()
    for n in range(2100):
        row = ask(tokens, (5, n))
        mode = int(row.inputs[0]) - (SIZE - EXTRA)
        modes["RSX"[mode]] += 1
        assert (
            put_together(row.inputs[1:].tolist(), row.targets.tolist(), EXTRA)
            == tokens.tolist()
        )
        if mode == 1:  # the prefix, one sentinel; a quarter follows
            assert row.inputs[1:].tolist() == [*range(2, 152), 999, EOS]
            assert row.targets.tolist() == [999, *range(152, 202), EOS]
    assert sum(modes.values()) == 2100
    # 2, 1 and 4 of 7: 600, 300, 1,200 ± 4 standard deviations of at most 23.
    assert abs(modes["R"] - 600) < 90
    assert abs(modes["S"] - 300) < 70
    assert abs(modes["X"] - 1200) < 95


@pytest.mark.parametrize("lengths", [(512, 512), (512, 114), (32, 24), (6, 5)])
def test_every_ul2_row_fits_and_one_more_token_would_not(lengths):
    data = data_settings(
        "ul2",
        task_feature_lengths=dict(zip(("inputs", "targets"), lengths, strict=True)),
    )
    raw = denoising.corruption(data, WORDS).row_tokens

    def fits(length: int) -> bool:
        each = [denoising.lengths(length, denoiser) for denoiser in UL2]
        return all(i <= lengths[0] and t <= lengths[1] for i, t in each)

    assert fits(raw)
    assert not fits(raw + 1)


def test_prefixes_are_uniform():
    lengths = [denoising.prefix_length(9, 3, n) for n in range(4000)]
    counts = np.bincount(lengths, minlength=10)
    assert counts[0] == counts[9] == 0
    # 8 lengths, 500 of each ± 4 standard deviations of 21.
    assert np.abs(counts[1:9] - 500).max() < 84
    assert denoising.prefix_length(2, 3) == 1
    assert denoising.prefix_length(1, 3) == 0


@pytest.mark.parametrize(
    ("objective", "changes", "extra_ids", "words"),
    [
        ("span_corruption", {}, 28, None),
        ("span_corruption", {"targets": 130}, 28, None),
        (
            "span_corruption",
            {"targets": 113},
            28,
            "{'inputs': 512, 'targets': 114}, or {'inputs': 507, 'targets': 113}",
        ),
        ("span_corruption", {"inputs": 2}, 28, "use {'inputs': 4, 'targets': 3}"),
        ("span_corruption", {}, 27, "28 sentinels"),
        ("span_corruption", {"mean_noise_span_length": 30.0}, 3, None),
        (
            "span_corruption",
            {"noise_density": 0.8, "mean_noise_span_length": 2.0},
            100,
            "MEAN_NOISE_SPAN_LENGTH = 2.0",
        ),
        ("ul2", {}, 100, None),
        ("ul2", {"targets": 2}, 100, "use {'inputs': 512, 'targets': 380}"),
        ("ul2", {}, 20, "sentinels and 3 modes"),
    ],
)
def test_what_does_not_suit_is_said_with_numbers_that_do(
    objective, changes, extra_ids, words
):
    lengths = {"inputs": 512, "targets": 114}
    lengths |= {name: changes.pop(name) for name in list(changes) if name in lengths}
    data = data_settings(objective, task_feature_lengths=lengths, **changes)
    found = denoising.problems(data, 32_100, extra_ids)
    vocabulary = types.SimpleNamespace(size=32_100, extra_ids=extra_ids, eos_id=EOS)
    assert len(found) == (words is not None)
    if words:
        with pytest.raises(ValueError, match=re.escape(found[0])):
            denoising.corruption(data, vocabulary)
        assert words in found[0]


def test_the_number_of_extra_ids_that_is_asked_for_suffices():
    for objective, targets in (("span_corruption", 114), ("ul2", 512)):
        lengths = {"inputs": 512, "targets": targets}
        data = data_settings(objective, task_feature_lengths=lengths)
        (found,) = denoising.problems(data, 32_100, 1)
        needed = int(found.split("at least ")[1].split(",")[0])
        assert denoising.problems(data, 32_100, needed) == []
        assert denoising.problems(data, 32_100, needed - 1)
        words = types.SimpleNamespace(size=SIZE, extra_ids=needed, eos_id=EOS)
        maker = denoising.corruption(data, words)
        tokens = np.full(maker.row_tokens, 5)
        used = set()
        for n in range(40):
            row = maker.ask(tokens, (n,))
            assert len(row.inputs) <= 512
            assert len(row.targets) <= targets
            used |= set(row.inputs.tolist()) - {5, EOS}
        modes = {SIZE - needed + mode for mode in range(3 if objective == "ul2" else 0)}
        assert used == set(range(SIZE - needed, SIZE)) | modes
