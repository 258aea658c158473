"""Batches: the batch at an index is a function of that index.

Nothing is remembered between reads. Whoever reads which rows of a batch, on however
many hosts, in whatever order, the batch is the same.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from tasks import layouts, mixing
from tasks.draws import name_key
from tasks.errors import StoreError
from tasks.permutation import permute
from tasks.ramp import Sizes, sizes
from tasks.rows import TaskRows
from tasks.settings import DataSettings, MixtureSettings
from tasks.store import TokenStore


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is in one task.

    Attributes:
        rows: how many rows of it were read.
        epochs: how often it was read.
        tokens: how many stored tokens that is; exact after whole epochs.
    """

    rows: int
    epochs: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """The endless sequence of batches that a run learns from.

    Row r of batch i is number `sizes.before(i)` + r of a sequence of rows. The mixture
    says of which task each is, and its how many-th. A task's rows are visited once per
    epoch; an epoch may end within a batch.

    Attributes:
        tasks: rows of each.
        mixture: which of them each row is of.
        sizes: B, rows of every global batch.
        seed: seed for the order, and for what objectives draw.
        shuffle: visit rows in an order keyed by seed, task and epoch; else as stored.
    """

    tasks: tuple[TaskRows, ...]
    mixture: mixing.Mixture
    _: dataclasses.KW_ONLY
    sizes: Sizes
    seed: int = 0
    shuffle: bool = True

    @property
    def features(self) -> dict[str, int]:
        """L of what a batch holds, by name."""
        return layouts.features(self.tasks[0].data)

    @property
    def length(self) -> int:
        """L, tokens per row."""
        return self.tasks[0].data.length

    @property
    def tokens_per_epoch(self) -> int:
        """Stored tokens of all tasks, each once."""
        return sum(task.num_tokens for task in self.tasks)

    @property
    def padding_fraction(self) -> float:
        """The part of all positions that holds no token, in the first batches."""
        return float(
            sum(
                share * task.padding_fraction
                for share, task in zip(self.mixture.shares[0], self.tasks, strict=True)
                if share > 0
            )
        )

    def rows(self, task: str) -> int:
        """Returns how many rows an epoch of a task has."""
        (rows,) = (rows.num_rows for rows in self.tasks if rows.task == task)
        return rows

    def progress(self, data_index: int) -> dict[str, Progress]:
        """Returns how far batches [0, data_index) have got in each task."""
        counts = self.mixture.counts(self.sizes.before(data_index))
        found = {}
        for task, rows in zip(self.tasks, counts.tolist(), strict=True):
            epochs = rows / task.num_rows if rows else 0.0
            tokens = round(epochs * task.num_tokens) if rows else 0
            found[task.task] = Progress(rows, epochs, tokens)
        return found

    def read(self, data_index: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows [start, stop) of global batch `data_index`.

        Args:
            data_index: which batch, from 0 on without end.
            start: first row, in [0, B].
            stop: end of the rows, in [start, B].
        Returns:
            int32[stop - start, L] under each name in `features`; images are uint8.
        Raises:
            ValueError: the rows are not in the batch, or `data_index` is negative.
            StoreError: the store is damaged.
        """
        _check(data_index, start, stop, self.sizes.of(max(data_index, 0)))
        first = self.sizes.before(data_index)
        number, k = self.mixture.assign(first + start, first + stop)
        batch = {
            name: np.zeros((stop - start, length), layouts.type_of(name))
            for name, length in self.features.items()
        }
        for which in np.unique(number):
            task, place = self.tasks[which], np.flatnonzero(number == which)
            epochs, index = np.divmod(k[place], task.num_rows)
            rows = self._visited(task, epochs, index)
            for name, feature in task.read(rows, epochs, self.seed).items():
                batch[name][place] = feature
        return batch

    def _visited(
        self, task: TaskRows, epochs: np.ndarray, index: np.ndarray
    ) -> np.ndarray:
        """Which stored row each index of an epoch is."""
        if not self.shuffle:
            return index
        rows = np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            key = (self.seed, name_key(task.task), epoch)
            rows[now] = permute(index[now], task.num_rows, *key)
        return rows


@dataclasses.dataclass(frozen=True)
class HeldoutBatches:
    """One pass over a split in stored order: every row exactly once.

    Attributes:
        task: its rows.
        batch_size: B, rows of a global batch; the last is filled with empty rows.
        seed: seed for what objectives draw, the same in every pass.
    """

    task: TaskRows
    _: dataclasses.KW_ONLY
    batch_size: int
    seed: int = 0

    @property
    def features(self) -> dict[str, int]:
        """L of what a batch holds, by name."""
        return layouts.features(self.task.data)

    @property
    def num_rows(self) -> int:
        """Rows of the split that hold tokens."""
        return self.task.num_rows

    @property
    def num_eval_batches(self) -> int:
        """Batches in the pass."""
        return -(-self.num_rows // self.batch_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Stored tokens that the pass reads."""
        return self.task.num_tokens

    def read(self, batch: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows [start, stop) of a batch of the pass, as `Batches.read` does.

        Rows beyond the split are empty: every token, segment and weight is 0.
        """
        rows = self._rows(batch, start, stop)
        features = self.task.read(rows, np.zeros_like(rows), self.seed)
        empty = ((0, stop - start - len(rows)), (0, 0))
        return {name: np.pad(feature, empty) for name, feature in features.items()}

    def documents(self, batch: int, start: int, stop: int) -> np.ndarray:
        """Returns which stored document each scored target of `read` is of.

        Returns:
            int64[stop - start, L], -1 where no loss counts.
        """
        rows = self._rows(batch, start, stop)
        documents = self.task.documents(rows, np.zeros_like(rows), self.seed)
        empty = ((0, stop - start - len(rows)), (0, 0))
        return np.pad(documents, empty, constant_values=-1)

    def _rows(self, batch: int, start: int, stop: int) -> np.ndarray:
        """Those of the rows that the split has."""
        _check(batch, start, stop, self.batch_size)
        if batch >= self.num_eval_batches:
            raise ValueError(
                f"batch {batch} of a pass of {self.num_eval_batches} batches"
            )
        first = batch * self.batch_size
        return np.arange(first + start, min(first + stop, self.num_rows))


def training(
    store: TokenStore,
    data: DataSettings,
    mixture: MixtureSettings,
    *,
    batch_size: int,
    seed: int,
    ramp: tuple[tuple[int, int], ...] = (),
) -> Batches:
    """Returns the batches that a run learns from.

    Args:
        store: the tokens.
        data: what a row is.
        mixture: which Task each row is of.
        batch_size: B, rows of a global batch.
        seed: seed for the order, and for what objectives draw.
        ramp: sizes of earlier batches; see `TrainSettings`.

    Raises:
        StoreError: the store does not suit the objective, or the mixture not the
            store.
    """
    tasks = _task_rows(store, store.tasks, data.train_split, data)
    of_batches = sizes(batch_size, ramp)
    shares = _mixture(store, tasks, mixture, of_batches)
    learnt = [
        task for task, share in zip(tasks, shares.shares.T, strict=True) if share.any()
    ]
    if empty := [task.task for task in learnt if task.is_empty]:
        raise StoreError(
            f"TRAIN_SPLIT = {data.train_split!r} of {_listed(empty)} holds no tokens: "
            "set the rate in MIXTURE_RATES to 0"
        )
    return Batches(tasks, shares, sizes=of_batches, seed=seed, shuffle=data.shuffle)


def heldout(
    store: TokenStore, task: str, data: DataSettings, *, batch_size: int, seed: int
) -> HeldoutBatches:
    """Returns the pass over the held-out split of a task.

    Raises:
        StoreError: the store does not suit the objective, or has no such task.
    """
    (rows,) = _task_rows(store, (task,), data.heldout_split, data)
    if rows.is_empty:
        raise StoreError(
            f"HELDOUT_SPLIT = {data.heldout_split!r} of {task!r} holds no tokens"
        )
    return HeldoutBatches(rows, batch_size=batch_size, seed=seed)


def _task_rows(
    store: TokenStore, tasks: Iterable[str], split: str, data: DataSettings
) -> tuple[TaskRows, ...]:
    """The rows of a split of each task, if they suit the objective."""
    rows = tuple(TaskRows(task, store.split(task, split), data) for task in tasks)
    for row in rows:
        _ = row.maker, row.masking  # what keeps them from being made is said now
    if lacking := [r.task for r in rows if not {*r.features} <= {*r.part.features}]:
        raise StoreError(
            f"OBJECTIVE = {data.objective!r} needs the features "
            f"{_listed(rows[0].features)} of every Task, and {_listed(lacking)} lack "
            "some: choose another OBJECTIVE, or Tasks that have them"
        )
    return rows


def _mixture(
    store: TokenStore,
    tasks: tuple[TaskRows, ...],
    mixture: MixtureSettings,
    of_batches: Sizes,
) -> mixing.Mixture:
    """The mixture that settings ask for; schedules count in steps."""
    if mixture.schedule:
        return mixing.scheduled(
            {
                of_batches.before(step): _rates(
                    store, f"MIXTURE_SCHEDULE[{step}]", rates
                )
                for step, rates in mixture.schedule.items()
            }
        )
    if mixture.weighting == "proportional":
        sizes = [task.stored_tokens for task in tasks]
        return mixing.constant(
            mixing.proportional(
                sizes, temperature=mixture.temperature, cap=mixture.cap_tokens
            )
        )
    rates = mixture.rates or {
        name: store.manifest.tasks[name].rate for name in store.tasks
    }
    return mixing.constant(_rates(store, "MIXTURE_RATES", rates))


def _rates(store: TokenStore, macro: str, rates: Mapping[str, float]) -> list[float]:
    """The rate of each task of the store, in its order."""
    unknown = [name for name in rates if name not in store.tasks]
    missing = [name for name in store.tasks if name not in rates]
    if unknown or missing:
        parts = [f"{_listed(unknown)} are not in it"] if unknown else []
        parts += [f"{_listed(missing)} have no rate (0 leaves out)"] if missing else []
        raise StoreError(
            f"{macro} = {dict(rates)}: the store has the Tasks "
            f"{_listed(store.tasks)}; {', and '.join(parts)}"
        )
    return [float(rates[name]) for name in store.tasks]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _check(index: int, start: int, stop: int, batch_size: int) -> None:
    if index < 0 or not 0 <= start <= stop <= batch_size:
        raise ValueError(
            f"rows [{start}, {stop}) of batch {index}: a batch has rows 0 to "
            f"{batch_size}, and batches count from 0"
        )
