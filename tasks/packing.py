"""Which stored tokens share a row.

Next-fit: documents are cut into pieces of at most L tokens, and pieces fill rows in
stored order; a piece that does not fit the row begins the next one. So pieces tile
the stored tokens and rows tile the pieces, a row is one contiguous range of tokens,
and the whole index is two arrays of boundaries: a function of the documents' offsets
and of L alone, computed once and kept.

Pairs of inputs and targets are never cut in two; those that are too long lose their
ends, as SeqIO trims them.

A stream is cut every L tokens. Its rows need no index.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

_BLOCK = 1 << 20  # pieces at a time: bounds the memory of packing


@dataclasses.dataclass(frozen=True)
class Pack:
    """The rows of a split.

    Attributes:
        length: L, tokens per row.
        pieces: int64[P + 1]; piece p is the tokens [pieces[p], pieces[p + 1]). Of
            pairs: pair p is a piece, of the tokens that it keeps of both features.
        rows: int64[R + 1]; row r is the pieces [rows[r], rows[r + 1]).
    """

    length: int
    pieces: np.ndarray
    rows: np.ndarray

    @property
    def num_rows(self) -> int:
        """R, how many rows there are."""
        return len(self.rows) - 1

    @property
    def num_tokens(self) -> int:
        """How many tokens the rows hold."""
        return int(self.pieces[-1])

    @property
    def padding_fraction(self) -> float:
        """The part of all row positions that holds no token."""
        return 1.0 - self.num_tokens / (self.num_rows * self.length)

    def bounds(self, row: int) -> np.ndarray:
        """Returns where the pieces of a row begin, and the end of the last."""
        return self.pieces[self.rows[row] : self.rows[row + 1] + 1]


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that are cut from the stored tokens every L of them.

    Attributes:
        length: L, tokens per row; the last row may hold fewer.
        num_tokens: how many tokens the rows hold.
        offsets: int64[documents + 1]; pieces then end where documents do, so that
            none holds two. None: a row is one piece.
    """

    length: int
    num_tokens: int
    offsets: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """R, how many rows there are."""
        return -(-self.num_tokens // self.length)

    @property
    def padding_fraction(self) -> float:
        """The part of all row positions that holds no token."""
        return 1.0 - self.num_tokens / (self.num_rows * self.length)

    def bounds(self, row: int) -> np.ndarray:
        """Returns where the pieces of a row begin, and the end of the last."""
        start = row * self.length
        stop = min(start + self.length, self.num_tokens)
        if self.offsets is None:
            return np.asarray([start, stop])
        first = np.searchsorted(self.offsets, start, side="right")
        last = np.searchsorted(self.offsets, stop, side="left")
        inner = np.unique(self.offsets[first:last])  # empty documents begin nothing
        return np.concatenate([[start], inner, [stop]]).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Captions:
    """Rows of one document each, after the image that it belongs to.

    Attributes:
        length: most tokens of a document in its row; what is beyond is cut off.
        given: places before it.
        offsets: int64[documents + 1], where documents begin, and the end.
    """

    length: int
    given: int
    offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        """R, as many as documents."""
        return len(self.offsets) - 1

    @functools.cached_property
    def num_tokens(self) -> int:
        """How many tokens the rows hold, beside what is given."""
        return sum(
            int(np.minimum(np.diff(block), self.length).sum())
            for block in _bounded(self.offsets)
        )

    @property
    def padding_fraction(self) -> float:
        """The part of all row positions that holds no token and no patch."""
        held = self.num_tokens + self.num_rows * self.given
        return 1.0 - held / (self.num_rows * (self.length + self.given))

    def bounds(self, row: int) -> np.ndarray:
        """Returns where the document of a row begins, and the end of what is read."""
        start, stop = self.offsets[row : row + 2].tolist()
        return np.asarray([start, min(stop, start + self.length)])


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What pairs that are longer than their lengths lose.

    Attributes:
        examples: how many pairs lose tokens.
        tokens: how many tokens of each feature are lost.
    """

    examples: int
    tokens: Mapping[str, int]


def _in_memory(size: int) -> np.ndarray:
    return np.empty(size, np.int64)


def pack(
    offsets: np.ndarray, length: int, room: Callable[[int], np.ndarray] = _in_memory
) -> Pack:
    """Returns the rows of `length` tokens that documents at `offsets` fill.

    Args:
        offsets: int64[documents + 1], rising from 0; document d is the tokens
            [offsets[d], offsets[d + 1]).
        length: L, at least 1.
        room: gives int64[n] for the arrays of the index, which may be large.
    """
    num_pieces = sum(
        int((-(-np.diff(block) // length)).sum()) for block in _bounded(offsets)
    )
    pieces = room(num_pieces + 1)
    pieces[0], place = offsets[0], 1
    for block in _bounded(offsets):
        ends = _cut(block.astype(np.int64), length)
        pieces[place : place + len(ends)] = ends
        place += len(ends)
    return Pack(length, pieces, _fill(room, (pieces, length)))


def pack_pairs(
    offsets: Mapping[str, np.ndarray],
    lengths: Mapping[str, int],
    *,
    joined: bool,
    room: Callable[[int], np.ndarray] = _in_memory,
) -> Pack:
    """Returns the rows that pairs of inputs and targets fill, next-fit.

    Those of SeqIO's `trim_and_pack_dataset`, which however begins a new row after
    every `max(lengths)` pairs, full or not.

    Args:
        offsets: boundaries of the documents of each feature, as in `pack`.
        lengths: most tokens of each feature in a pair; what is beyond is cut off.
        joined: a row holds the inputs and targets of its pairs, together at most
            the sum of `lengths` tokens (a decoder alone); else at most
            `lengths[feature]` of each feature (encoder and decoder).
        room: as in `pack`.
    """
    ends = {
        feature: _trimmed_ends(offsets[feature], lengths[feature], room)
        for feature in ("inputs", "targets")
    }
    both, length = room(len(ends["inputs"])), sum(lengths.values())
    np.add(ends["inputs"], ends["targets"], out=both)
    limits = (
        [(both, length)]
        if joined
        else [(ends[feature], lengths[feature]) for feature in ends]
    )
    return Pack(length, both, _fill(room, *limits))


def truncation(
    offsets: Mapping[str, np.ndarray], lengths: Mapping[str, int]
) -> Truncation:
    """Counts what is cut off of documents that are longer than `lengths`."""
    names = tuple(lengths)
    examples, lost = 0, dict.fromkeys(names, 0)
    for blocks in zip(*(_bounded(offsets[name]) for name in names), strict=True):
        some = np.zeros(len(blocks[0]) - 1, bool)
        for name, block in zip(names, blocks, strict=True):
            over = np.maximum(np.diff(block) - lengths[name], 0)
            lost[name] += int(over.sum())
            some |= over > 0
        examples += int(some.sum())
    return Truncation(examples, lost)


def faults(index: Pack, num_tokens: int | None = None) -> list[str]:
    """Lists what keeps an index from being one, of `num_tokens` tokens if given."""
    pieces, rows = index.pieces, index.rows
    if len(pieces) < 2 or len(rows) < 2:
        return ["it has no rows"]
    found = []
    if pieces[0] != 0:
        found.append(f"its pieces begin at token {pieces[0]:,}")
    if num_tokens is not None and pieces[-1] != num_tokens:
        found.append(f"its pieces end at token {pieces[-1]:,}, not at {num_tokens:,}")
    if rows[0] != 0 or rows[-1] != len(pieces) - 1:
        found.append("its rows do not hold every piece")
    if any(
        (block[1:] <= block[:-1]).any()
        for bounds in (pieces, rows)
        for block in _bounded(bounds)
    ):
        found.append("its boundaries do not rise")
    elif not found and any(
        (np.diff(pieces[block]) > index.length).any() for block in _bounded(rows)
    ):
        found.append(f"a row holds more than {index.length} tokens")
    return found


def _bounded(bounds: np.ndarray) -> Iterator[np.ndarray]:
    """Boundaries in blocks, each of which begins with the last of the one before."""
    for start in range(0, len(bounds) - 1, _BLOCK):
        yield bounds[start : start + _BLOCK + 1]


def _trimmed_ends(
    offsets: np.ndarray, length: int, room: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Where documents begin that are cut to `length` tokens, and the end."""
    ends = room(len(offsets))
    ends[0], place = 0, 1
    for block in _bounded(offsets):
        kept = np.minimum(np.diff(block), length)
        following = ends[place : place + len(kept)]
        np.cumsum(kept, out=following)
        following += ends[place - 1]
        place += len(kept)
    return ends


def _fill(
    room: Callable[[int], np.ndarray], *limits: tuple[np.ndarray, int]
) -> np.ndarray:
    """Boundaries of the rows: each takes as many pieces as every limit allows.

    A limit is where pieces begin on some count, and the most of it in a row. The row
    that begins with piece i ends before the first piece that reaches too far.
    """
    num_pieces = len(limits[0][0]) - 1
    rows, num_rows, piece = room(num_pieces + 1), 0, 0
    rows[0] = 0
    while piece < num_pieces:
        first = piece
        stop = min(first + _BLOCK, num_pieces)
        following = np.minimum.reduce(
            [
                np.searchsorted(begin, begin[first:stop] + most, side="right") - 1
                for begin, most in limits
            ]
        ).tolist()
        block = []
        while piece < stop:
            piece = following[piece - first]
            block.append(piece)
        rows[num_rows + 1 : num_rows + 1 + len(block)] = block
        num_rows += len(block)
    return rows[: num_rows + 1]


def _cut(offsets: np.ndarray, length: int) -> np.ndarray:
    """Ends of the pieces: every L tokens of each document, and its end."""
    sizes = np.diff(offsets)
    sizes = sizes[sizes > 0]  # empty documents have no piece
    if not len(sizes):
        return sizes
    num_pieces = -(-sizes // length)
    last = np.cumsum(num_pieces) - 1  # the piece that ends each document
    ends = np.full(last[-1] + 1, length)
    ends[last] -= num_pieces * length - sizes
    ends[0] += offsets[0]
    return np.cumsum(ends, out=ends)
