"""Span corruption: masked spans of text are what a row asks for.

T5's objective (arXiv:1910.10683, section 3.1.4) as its released preprocessors compute
it, and UL2's mixture of such denoisers (arXiv:2205.05131, section 3.1.2). Every draw
is a function of integers, so that a row is corrupted alike wherever it is read.
"""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tasks.draws import below, bits
from tasks.objectives import Asked, Maker
from tasks.settings import DataSettings
from tasks.vocabularies import Vocabulary

MODES = ("R", "S", "X")  # their tokens are the lowest extra ids, in this order


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way to mask tokens.

    Attributes:
        mean: mean length of masked spans, in tokens; 0: one span, the row's end.
        density: fraction of tokens that are masked.
        mode: which of `MODES` announces it; "" is T5's own, without.
    """

    mean: float
    density: float
    mode: str = ""


# Table 1 of UL2. There the span lengths are drawn around the mean, and so their
# number varies; here, as in T5, their number is fixed and all cuts are equally likely.
# But where one span is enough, T5 always masks the row's end: that would make spans of
# 64 another prefix LM, so in UL2 a single span is put anywhere after the first token.
UL2 = (
    Denoiser(3, 0.15, "R"),
    Denoiser(8, 0.15, "R"),
    Denoiser(0, 0.25, "S"),
    Denoiser(3, 0.5, "X"),
    Denoiser(8, 0.5, "X"),
    Denoiser(64, 0.15, "X"),
    Denoiser(64, 0.5, "X"),
)


def corruption(data: DataSettings, vocabulary: Vocabulary) -> Maker:
    """Returns the maker of corrupted rows.

    Sentinel i is V - 1 - i; modes are the lowest extra ids.

    Raises:
        ValueError: there can be none; says which numbers would do.
    """
    if found := problems(data, vocabulary.size, vocabulary.extra_ids):
        raise ValueError("; ".join(found))
    denoisers = _denoisers(data)
    return of_denoisers(denoisers, _raw_length(data, denoisers), vocabulary)


def of_denoisers(
    denoisers: Sequence[Denoiser], row_tokens: int, vocabulary: Vocabulary
) -> Maker:
    """Returns the maker of rows that draw one of the denoisers, all equally likely."""
    lowest = vocabulary.size - vocabulary.extra_ids

    def ask(tokens: np.ndarray, key: tuple[int, ...]) -> Asked:
        draws = bits(len(tokens) + 1, *key)
        denoiser = denoisers[int(draws[0]) % len(denoisers)]
        mask = noise_mask(len(tokens), denoiser, draws[1:])
        row = corrupt(tokens, mask, vocabulary.size, vocabulary.eos_id)
        if not denoiser.mode:
            return row
        mode = lowest + MODES.index(denoiser.mode)
        return row._replace(inputs=np.concatenate([[mode], row.inputs]))

    def num_positions(num_tokens: int) -> float:
        each = [sum(lengths(num_tokens, denoiser)) for denoiser in denoisers]
        return sum(each) / len(each)

    return Maker(row_tokens, ask, num_positions)


def prefix(data: DataSettings, vocabulary: Vocabulary) -> Maker:
    """Returns the maker of rows whose first tokens are given."""
    del vocabulary

    def ask(tokens: np.ndarray, key: tuple[int, ...]) -> Asked:
        given = prefix_length(len(tokens), *key)
        return Asked(tokens[:given], tokens[given:], np.arange(given, len(tokens)))

    return Maker(data.length, ask, float)


def span_corruption_lengths(
    inputs_length: int, noise_density: float, mean_noise_span_length: float
) -> tuple[int, int]:
    """Returns how many tokens fill inputs, and how long their targets are.

    T5's `random_spans_helper`, which counts in double precision what its masks count
    in single: where the two differ (190 tokens, for one), this is right and T5 cuts
    off ends of rows.

    Args:
        inputs_length: most tokens of inputs, with sentinels and end.
        noise_density: fraction of tokens that are masked.
        mean_noise_span_length: in tokens.
    Returns:
        Raw tokens and the length of targets: 512 gives (568, 114). (1, 2) if not
        even two tokens fit.
    """
    denoiser = Denoiser(mean_noise_span_length, noise_density)
    most = int(inputs_length / (1 - noise_density)) + 3
    raw = _largest(most, lambda n: lengths(n, denoiser)[0] <= inputs_length)
    inputs, targets = lengths(raw, denoiser)
    if noise_density == 0.5 and targets > inputs:  # as T5: both alike
        raw -= 1
    return raw, lengths(raw, denoiser)[1]


def lengths(num_tokens: int, denoiser: Denoiser) -> tuple[int, int]:
    """Returns how long inputs and targets are that `num_tokens` are made into."""
    noise, spans = span_counts(num_tokens, denoiser)
    mode = 1 if denoiser.mode else 0
    return mode + num_tokens - noise + spans + 1, noise + spans + 1


def span_counts(num_tokens: int, denoiser: Denoiser) -> tuple[int, int]:
    """Returns how many of `num_tokens` are masked, in how many spans.

    T5's `random_spans_noise_mask`: single precision, ties to even, at least one token
    masked and one not.
    """
    length = max(num_tokens, 2)
    noise = int(np.rint(np.float32(length) * np.float32(denoiser.density)))
    noise = min(max(noise, 1), length - 1)
    if not denoiser.mean:
        return noise, 1
    spans = int(np.rint(np.float32(noise) / np.float32(denoiser.mean)))
    # The last bound is ours: T5 fails where spans outnumber what stands between.
    return noise, min(max(spans, 1), noise, length - noise)


def noise_mask(num_tokens: int, denoiser: Denoiser, draws: np.ndarray) -> np.ndarray:
    """Returns bool[num_tokens], true on masked tokens.

    T5's `random_spans_noise_mask`: unmasked and masked spans take turns, unmasked
    first, and all masks with the counts of `span_counts` are equally likely.

    Args:
        num_tokens: at least 1.
        denoiser: how many are masked.
        draws: uint64[num_tokens] of random bits.
    """
    noise, spans = span_counts(num_tokens, denoiser)
    unmasked = max(num_tokens, 2) - noise
    if spans == 1 and denoiser.mode and denoiser.mean:
        place = np.arange(num_tokens) - 1 - int(draws[0]) % unmasked
        return (place >= 0) & (place < noise)
    ends = np.empty((spans, 2), np.int64)  # of each unmasked and masked span
    ends[:, 0] = ends[:, 1] = _segment_ends(noise, spans, draws[: noise - 1])
    unmasked_ends = _segment_ends(unmasked, spans, draws[noise - 1 :][: unmasked - 1])
    ends[1:, 0] = ends[:-1, 1]
    ends[0, 0] = 0
    ends += unmasked_ends[:, None]
    turns = np.zeros(ends[-1, 1] + 1, np.int8)
    turns[ends.ravel()] = 1
    return (np.cumsum(turns[:num_tokens]) & 1).astype(bool)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, vocabulary_size: int, eos_id: int
) -> Asked:
    """Returns inputs and targets of tokens, of which some are masked.

    T5's `noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel`, and
    the end after each. No sentinel stands for nothing at the end of targets; T5's
    masks have none there. The source of a sentinel is that of the first token that it
    stands for, and of the end that of the last.

    Args:
        tokens: int[n], at least one.
        mask: bool[n], true on masked tokens.
        vocabulary_size: V; sentinel i is V - 1 - i.
        eos_id: the end.
    """
    inputs, _ = _to_sentinels(tokens, mask, vocabulary_size)
    targets, sources = _to_sentinels(tokens, ~mask, vocabulary_size)
    if not mask[-1] and mask.any():
        targets, sources = targets[:-1], sources[:-1]
    sentinels = np.flatnonzero(~mask[sources])
    sources[sentinels] = sources[np.minimum(sentinels + 1, len(sources) - 1)]
    end = np.asarray([eos_id])
    return Asked(
        np.concatenate([inputs, end]),
        np.concatenate([targets, end]),
        np.concatenate([sources, sources[-1:]]),
    )


def prefix_length(num_tokens: int, *key: int) -> int:
    """Returns how many tokens of a row are given, uniform in [1, num_tokens - 1].

    T5's `random_prefix_noise_mask`. None of one token.
    """
    return 1 + below(num_tokens - 1, *key) if num_tokens > 1 else 0


def problems(data: DataSettings, vocabulary_size: int, extra_ids: int) -> list[str]:
    """Lists what keeps rows from being corrupted, each with numbers that would do.

    Args:
        data: its lengths are those of inputs and targets.
        vocabulary_size: V, with the extra ids.
        extra_ids: how many ids at its end stand for no text.
    """
    given = dict(data.task_feature_lengths)
    denoisers = _denoisers(data)
    if data.objective == "span_corruption":
        density, mean = data.noise_density, data.mean_noise_span_length
        if mean * (1 - density) < density:
            return [
                f"MEAN_NOISE_SPAN_LENGTH = {mean}: with NOISE_DENSITY = {density} "
                "there are fewer tokens left than spans to stand between: set it to "
                f"at least {density / (1 - density):.3g}"
            ]
    raw = _raw_length(data, denoisers)
    inputs, targets = zip(*(lengths(raw, d) for d in denoisers), strict=True)
    if raw < 2 or max(inputs) > given["inputs"] or max(targets) > given["targets"]:
        return [_unsuitable(data, given, denoisers)]
    modes = len(MODES) if data.objective == "ul2" else 0
    needed = modes + max(span_counts(raw, d)[1] for d in denoisers)
    if extra_ids < needed:
        what = f"{needed - modes} sentinels" + (f" and {modes} modes" if modes else "")
        return [
            f"EXTRA_IDS = {extra_ids}: rows of {raw} tokens need {what} with "
            f"TASK_FEATURE_LENGTHS = {given}: set it to at least {needed}, or the "
            "lengths lower, and prepare the store with it"
        ]
    if vocabulary_size <= extra_ids:
        return [
            f"EXTRA_IDS = {extra_ids}: a vocabulary of {vocabulary_size} has no room "
            "for them"
        ]
    return []


def _unsuitable(
    data: DataSettings, given: Mapping[str, int], denoisers: Sequence[Denoiser]
) -> str:
    """Says which lengths would suit."""
    inputs = max(given["inputs"], 1 + max(lengths(2, d)[0] for d in denoisers))
    if data.objective == "ul2":
        most = 2 * inputs + 3
        raw = _largest(most, lambda n: all(lengths(n, d)[0] <= inputs for d in UL2))
        suitable = {"inputs": inputs, "targets": max(lengths(raw, d)[1] for d in UL2)}
        return (
            f"TASK_FEATURE_LENGTHS = {dict(given)}: OBJECTIVE = 'ul2' does not fit: "
            f"use {suitable}"
        )
    density, mean = data.noise_density, data.mean_noise_span_length
    raw, targets = span_corruption_lengths(inputs, density, mean)
    suitable = {"inputs": inputs, "targets": targets}
    shorter = _largest(
        inputs,
        lambda n: span_corruption_lengths(n, density, mean)[1] <= given["targets"],
    )
    text = (
        f"TASK_FEATURE_LENGTHS = {dict(given)}: NOISE_DENSITY = {density} and "
        f"MEAN_NOISE_SPAN_LENGTH = {mean} turn {raw} tokens into inputs of {inputs} "
        f"and targets of {targets}: use {suitable}"
    )
    if span_corruption_lengths(shorter, density, mean)[0] < 2:
        return text
    return f"{text}, or { ({'inputs': shorter, 'targets': given['targets']}) }"


def _denoisers(data: DataSettings) -> tuple[Denoiser, ...]:
    if data.objective == "ul2":
        return UL2
    return (Denoiser(data.mean_noise_span_length, data.noise_density),)


def _raw_length(data: DataSettings, denoisers: Sequence[Denoiser]) -> int:
    """Stored tokens per row: the most that fit, whichever denoiser is drawn."""
    inputs, targets = (data.task_feature_lengths[f] for f in ("inputs", "targets"))
    if data.objective == "span_corruption":
        (only,) = denoisers
        return span_corruption_lengths(inputs, only.density, only.mean)[0]

    def fits(num_tokens: int) -> bool:
        pairs = [lengths(num_tokens, denoiser) for denoiser in denoisers]
        return all(i <= inputs and t <= targets for i, t in pairs)

    return _largest(inputs + targets, fits)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 2 to `most` that fits, all below it fitting too; or 1."""
    return 1 + bisect.bisect_left(range(2, most + 1), True, key=lambda n: not fits(n))


def _segment_ends(num_items: int, num_segments: int, draws: np.ndarray) -> np.ndarray:
    """Where non-empty segments of items end: the smallest draws choose the cuts."""
    ends = np.full(num_segments, num_items)
    if num_segments > 1:
        ends[:-1] = np.argpartition(draws, num_segments - 2)[: num_segments - 1] + 1
        ends.sort()
    return ends


def _to_sentinels(
    tokens: np.ndarray, mask: np.ndarray, vocabulary_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with one sentinel for each run of masked ones, and where each was."""
    begins = mask.copy()
    begins[1:] &= ~mask[:-1]
    kept = np.flatnonzero(begins | ~mask)
    begins = begins[kept]
    return np.where(begins, vocabulary_size - np.cumsum(begins), tokens[kept]), kept
