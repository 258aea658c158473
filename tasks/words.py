"""Where words and entities begin in rows of tokens, so that they can be masked whole.

ERNIE (arXiv:1904.09223, section 3.2; arXiv:2107.02137, section 3.2.1) masks phrases and
entities, not the pieces that a vocabulary cuts them into.
"""

import dataclasses
import functools
import unicodedata

import numpy as np

from tasks import files
from tasks.errors import StoreError
from tasks.vocabularies import Vocabulary

# What text has before an entity, which may change its tokens.
_BEFORE = ("", " ", "(")
# Characters that are words by themselves: kana and Han, which no spaces divide.
_UNDIVIDED = range(0x3000, 0xA000)


@dataclasses.dataclass(frozen=True)
class Units:
    """What is masked as one.

    A word is a run of letters, digits and marks; any other token is a unit of its own.
    An entity is a run of whole words.

    Attributes:
        joins_V: bool[V], whether a token goes on with a word that is before it.
        ends_V: bool[V], whether a token ends within a word.
        entities: tokens of each entity.
        lengths: numbers of tokens of the entities that begin with a token, by that
            token, the longest first.
    """

    joins_V: np.ndarray
    ends_V: np.ndarray
    entities: frozenset[tuple[int, ...]] = frozenset()
    lengths: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Returns bool[n], true where a unit begins; of entities the longest."""
        begins = np.ones(len(tokens) + 1, bool)
        begins[1:-1] = ~(self.ends_V[tokens[:-1]] & self.joins_V[tokens[1:]])
        starts = np.isin(tokens, list(self.lengths)) & begins[:-1]
        stop = 0
        for place in np.flatnonzero(starts).tolist():
            if place < stop:
                continue
            for length in self.lengths[int(tokens[place])]:
                end = place + length
                if end > len(tokens) or not begins[end]:
                    continue
                if tuple(tokens[place:end].tolist()) in self.entities:
                    begins[place + 1 : end] = False
                    stop = end
                    break
        return begins[:-1]


@functools.lru_cache(maxsize=4)  # every split of every Task has the same
def units(vocabulary: Vocabulary, path: str, most: int) -> Units:
    """Returns the units of a vocabulary, with the entities that a file lists.

    Args:
        vocabulary: mapping between tokens and text.
        path: UTF-8 text with an entity on each line; "" has none.
        most: tokens of the longest entity that can be masked in a row.
    Raises:
        ValueError: the file is not there, or an entity in it can never be masked.
    """
    joins_V, ends_V = _within_words(vocabulary)
    found = _entities(vocabulary, path, most) if path else frozenset()
    lengths: dict[int, set[int]] = {}
    for entity in found:
        lengths.setdefault(entity[0], set()).add(len(entity))
    longest = {i: tuple(sorted(n, reverse=True)) for i, n in lengths.items()}
    return Units(joins_V, ends_V, found, longest)


def _within_words(vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Whether each id begins within a word, and whether it ends within one."""
    joins_V, ends_V = np.zeros((2, vocabulary.size), bool)
    # After another token, since some vocabularies take a text's first space away.
    before = vocabulary.encode("a")
    known = len(vocabulary.decode(before))
    for token in range(vocabulary.size - vocabulary.extra_ids):
        text = vocabulary.decode([*before, token])[known:]
        joins_V[token] = _is_of_word(text[:1])
        ends_V[token] = _is_of_word(text[-1:])
    return joins_V, ends_V


def _is_of_word(character: str) -> bool:
    """Whether a character, or a part of one, goes on with a word."""
    if not character or ord(character) in _UNDIVIDED:
        return False
    return character == "\ufffd" or unicodedata.category(character)[0] in "LMN"


def _entities(
    vocabulary: Vocabulary, path: str, most: int
) -> frozenset[tuple[int, ...]]:
    """The tokens of each entity, as they are at the start of a text and within it."""
    said = f"ENTITIES = {path!r}"
    try:
        content = files.read(path)
    except StoreError as error:
        raise ValueError(f"{said}: {error}") from error
    if content is None:
        raise ValueError(f"{said}: there is no such file")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{said} is not UTF-8, at byte {error.start:,}") from error
    found: set[tuple[int, ...]] = set()
    for number, line in enumerate(lines, 1):
        if not (entity := line.strip()):
            continue
        all_shapes = {_without(vocabulary, start, entity) for start in _BEFORE}
        shapes = {shape for shape in all_shapes if vocabulary.decode(shape).strip()}
        if not shapes:
            raise ValueError(
                f"{said}, line {number}: {entity!r} has no tokens that stand for text "
                "in this vocabulary: take it out"
            )
        if (least := min(map(len, shapes))) > most:
            raise ValueError(
                f"{said}, line {number}: {entity!r} has {least} tokens, and of a row "
                f"{most} are masked: take it out, or set NOISE_DENSITY or "
                "TASK_FEATURE_LENGTHS higher"
            )
        found |= shapes
    if not found:
        raise ValueError(f"{said} holds no entity: list them, one on each line")
    return frozenset(found)


def _without(vocabulary: Vocabulary, start: str, entity: str) -> tuple[int, ...]:
    """The tokens of an entity after some text, without those of that text alone."""
    before, ids = vocabulary.encode(start), vocabulary.encode(start + entity)
    if before and ids[: len(before)] == before:
        ids = ids[len(before) :]
    return tuple(ids)
