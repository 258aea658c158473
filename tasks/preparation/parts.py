"""Parts: some of the documents of a unit, tokenised, as flat files.

A part is several files; its description is written last, and a part without one does
not count. Where a part ends depends on its documents alone, so a unit that is taken up
again gives the same parts.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tasks import files
from tasks.errors import StoreError
from tasks.preparation.plan import Unit
from tasks.store import split_path

MOST_LANGUAGES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Part:
    """What a finished part holds.

    Attributes:
        unit: what it is of.
        number: which part of it.
        consumed: documents of the unit that were read by its end.
        last: whether the unit ends with it.
        documents: how many it holds.
        tokens: number in each feature.
        text_bytes: bytes of UTF-8 that the tokens of "targets" stand for.
        digest: SHA-256 of its tokens and lengths.
        languages: documents, tokens and bytes of text by language.
        replaced: documents that were not UTF-8 and are kept.
        removed: documents that were left out, by reason.
    """

    unit: Unit
    number: int
    consumed: int
    last: bool
    documents: int
    tokens: Mapping[str, int]
    text_bytes: int
    digest: str
    languages: Mapping[str, tuple[int, int, int]]
    replaced: int
    removed: Mapping[str, int]


class PartWriter:
    """Collects the documents of a part.

    Args:
        work: folder of the preparation.
        unit: what the part is of.
        number: which part of it.
        types: integer type of each of the Task's features.
        size: V, of the vocabulary.
    """

    def __init__(
        self,
        work: str,
        unit: Unit,
        number: int,
        *,
        types: Mapping[str, np.dtype],
        size: int,
    ) -> None:
        self._path = _path(work, unit, number)
        self._unit, self._number = unit, number
        self._types, self._size = types, size
        self._ids: dict[str, list[np.ndarray]] = {f: [] for f in types}
        self._lengths: dict[str, list[int]] = {f: [] for f in types}
        self._languages: list[str] = []
        self._bytes_of: list[int] = []
        self.removed: dict[str, int] = {}
        self.replaced = 0
        self.text_bytes = 0

    @property
    def documents(self) -> int:
        """How many were added."""
        return len(self._languages)

    @property
    def tokens(self) -> int:
        """How many the targets of the documents have."""
        return sum(self._lengths["targets"])

    def remove(self, reason: str) -> None:
        """Counts a document that is left out."""
        self.removed[reason] = self.removed.get(reason, 0) + 1

    def add(
        self, ids: Mapping[str, np.ndarray], text_bytes: int, language: str
    ) -> None:
        """Adds a document, of each feature the tokens with their end."""
        for feature, tokens in ids.items():
            self._ids[feature].append(tokens)
            self._lengths[feature].append(len(tokens))
        self._languages.append(language)
        self._bytes_of.append(text_bytes)
        self.text_bytes += text_bytes

    def close(self, consumed: int, *, last: bool) -> Part:
        """Writes the files of the part, its description last, and returns that."""
        digest, tokens = hashlib.sha256(), {}
        for feature, ids in self._ids.items():
            dtype = self._types[feature]
            flat = np.concatenate([np.empty(0, dtype), *ids])
            lengths = np.asarray(self._lengths[feature], "<u4")
            tokens[feature] = len(flat)
            for kind, array in (
                ("tokens", flat.astype(dtype.newbyteorder("<"))),
                ("lengths", lengths),
            ):
                content = array.tobytes()
                digest.update(content)
                files.write(f"{self._path}.{feature}.{kind}", content)
            if feature == "targets":
                files.write(f"{self._path}.counts", self._counts(flat).tobytes())
        names = sorted(set(self._languages))
        refuse_too_many(names)
        places = {name: place for place, name in enumerate(names)}
        numbers = np.asarray([places[name] for name in self._languages], "<u2")
        files.write(f"{self._path}.languages", numbers.tobytes())
        part = Part(
            unit=self._unit,
            number=self._number,
            consumed=consumed,
            last=last,
            documents=self.documents,
            tokens=tokens,
            text_bytes=self.text_bytes,
            digest=digest.hexdigest(),
            languages=self._by_language(names),
            replaced=self.replaced,
            removed=dict(sorted(self.removed.items())),
        )
        text = json.dumps(dataclasses.asdict(part))
        files.write(f"{self._path}.json", text.encode())
        return part

    def _counts(self, flat: np.ndarray) -> np.ndarray:
        """How often each id occurs; in blocks, since NumPy widens what it counts."""
        counts_V = np.zeros(self._size, "<i8")
        for start in range(0, len(flat), 1 << 20):
            counts_V += np.bincount(
                flat[start : start + (1 << 20)], minlength=self._size
            )
        return counts_V

    def _by_language(self, names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
        found = dict.fromkeys(names, (0, 0, 0))
        for language, tokens, text_bytes in zip(
            self._languages, self._lengths["targets"], self._bytes_of, strict=True
        ):
            before = found[language]
            found[language] = (
                before[0] + 1,
                before[1] + tokens,
                before[2] + text_bytes,
            )
        return found


def refuse_too_many(languages: Sequence[str]) -> None:
    """Documents keep the number of their language in two bytes."""
    if len(languages) > MOST_LANGUAGES:
        raise StoreError(
            f"documents say more than {MOST_LANGUAGES:,} languages, such as "
            f"{languages[0]!r} and {languages[-1]!r}: choose a field for the language "
            "that holds one"
        )


def finished(work: str, unit: Unit) -> list[Part]:
    """Returns the finished parts of a unit, from the first to the first that lacks."""
    found: list[Part] = []
    while True:
        content = files.read(f"{_path(work, unit, len(found))}.json")
        if content is None:
            return found
        found.append(_described(content, work, unit, len(found)))
        if found[-1].last:
            return found


def numbers(work: str, unit: Unit) -> dict[int, int]:
    """Returns how many parts each shard of a unit's split has, by one listing.

    Those behind one that is missing do not count.
    """
    there: dict[int, set[int]] = {}
    for name in files.names(_folder(work, unit)):
        place, _, kind = name.partition(".")
        if kind == "json":
            shard, _, number = place.partition("-")
            there.setdefault(int(shard), set()).add(int(number))
    return {
        shard: next(n for n in range(len(of_shard) + 1) if n not in of_shard)
        for shard, of_shard in there.items()
    }


def descriptions(work: str, places: Sequence[tuple[Unit, int]]) -> Iterator[Part]:
    """Yields the parts of some units and numbers, whose files are read concurrently."""
    paths = [f"{_path(work, unit, number)}.json" for unit, number in places]
    found = files.read_many(paths)
    for content, path, (unit, number) in zip(found, paths, places, strict=True):
        if content is None:
            raise StoreError(f"{path} is gone: run the same command again")
        yield _described(content, work, unit, number)


def array(
    work: str, unit: Unit, number: int, kind: str, dtype: np.dtype | str
) -> np.ndarray:
    """Returns an array of a finished part of a unit, such as "targets.tokens"."""
    content = files.read(f"{_path(work, unit, number)}.{kind}")
    assert content is not None, f"part {unit} {number} lacks its {kind}"
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<"))


def _described(content: bytes, work: str, unit: Unit, number: int) -> Part:
    """The part that a file describes; which one it is, its place says alone."""
    try:
        return Part(**{**json.loads(content), "unit": unit, "number": number})
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{_path(work, unit, number)}.json cannot be read ({error}): delete "
            f"{work}, and prepare again"
        ) from None


def _path(work: str, unit: Unit, number: int) -> str:
    return files.join(_folder(work, unit), f"{unit.shard:06d}-{number:06d}")


def _folder(work: str, unit: Unit) -> str:
    """Where the parts of a unit's split are."""
    return split_path(files.join(work, "parts"), unit.task, unit.split)
