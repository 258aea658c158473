"""One-dimensional integer arrays on disk: zarr3 in TensorStore, sharded, checksummed.

Reads decode whole inner chunks, so these are small; a file is a shard of many, so
files are few. Every chunk carries a checksum, and so does each shard's index.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from tasks.errors import StoreError

CHUNK = 16_384  # numbers that are decoded together
SHARD = 256 * CHUNK  # numbers in one file
_MAX_SIZE = 2**50
_REMEDY = (
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


class ArrayWriter:
    """Appends to a new array, one whole shard at a time."""

    def __init__(self, path: Path, dtype: np.dtype):
        """Creates the array; nothing may be there yet."""
        self._path = path
        with self._explained():
            self._array = ts.open(
                _spec(path, np.dtype(dtype)), create=True, context=_shared_context()
            ).result()
        self._dtype = np.dtype(dtype)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._size = 0

    def append(self, values: np.ndarray) -> None:
        """Adds values at the end; they reach the disk a shard at a time."""
        self._waiting.append(np.asarray(values, dtype=self._dtype))
        self._num_waiting += len(values)
        if self._num_waiting >= SHARD:
            self._write(whole_shards_only=True)

    def close(self) -> None:
        """Writes what is left and gives the array its final length."""
        self._write(whole_shards_only=False)
        with self._explained():
            self._array.resize(
                exclusive_max=[self._size], resize_metadata_only=True
            ).result()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what TensorStore raises into one line."""
        try:
            yield
        except Exception as error:  # several kinds
            raise StoreError(
                f"array {self._path} cannot be written: free some space, or choose "
                f"another STORE_DIR.{_first_line(error)}"
            ) from None

    def _write(self, *, whole_shards_only: bool) -> None:
        values = np.concatenate([np.empty(0, self._dtype), *self._waiting])
        count = len(values)
        if whole_shards_only:
            count -= count % SHARD
        for start in range(0, count, SHARD):
            part = values[start : min(start + SHARD, count)]
            at = self._size
            with self._explained():
                self._array[at : at + len(part)].write(part).result()
            self._size += len(part)
        self._waiting = [values[count:]]
        self._num_waiting = len(values) - count


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes a whole array."""
    writer = ArrayWriter(path, values.dtype)
    writer.append(values)
    writer.close()


class Array:
    """An array that is only read."""

    def __init__(self, path: Path, size: int | None = None):
        """Opens the array.

        Raises:
            StoreError: there is none, a file of it is missing, or its length is not
                `size`.
        """
        self.path = path
        try:
            self._array = ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": _files(path),
                    "recheck_cached_data": "open",
                },
                open=True,
                context=_shared_context(),
            ).result()
        except Exception as error:  # TensorStore raises several kinds
            what = "is missing" if not path.exists() else "cannot be opened"
            raise StoreError(
                f"array {path} {what}. {_REMEDY}{_first_line(error)}"
            ) from None
        self.size = int(self._array.shape[0])
        if size is not None and self.size != size:
            raise StoreError(
                f"array {path} holds {self.size:,} numbers, but the manifest says "
                f"{size:,}. {_REMEDY}"
            )
        # A missing file would read as zeros.
        for shard in range(-(-self.size // SHARD)):
            if not _shard_file(path, shard).is_file():
                raise StoreError(
                    f"array {path} lacks its file {_shard_file(path, shard)}. {_REMEDY}"
                )

    def read(
        self, starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray
    ) -> list[np.ndarray]:
        """Returns the numbers [start, stop) of several ranges, read concurrently.

        Raises:
            StoreError: a chunk cannot be read, or its checksum is wrong.
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
        try:
            return np.asarray(future.result())
        except Exception as error:  # TensorStore raises several kinds
            first, last = start // SHARD, max(start, stop - 1) // SHARD
            files = " or ".join(
                str(_shard_file(self.path, shard)) for shard in range(first, last + 1)
            )
            raise StoreError(
                f"array {self.path} is damaged between {start:,} and {stop:,}: "
                f"{files} cannot be read or fails its checksum. {_REMEDY}"
                f"{_first_line(error)}"
            ) from None


def _first_line(error: Exception) -> str:
    """The cause in TensorStore's words, cut before its dump of the specification."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    line = line.split(" [tensorstore_spec=")[0].split(" [source locations=")[0]
    return f" (TensorStore: {line[:200]})"


def _files(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}


def _shard_file(path: Path, shard: int) -> Path:
    return path / "c" / str(shard)


def _spec(path: Path, dtype: np.dtype) -> dict[str, object]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    bytes_codec = little_endian if dtype.itemsize > 1 else {"name": "bytes"}
    return {
        "driver": "zarr3",
        "kvstore": _files(path),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": [_MAX_SIZE],
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
