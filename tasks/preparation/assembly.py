"""From parts to the arrays of a store.

The files of an array are a grid that has nothing to do with the parts, so that the
store is the same however the work was cut. Each is written once, by any worker, and
its digest is kept when it is there.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from tasks import arrays, files
from tasks.arrays import ShardedArray
from tasks.manifest import SplitManifest
from tasks.preparation import gathering, parts
from tasks.preparation.gathering import Gathered
from tasks.store import sampled, split_path

_FILES_PER_JOB = 16


@dataclasses.dataclass(frozen=True, order=True)
class Job:
    """Some files of the token array of a feature.

    Attributes:
        task: the Task.
        split: its split.
        feature: which of its features.
        first: the first file.
        stop: the one after the last.
    """

    task: str
    split: str
    feature: str
    first: int
    stop: int


def jobs(found: Gathered) -> Iterator[Job]:
    """Yields the jobs that write the tokens of a split."""
    for feature in found.starts:
        num_files = -(-found.num_tokens(feature) // arrays.SHARD)
        for first in range(0, num_files, _FILES_PER_JOB):
            stop = min(first + _FILES_PER_JOB, num_files)
            yield Job(found.task, found.split, feature, first, stop)


def write(work: str, store_dir: str, job: Job, dtype: np.dtype) -> None:
    """Writes those files of a job that are not there yet."""
    task, split = job.task, job.split
    starts = gathering.kept(work, task, split, f"{job.feature}.starts")
    places = gathering.kept(work, task, split, "places")
    path = files.join(split_path(store_dir, task, split), job.feature, "tokens")
    array = ShardedArray(path, dtype, int(starts[-1]))
    kind = f"{job.feature}.tokens"
    load = functools.lru_cache(maxsize=2)(
        lambda part: gathering.part_array(
            work, task, split, places[part].tolist(), kind, dtype
        )
    )
    for file in range(job.first, job.stop):
        if files.read(_digest_path(work, job, file)) is not None:
            continue
        start, stop = array.bounds(file)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        after = int(np.searchsorted(starts, stop, side="left"))
        values = np.concatenate(
            [
                load(part)[max(start - starts[part], 0) : stop - starts[part]]
                for part in range(first, after)
            ]
        )
        array.write(file, values)
        digest = hashlib.sha256(values.astype("<u4").tobytes()).hexdigest()
        files.write(_digest_path(work, job, file), digest.encode())


def finish(work: str, store_dir: str, found: Gathered) -> SplitManifest:
    """Writes what a split has beside its tokens, and says what it holds."""
    path = split_path(store_dir, found.task, found.split)
    hashed = hashlib.sha256()
    digests = [
        _digest_path(work, job, file)
        for job in jobs(found)
        for file in range(job.first, job.stop)
    ]
    for digest in files.read_many(digests):
        assert digest is not None, "the jobs were done before"
        hashed.update(digest)
    documents = found.documents
    for feature in found.starts:
        offsets = _offsets(work, found, feature)
        hashed.update(
            _stream(files.join(path, feature, "offsets"), documents + 1, "i8", offsets)
        )
    languages = found.languages
    parts.refuse_too_many(list(languages))
    if set(languages) != {""}:
        numbers = {name: number for number, name in enumerate(languages)}
        of_documents = _language_numbers(work, found, numbers)
        _stream(files.join(path, "languages"), documents, "u2", of_documents)
    made = SplitManifest(
        documents=documents,
        tokens={feature: found.num_tokens(feature) for feature in found.starts},
        text_bytes=found.text_bytes,
        fingerprint=hashed.hexdigest()[:32],
        languages=languages if set(languages) != {""} else {},
        replaced_documents=found.replaced,
        removed=found.removed,
    )
    return sampled(path, made)


def counts(work: str, found: Gathered) -> np.ndarray:
    """Returns int64[V]: how often each token occurs in the targets of a split."""
    each = found.arrays(work, "counts", "i8")
    return sum(each, start=next(each).astype(np.int64))


def _offsets(work: str, found: Gathered, feature: str) -> Iterator[np.ndarray]:
    yield np.zeros(1, np.int64)
    for start, lengths in zip(
        found.starts[feature],
        found.arrays(work, f"{feature}.lengths", "u4"),
        strict=False,  # the last start is the end
    ):
        yield start + np.cumsum(lengths, dtype=np.int64)


def _language_numbers(
    work: str, found: Gathered, numbers: Mapping[str, int]
) -> Iterator[np.ndarray]:
    """Each document's language, from numbers of the part to numbers of the split."""
    for names, own in zip(
        found.language_names, found.arrays(work, "languages", "u2"), strict=True
    ):
        of_part = np.asarray([numbers[name] for name in names], np.int64)
        yield of_part[own] if len(own) else own.astype(np.int64)


def _stream(path: str, size: int, dtype: str, chunks: Iterable[np.ndarray]) -> bytes:
    """Writes an array that comes in pieces, and returns its digest."""
    array = ShardedArray(path, np.dtype(dtype), size)
    hashed = hashlib.sha256()
    waiting: list[np.ndarray] = []
    file, held = 0, 0
    for chunk in chunks:
        hashed.update(chunk.astype("<i8").tobytes())
        waiting.append(chunk)
        held += len(chunk)
        while file < array.num_shards and held >= np.diff(array.bounds(file))[0]:
            start, stop = array.bounds(file)
            values = np.concatenate(waiting)
            array.write(file, values[: stop - start].astype(dtype))
            waiting, held = [values[stop - start :]], len(values) - (stop - start)
            file += 1
    assert (file, held) == (array.num_shards, 0), "the pieces add up to the size"
    return hashed.digest()


def _digest_path(work: str, job: Job, file: int) -> str:
    folder = split_path(files.join(work, "assembly"), job.task, job.split)
    return files.join(folder, f"{job.feature}-{file:06}")
