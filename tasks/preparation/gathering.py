"""All parts of a split, in their order, as a few arrays.

A corpus of terabytes has hundreds of thousands of parts. Their descriptions are read
once, many at a time; workers read arrays of where the tokens of parts begin.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tasks import files
from tasks.errors import StoreError
from tasks.manifest import LanguageManifest
from tasks.preparation import parts
from tasks.preparation.plan import Plan, Unit
from tasks.store import split_path
from tasks.vocabularies import Vocabulary

_AT_ONCE = 1024  # descriptions that are held as such


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What the parts of a split hold.

    Attributes:
        task: the Task.
        split: its split.
        places: int32[P, 2], shard and number of each part.
        starts: int64[P + 1] for each feature: where the tokens of each part begin, and
            the end.
        documents: how many there are.
        text_bytes: bytes of UTF-8 that the tokens of "targets" stand for.
        replaced: documents that were not UTF-8 and are kept.
        removed: documents that were left out, by reason.
        language_names: of the documents of each part.
        languages: counts by language, in the order of the names.
    """

    task: str
    split: str
    places: np.ndarray
    starts: Mapping[str, np.ndarray]
    documents: int
    text_bytes: int
    replaced: int
    removed: Mapping[str, int]
    language_names: Sequence[tuple[str, ...]]
    languages: Mapping[str, LanguageManifest]

    def num_tokens(self, feature: str) -> int:
        """How many tokens a feature has."""
        return int(self.starts[feature][-1])

    def arrays(
        self, work: str, kind: str, dtype: np.dtype | str
    ) -> Iterator[np.ndarray]:
        """Yields an array of each part, such as "targets.lengths"."""
        for place in self.places.tolist():
            yield part_array(work, self.task, self.split, place, kind, dtype)


def gather(work: str, plan: Plan, task: str, split: str) -> Gathered:
    """Returns all parts of a split, and keeps where they begin for workers.

    Raises:
        StoreError: some are not finished, or nothing is in them.
    """
    places: list[tuple[int, int]] = []
    tokens: dict[str, list[int]] = {f: [0] for f in plan.features[task]}
    names: list[tuple[str, ...]] = []
    same: dict[tuple[str, ...], tuple[str, ...]] = {}  # most parts have the same names
    languages: dict[str, np.ndarray] = {}
    removed: dict[str, int] = {}
    documents = text_bytes = replaced = 0
    units = [unit for unit in plan.units(split) if unit.task == task]
    for part in _all_finished(work, units):
        places.append((part.unit.shard, part.number))
        for feature, sizes in tokens.items():
            sizes.append(part.tokens[feature])
        of_part = tuple(part.languages)
        names.append(same.setdefault(of_part, of_part))
        for name, counts in part.languages.items():
            languages[name] = languages.get(name, 0) + np.asarray(counts)
        for reason, number in part.removed.items():
            removed[reason] = removed.get(reason, 0) + number
        documents += part.documents
        text_bytes += part.text_bytes
        replaced += part.replaced
    removed = dict(sorted(removed.items()))
    if not documents:
        why = ", ".join(f"{n:,} {reason}" for reason, n in removed.items())
        raise StoreError(
            f"split {split!r} of task {task!r} holds no text "
            f"({why or 'no documents at all'}): a split needs some"
        )
    found = Gathered(
        task=task,
        split=split,
        places=np.asarray(places, "<i4"),
        starts={f: np.cumsum(sizes, dtype="<i8") for f, sizes in tokens.items()},
        documents=documents,
        text_bytes=text_bytes,
        replaced=replaced,
        removed=removed,
        language_names=names,
        languages={
            name: LanguageManifest(*languages[name].tolist())
            for name in sorted(languages)
        },
    )
    files.write(_path(work, task, split, "places"), found.places.tobytes())
    for feature, starts in found.starts.items():
        files.write(_path(work, task, split, f"{feature}.starts"), starts.tobytes())
    kept.cache_clear()
    return found


@functools.lru_cache(maxsize=4)
def kept(work: str, task: str, split: str, name: str) -> np.ndarray:
    """Returns "places" or "FEATURE.starts" of a split that was gathered.

    Read once by each process, whatever the number of its jobs.
    """
    content = files.read(_path(work, task, split, name))
    assert content is not None, "the parts were gathered before"
    if name == "places":
        return np.frombuffer(content, "<i4").reshape(-1, 2)
    return np.frombuffer(content, "<i8")


def part_array(
    work: str,
    task: str,
    split: str,
    place: Sequence[int] | np.ndarray,
    kind: str,
    dtype: np.dtype | str,
) -> np.ndarray:
    """Returns an array of the part at a place, its shard and its number."""
    shard, number = place
    return parts.array(work, Unit(task, split, int(shard)), int(number), kind, dtype)


def refuse_what_stands_for_no_text(
    work: str, found: Gathered, vocabulary: Vocabulary, named: str
) -> None:
    """Refuses a split whose tokens all decode to nothing: there is nothing to score.

    Args:
        work: folder of the preparation.
        found: the split.
        vocabulary: that its tokens are of.
        named: the setting VOCABULARY.
    Raises:
        StoreError: every token is an unknown or another special one.
    """
    for counts_V in found.arrays(work, "counts", "i8"):
        used = np.flatnonzero(counts_V)
        if vocabulary.decode(used[used != vocabulary.eos_id]):
            return
    raise StoreError(
        f"split {found.split!r} of task {found.task!r} becomes "
        f"{found.num_tokens('targets'):,} tokens of VOCABULARY = {named!r} that stand "
        f"for no text, though its {found.documents:,} documents hold "
        f"{found.text_bytes:,} bytes: the vocabulary knows nothing of it, so choose "
        "one that does, such as 'sentencepiece'"
    )


def _all_finished(work: str, units: Sequence[Unit]) -> Iterator[parts.Part]:
    """The parts of units in order; all of each must be there."""
    there = parts.numbers(work, units[0]) if units else {}
    described = (
        (unit, number) for unit in units for number in range(there.get(unit.shard, 0))
    )
    ended = -1  # the place in `units` of the last that is whole
    while some := list(itertools.islice(described, _AT_ONCE)):
        for part in parts.descriptions(work, some):
            if units[ended + 1] != part.unit:
                raise _unfinished(units[ended + 1])
            yield part
            ended += part.last
    if ended + 1 < len(units):
        raise _unfinished(units[ended + 1])


def _unfinished(unit: Unit) -> StoreError:
    return StoreError(
        f"shard {unit.shard} of split {unit.split!r} of task {unit.task!r} is not "
        "finished: run the same command again"
    )


def _path(work: str, task: str, split: str, name: str) -> str:
    return files.join(split_path(files.join(work, "assembly"), task, split), name)
