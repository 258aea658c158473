"""Batches of packed rows: the batch at an index is a function of that index.

Nothing is remembered between reads. Whoever reads which rows of a batch, on however
many hosts, in whatever order, the batch is the same.
"""

import dataclasses
import functools

import numpy as np

from tasks import objectives, packing
from tasks.permutation import permute
from tasks.store import TokenStore


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of batches that a run learns from.

    Row r of batch i is number i·batch_size + r of a sequence that visits every row of
    the split once per epoch; an epoch may end within a batch.

    Attributes:
        store: where the tokens are.
        split: which of its splits.
        length: L, tokens per row.
        batch_size: B, rows of a global batch.
        seed: of the order.
        shuffle: visit rows in an order keyed by seed and epoch; else as stored.
    """

    store: TokenStore
    split: str
    _: dataclasses.KW_ONLY
    length: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    @functools.cached_property
    def pack(self) -> packing.Pack:
        """Which pieces of which documents share a row."""
        return self.store.pack(self.split, self.length)

    @property
    def num_rows(self) -> int:
        """Rows of the split, and so of an epoch."""
        return self.pack.num_rows

    @property
    def tokens_per_epoch(self) -> int:
        """Real tokens, without padding."""
        return self.pack.num_tokens

    def read(self, data_index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows [start, stop) of global batch `data_index`.

        Args:
            data_index: which batch, from 0 on without end.
            start: first row, in [0, batch_size].
            stop: end of the rows, in [start, batch_size].
        Returns:
            int32[stop - start, L] under each name in `objectives.FEATURES`.
        Raises:
            ValueError: the rows are not in the batch, or `data_index` is negative.
            StoreError: the store is damaged.
        """
        _check(data_index, start, stop, self.batch_size)
        first = data_index * self.batch_size
        rows = self._rows(first + start, first + stop)
        return _read_rows(self.store, self.split, self.pack, rows)

    def _rows(self, start: int, stop: int) -> list[int | None]:
        """Which stored rows are numbers [start, stop) of the sequence."""
        rows: list[int | None] = []
        while start < stop:  # one turn for each epoch
            epoch, index = divmod(start, self.num_rows)
            count = min(stop - start, self.num_rows - index)
            visited = np.arange(index, index + count)
            if self.shuffle:
                visited = permute(visited, self.num_rows, self.seed, epoch)
            rows += visited.tolist()
            start += count
        return rows


@dataclasses.dataclass(frozen=True)
class HeldoutBatches:
    """One pass over a split in stored order: every row exactly once.

    Attributes:
        store: where the tokens are.
        split: which of its splits.
        length: L, tokens per row.
        batch_size: B, rows of a global batch; the last is filled with empty rows.
    """

    store: TokenStore
    split: str
    _: dataclasses.KW_ONLY
    length: int
    batch_size: int

    @functools.cached_property
    def pack(self) -> packing.Pack:
        """Which pieces of which documents share a row."""
        return self.store.pack(self.split, self.length)

    @property
    def num_rows(self) -> int:
        """Rows of the split that hold tokens."""
        return self.pack.num_rows

    @property
    def num_eval_batches(self) -> int:
        """Batches in the pass."""
        return -(-self.num_rows // self.batch_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Real tokens, without padding: the sum of all loss weights."""
        return self.pack.num_tokens

    def read(self, batch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows [start, stop) of a batch of the pass, as `Batches.read` does.

        Rows beyond the split are empty: every token, segment and weight is 0.
        """
        _check(batch, start, stop, self.batch_size)
        if batch >= self.num_eval_batches:
            raise ValueError(
                f"batch {batch} of a pass of {self.num_eval_batches} batches"
            )
        first = batch * self.batch_size
        rows = range(first + start, first + stop)
        return _read_rows(
            self.store,
            self.split,
            self.pack,
            [row if row < self.num_rows else None for row in rows],
        )


def heldout(
    store: TokenStore, split: str, *, length: int, batch_size: int
) -> HeldoutBatches:
    """Returns the pass over a held-out split."""
    return HeldoutBatches(store, split, length=length, batch_size=batch_size)


def _check(index: int, start: int, stop: int, batch_size: int) -> None:
    if index < 0 or not 0 <= start <= stop <= batch_size:
        raise ValueError(
            f"rows [{start}, {stop}) of batch {index}: a batch has rows 0 to "
            f"{batch_size}, and batches count from 0"
        )


def _read_rows(
    store: TokenStore, split: str, index: packing.Pack, rows: list[int | None]
) -> dict[str, np.ndarray]:
    """Reads packed rows; None is an empty one."""
    bounds = [
        np.zeros(1, np.int64)
        if row is None
        else index.pieces[index.rows[row] : index.rows[row + 1] + 1]
        for row in rows
    ]
    tokens_BL = np.zeros((len(rows), index.length), np.int32)
    begins_BL = np.zeros((len(rows), index.length), bool)
    ranges = store.read(split, [b[0] for b in bounds], [b[-1] for b in bounds])
    for tokens_L, begins_L, bound, tokens in zip(
        tokens_BL, begins_BL, bounds, ranges, strict=True
    ):
        tokens_L[: len(tokens)] = tokens
        begins_L[bound[:-1] - bound[0]] = True
    return objectives.language_model(
        tokens_BL, begins_BL, np.asarray([len(tokens) for tokens in ranges])
    )
