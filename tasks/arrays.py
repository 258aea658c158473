"""One-dimensional integer arrays on disk: zarr3 in TensorStore, sharded, checksummed.

Reads decode whole inner chunks, so these are small; a file is a shard of many, so
files are few. Every chunk carries a checksum, and so does each shard's index.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore as ts

from tasks import files
from tasks.errors import StoreError

CHUNK = 16_384  # numbers that are decoded together
SHARD = 256 * CHUNK  # numbers in one file
_FIRST_PAUSE_SECONDS = 0.1  # before a failed read is tried again; then doubled
REMEDY = (
    "Copy the store again from where it is whole, or delete it and run "
    "`switchyard prepare`."
)

_context = None


def _shared_context() -> ts.Context:
    """One cache and few threads for every array: training needs the cores."""
    global _context
    if _context is None:
        _context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 128 << 20},
                "data_copy_concurrency": {"limit": 2},
                "file_io_concurrency": {"limit": 16},
            }
        )
    return _context


def write_array(path: str, values: np.ndarray) -> None:
    """Writes a whole array."""
    array = ShardedArray(path, values.dtype, len(values))
    for shard in range(array.num_shards):
        start, stop = array.bounds(shard)
        array.write(shard, values[start:stop])


class ShardedArray:
    """An array of known size whose shards are written in any order, by anyone.

    A shard is one file, and appears whole.
    """

    def __init__(self, path: str, dtype: np.dtype, size: int):
        """Describes the array; the description is the same whoever writes it first."""
        self._path, self._size = path, size
        with _explained(path):
            self._array = ts.open(
                _spec(path, np.dtype(dtype), size),
                create=True,
                open=True,
                context=ts.Context({"data_copy_concurrency": {"limit": 2}}),  # no cache
            ).result()

    @property
    def num_shards(self) -> int:
        """How many files it has when it is complete."""
        return -(-self._size // SHARD)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Returns the first number of a shard, and the one after its last."""
        return shard * SHARD, min((shard + 1) * SHARD, self._size)

    def write(self, shard: int, values: np.ndarray) -> None:
        """Writes one shard whole."""
        start, stop = self.bounds(shard)
        with _explained(self._path):
            files.answer(self._array[start:stop].write(values), self._path)


class Array:
    """An array that is only read.

    Attributes:
        path: its folder.
        size: how many numbers it holds.
        retries: how many failed reads were tried again so far.
    """

    def __init__(self, path: str, size: int | None = None, *, read_retries: int = 0):
        """Opens the array.

        Args:
            path: its folder.
            size: how many numbers it should hold, if that is known.
            read_retries: how often a failed read is tried again, after 0.1 s, 0.2 s,
                0.4 s and so on.
        Raises:
            StoreError: there is none, a file of it is missing, or its length is not
                `size`.
        """
        self.path = path
        self.retries = 0
        self._read_retries = read_retries
        try:
            opening = ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": files.kvstore(path),
                    "recheck_cached_data": "open",
                    "fill_missing_data_reads": False,  # what is gone is no zeros
                },
                open=True,
                context=_shared_context(),
            )
            self._array = files.answer(opening, path)
        except TimeoutError as error:
            raise StoreError(f"array {path} cannot be opened: {error}") from None
        except Exception as error:  # TensorStore raises several kinds
            what = "cannot be opened" if files.names(path) else "is missing"
            raise StoreError(
                f"array {path} {what}. {REMEDY}{_first_line(error)}"
            ) from None
        if fault := _fault(self._array):
            raise StoreError(f"array {path} {fault}. {REMEDY}")
        self.size = int(self._array.shape[0])
        if size is not None and self.size != size:
            raise StoreError(
                f"array {path} holds {self.size:,} numbers, but the manifest says "
                f"{size:,}. {REMEDY}"
            )
        # Better said now than in the middle of training.
        there = set(files.names(files.join(path, "c")))
        for shard in range(-(-self.size // SHARD)):
            if str(shard) not in there:
                raise StoreError(
                    f"array {path} lacks its file {_shard_file(path, shard)}. {REMEDY}"
                )

    def read(
        self, starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray
    ) -> list[np.ndarray]:
        """Returns the numbers [start, stop) of several ranges, read concurrently.

        Raises:
            StoreError: a chunk cannot be read, or its checksum is wrong, and that was
                still so when it was tried again.
        """
        futures = [
            self._array[int(start) : int(stop)].read()
            for start, stop in zip(starts, stops, strict=True)
        ]
        return [
            self._result(future, int(start), int(stop))
            for future, start, stop in zip(futures, starts, stops, strict=True)
        ]

    def read_all(self) -> np.ndarray:
        """Returns the whole array."""
        return self.read([0], [self.size])[0]

    def _result(self, future: ts.Future, start: int, stop: int) -> np.ndarray:
        """The numbers of one range, read again if that fails."""
        pause_seconds = _FIRST_PAUSE_SECONDS
        for attempt in range(self._read_retries + 1):
            try:
                return np.asarray(files.answer(future, self.path))
            except TimeoutError as error:
                raise StoreError(f"array {self.path}: {error}") from None
            except Exception as error:  # TensorStore raises several kinds
                if attempt == self._read_retries:
                    raise self._damage(start, stop, error) from None
            self.retries += 1
            time.sleep(pause_seconds)
            pause_seconds *= 2
            future = self._array[start:stop].read()
        raise AssertionError("the last attempt returned or raised")

    def _damage(self, start: int, stop: int, error: Exception) -> StoreError:
        first, last = start // SHARD, max(start, stop - 1) // SHARD
        named = " or ".join(
            _shard_file(self.path, shard) for shard in range(first, last + 1)
        )
        tried = f", tried {self._read_retries + 1} times" if self._read_retries else ""
        return StoreError(
            f"array {self.path} is damaged between {start:,} and {stop:,}: {named} "
            f"cannot be read or fails its checksum{tried}. {REMEDY}"
            f"{_first_line(error)}"
        )


def _fault(array: ts.TensorStore) -> str:
    """What keeps an array from being one of a store; "" if nothing does."""
    if array.rank != 1 or array.dtype.numpy_dtype.kind not in "iu":
        return f"holds {array.dtype.name} of rank {array.rank}, not a row of integers"
    if array.domain.origin != (0,):
        return f"begins at {array.domain.origin[0]:,}"
    cut = array.chunk_layout
    if _length(cut.read_chunk) > SHARD or _length(cut.write_chunk) > 16 * SHARD:
        return "is cut in pieces that no memory should have to hold"
    return ""


def _length(cut: ts.ChunkLayout.Grid) -> int:
    return (cut.shape or (0,))[0] or 0


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what TensorStore raises in writing into one line."""
    try:
        yield
    except Exception as error:  # several kinds
        raise StoreError(
            f"array {path} cannot be written: free some space, or choose another "
            f"STORE_DIR.{_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return f" (TensorStore: {files.reason(error)})"


def _shard_file(path: str, shard: int) -> str:
    return files.join(path, "c", str(shard))


def _spec(path: str, dtype: np.dtype, size: int) -> dict[str, object]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    bytes_codec = little_endian if dtype.itemsize > 1 else {"name": "bytes"}
    return {
        "driver": "zarr3",
        "kvstore": files.kvstore(path),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [size],
            "data_type": dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD]},
            },
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [CHUNK],
                        "codecs": [
                            bytes_codec,
                            {"name": "zstd", "configuration": {"level": 3}},
                            {"name": "crc32c"},
                        ],
                        "index_codecs": [little_endian, {"name": "crc32c"}],
                    },
                }
            ],
            "fill_value": 0,
        },
    }
