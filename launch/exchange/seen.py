"""What a model makes of a few tokens, layer by layer; and in what two models differ."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.exchange.family import ExchangeError
from launch.exchange.writing import writing

ROWS, LENGTH = 2, 12
FINGERPRINT = "fingerprint.npz"
EMBEDDED = "{} embedding"  # of a stack, what its lowest layer reads
_COLUMNS = 64  # of a row of numbers, how many a fingerprint keeps
_LOGITS = "logits"
_MOST_BYTES = 2**28
# What NumPy and the standard library say of a file that is not what was written.
_DAMAGE = (
    *(OSError, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, OverflowError),
)

Tokens = Mapping[str, np.ndarray]  # int32[B, L] of each stack


class Seen(NamedTuple):
    """What a model makes of tokens.

    Attributes:
        streams: float32[T, M], the residual stream above each layer, by names such as
            "decoder layer 3", the lowest first.
        choices: bool[T, E], whom each token chose, of the sparse layers.
        logits: float32[T, V].
        sampled: whether of M and V only some columns are there.
    """

    streams: dict[str, np.ndarray]
    choices: dict[str, np.ndarray]
    logits: np.ndarray
    sampled: bool = False


class Difference(NamedTuple):
    """How far two are apart.

    Attributes:
        logits: largest difference of logits.
        largest: largest logit.
        same: choices of experts that are the same.
        chosen: choices of experts.
        first: the lowest place where they differ by more than is allowed; "" for none.
        there: largest difference there, over the largest number there.
    """

    logits: float
    largest: float
    same: int
    chosen: int
    first: str
    there: float

    @property
    def relative(self) -> float:
        """Largest difference of logits, over the largest logit."""
        return self.logits / max(self.largest, 1e-30)

    def __str__(self) -> str:
        """Says it in a line."""
        chosen = f"; {self.same:,} of {self.chosen:,} choices of experts agree"
        first = f"; first at {self.first}, by {self.there:.1e}" if self.first else ""
        return (
            f"logits differ by {self.logits:.1e} at most, {self.relative:.1e} of the "
            f"largest{chosen if self.chosen else ''}{first}"
        )


def tokens_for(stacks: Iterable[str], vocab_size: int) -> Tokens:
    """Returns the tokens that models are compared on, the same for the same model.

    Args:
        stacks: names of the model's stacks.
        vocab_size: V.
    Returns:
        int32[ROWS, LENGTH] of each stack.
    """
    draw = np.random.default_rng(0)
    lowest = min(3, vocab_size - 1)  # padding and the like are below
    return {
        name: draw.integers(lowest, vocab_size, (ROWS, LENGTH), np.int32)
        for name in stacks
    }


def difference(one: Seen, other: Seen, allowed: float) -> Difference:
    """Compares what two models make of the same tokens.

    Args:
        one: the model that is right.
        other: the model that may be wrong.
        allowed: difference over the largest number, up to which both are the same.
    Raises:
        ExchangeError: they have other layers, or layers of other shapes.
    """
    one, other = _alike(one, other)
    first, there = "", 0.0
    others = {**other.streams, _LOGITS: other.logits}
    for place, right in {**one.streams, _LOGITS: one.logits}.items():
        found = _apart(right, others[place])
        largest = max(float(np.abs(right).max()), 1e-30)
        if not found <= allowed * largest and not first:
            first, there = place, found / largest
    same = chosen = 0
    for place, choice in one.choices.items():
        chosen += int(choice.sum())
        same += int((choice & other.choices[place]).sum())
    return Difference(
        logits=_apart(one.logits, other.logits),
        largest=float(np.abs(one.logits).max()),
        same=same,
        chosen=chosen,
        first=first,
        there=there,
    )


def _alike(one: Seen, other: Seen) -> tuple[Seen, Seen]:
    """Returns two of one shape, sampled if one of them is."""
    if one.sampled or other.sampled:
        one, other = sampled(one), sampled(other)
    left, right = _shapes(one), _shapes(other)
    places = [at for at in left | right if left.get(at) != right.get(at)]
    if places:
        at = places[0]
        raise ExchangeError(
            f"they are other models, in {len(places)} of {len(left | right)} shapes, "
            f"the first that of {at}: {left.get(at, 'none')} and "
            f"{right.get(at, 'none')}"
        )
    return one, other


def _shapes(seen: Seen) -> dict[str, tuple[int, ...]]:
    choices = {f"the choices of {at}": x.shape for at, x in seen.choices.items()}
    streams = {at: x.shape for at, x in seen.streams.items()}
    return streams | choices | {_LOGITS: seen.logits.shape}


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference; infinite where one is no number."""
    apart = float(np.abs(one.astype(np.float32) - other.astype(np.float32)).max())
    return apart if np.isfinite(apart) else float("inf")


# ----------------------------------------------------------------------- fingerprints


def sampled(seen: Seen) -> Seen:
    """Keeps some columns, spread evenly."""
    if seen.sampled:
        return seen
    return Seen(
        {place: _some(stream) for place, stream in seen.streams.items()},
        seen.choices,
        _some(seen.logits),
        sampled=True,
    )


def _some(values: np.ndarray) -> np.ndarray:
    last = values.shape[-1] - 1
    columns = np.unique(np.linspace(0, last, min(_COLUMNS, last + 1)).round())
    return values[..., columns.astype(int)]


def keep(folder: Path, seen: Seen) -> None:
    """Writes a fingerprint, by which another machine knows the model again."""
    few = sampled(seen)
    arrays: dict[str, Any] = {f"stream/{place}": x for place, x in few.streams.items()}
    arrays |= {f"choice/{place}": np.packbits(x) for place, x in few.choices.items()}
    arrays |= {f"shape/{place}": np.array(x.shape) for place, x in few.choices.items()}
    file = io.BytesIO()
    np.savez_compressed(file, logits=few.logits, **arrays)
    with writing(folder / FINGERPRINT):
        (folder / FINGERPRINT).write_bytes(file.getvalue())


def kept(folder: Path) -> Seen | None:
    """Reads a fingerprint; None if there is none.

    Raises:
        ExchangeError: it is damaged.
    """
    path = folder / FINGERPRINT
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as listed:
            if sum(one.file_size for one in listed.infolist()) > _MOST_BYTES:
                raise ValueError("it is too large")
        with np.load(path, allow_pickle=False) as arrays:
            streams, choices = {}, {}
            for name in arrays.files:
                kind, _, place = name.partition("/")
                if kind == "stream":
                    streams[place] = arrays[name]
                elif kind == "choice":
                    T, E = map(int, arrays[f"shape/{place}"])
                    bits = np.unpackbits(arrays[name])[: T * E]
                    choices[place] = bits.reshape(T, E).astype(bool)
            return Seen(streams, choices, arrays[_LOGITS], sampled=True)
    except _DAMAGE as error:
        raise ExchangeError(f"{path} is damaged: {error}") from error
