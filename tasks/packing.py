"""Which pieces of which documents share a row of L tokens.

Documents are cut into pieces of at most L tokens, and pieces fill rows in stored
order, next-fit: a piece that does not fit the row begins the next one. So pieces tile
the token stream and rows tile the pieces, a row is one contiguous range of tokens,
and the whole index is two arrays of boundaries: a function of the documents' offsets
and of L alone.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pack:
    """The rows of a split.

    Attributes:
        length: L, tokens per row.
        pieces: int64[P + 1]; piece p is the tokens [pieces[p], pieces[p + 1]).
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
        """How many tokens the rows hold, all of the split's."""
        return int(self.pieces[-1])

    @property
    def padding_fraction(self) -> float:
        """The part of all row positions that holds no token."""
        return 1.0 - self.num_tokens / (self.num_rows * self.length)


def pack(offsets: np.ndarray, length: int) -> Pack:
    """Returns the rows of `length` tokens that documents at `offsets` fill.

    Args:
        offsets: int64[documents + 1], rising from 0; document d is the tokens
            [offsets[d], offsets[d + 1]).
        length: L, at least 1.
    """
    pieces = _cut(offsets.astype(np.int64), length)
    # The row that begins with piece i ends before the first piece that reaches
    # beyond pieces[i] + length.
    following = np.searchsorted(pieces, pieces[:-1] + length, side="right") - 1
    next_row = following.tolist()
    rows, piece = [0], 0
    while piece < len(next_row):
        piece = next_row[piece]
        rows.append(piece)
    return Pack(length, pieces, np.asarray(rows, dtype=np.int64))


def faults(index: Pack, num_tokens: int) -> list[str]:
    """Lists what keeps an index from being one of `num_tokens` tokens."""
    pieces, rows = index.pieces, index.rows
    if len(pieces) < 2 or len(rows) < 2:
        return ["it has no rows"]
    found = []
    if pieces[0] != 0 or pieces[-1] != num_tokens:
        found.append(f"its pieces end at token {pieces[-1]:,}, not at {num_tokens:,}")
    if rows[0] != 0 or rows[-1] != len(pieces) - 1:
        found.append("its rows do not hold every piece")
    if (np.diff(pieces) < 1).any() or (np.diff(rows) < 1).any():
        found.append("its boundaries do not rise")
    elif not found and (np.diff(pieces[rows]) > index.length).any():
        found.append(f"a row holds more than {index.length} tokens")
    return found


def _cut(offsets: np.ndarray, length: int) -> np.ndarray:
    """Boundaries of the pieces: each document's start, and every L tokens after it."""
    sizes = np.diff(offsets)
    num_pieces = -(-sizes // length)  # empty documents have none
    document = np.repeat(np.arange(len(sizes)), num_pieces)
    first = np.cumsum(num_pieces) - num_pieces
    place = np.arange(len(document)) - first[document]
    starts = offsets[:-1][document] + place * length
    return np.append(starts, offsets[-1])
