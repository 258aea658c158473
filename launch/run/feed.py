"""Batches on their devices before they are needed."""

import functools
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from moe.model.transformer import feature_axes
from partitioning import rules

Read = Callable[[int, int, int], dict[str, np.ndarray]]
DeviceBatch = dict[str, jax.Array]


def place_batch(
    read: Read, index: int, shape: tuple[int, int], sharding: jax.sharding.NamedSharding
) -> DeviceBatch:
    """Puts batch `index` on its devices; each host reads only its own rows.

    Args:
        read: `read(index, start, stop)` gives rows [start, stop) of the batch.
        index: which batch.
        shape: shape of the global batch, (B, L); other features may have another L.
        sharding: cuts its first dimension.
    """
    rows = functools.lru_cache(maxsize=None)(functools.partial(read, index))

    def piece(slices: tuple[slice, ...], feature: str) -> np.ndarray:
        start, stop, _ = slices[0].indices(shape[0])
        return rows(start, stop)[feature][:, slices[1]]

    own, *_ = sharding.addressable_devices_indices_map(shape).values()
    assert own is not None, "every process has devices"
    start, stop, _ = own[0].indices(shape[0])
    return {
        feature: jax.make_array_from_callback(
            (shape[0], array.shape[1]),
            _own_sharding(feature, sharding),
            functools.partial(piece, feature=feature),
        )
        for feature, array in rows(start, stop).items()
    }


def _own_sharding(
    feature: str, tokens: jax.sharding.NamedSharding
) -> jax.sharding.NamedSharding:
    """That of tokens, but where a feature has no places in a sequence."""
    if "length" in feature_axes(feature):
        return tokens
    mesh = tokens.mesh
    assert isinstance(mesh, jax.sharding.Mesh)
    return rules.sharding(mesh, feature_axes(feature))


class Feed:
    """Yields batches `start`, `start + 1`, … in order, read ahead on a thread.

    Args:
        read: as in `place_batch`.
        start: index of the first batch.
        stop: index after the last.
        shape: rows and length of the global batch, as in `place_batch`.
        rows: rows of each batch by its index; None has those of the shape in all.
        sharding: where it goes.
        depth: batches in flight at most; bounds memory.
    """

    def __init__(
        self,
        read: Read,
        *,
        start: int,
        stop: int,
        shape: tuple[int, int],
        sharding: jax.sharding.NamedSharding,
        rows: Callable[[int], int] | None = None,
        depth: int = 3,
    ) -> None:
        self.wait_seconds = 0.0  # in the last `next`

        def load(index: int) -> DeviceBatch:
            number = shape[0] if rows is None else rows(index)
            return place_batch(read, index, (number, shape[1]), sharding)

        self._load = load
        self._indices = iter(range(start, stop))
        self._depth = depth
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._pending: deque[Future[DeviceBatch]] = deque()

    def __enter__(self) -> "Feed":
        self._fill()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> DeviceBatch:
        if not self._pending:
            raise StopIteration
        began = time.perf_counter()
        batch = self._pending.popleft().result()
        self.wait_seconds = time.perf_counter() - began
        self._fill()
        return batch

    def _fill(self) -> None:
        while len(self._pending) < self._depth:
            index = next(self._indices, None)
            if index is None:
                return
            self._pending.append(self._pool.submit(self._load, index))
