"""Masked tokens: what an encoder's row asks for (BERT, arXiv:1810.04805, section 3.1).

Of the chosen tokens 80 % are replaced by the mask, 10 % by a random token, and 10 % are
left as they are. Choices are a function of integers and differ from epoch to epoch, as
RoBERTa's do (arXiv:1907.11692, section 4.1). Words and entities can be chosen whole:
then all of their tokens have the same fate (ERNIE, arXiv:1904.09223, section 3.2).
"""

import dataclasses

import numpy as np

from tasks.draws import bits
from tasks.huggingface_vocabulary import HuggingFaceVocabulary
from tasks.settings import DataSettings
from tasks.vocabularies import Vocabulary
from tasks.words import Units, units

_TENTHS = 10  # of which 8 are masked and 1 is replaced


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens of a row are masked.

    Attributes:
        density: fraction of the tokens that are chosen; at least one is.
        vocabulary_size: V.
        extra_ids: ids at its end that are no text, and replace nothing.
        eos_id: end of a document, which is never chosen.
        mask_id: stands for a masked token; None: the last id.
        units: what is chosen as one; None: each token by itself.
    """

    density: float
    vocabulary_size: int
    extra_ids: int
    eos_id: int
    mask_id: int | None = None
    units: Units | None = None

    def __call__(self, tokens: np.ndarray, *key: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens as they are read, and bool[n], which are predicted.

        The same key draws the same.
        """
        draws = bits(2 * len(tokens), *key)
        order, kind = draws[: len(tokens)], draws[len(tokens) :]
        candidates = np.flatnonzero(tokens != self.eos_id)
        chosen = np.zeros(len(tokens), bool)
        if not len(candidates):
            return tokens, chosen
        number = max(int(np.rint(self.density * len(candidates))), 1)
        tenth = kind % _TENTHS
        if self.units is None:
            taken = np.argsort(order[candidates], kind="stable")[:number]
            chosen[candidates[taken]] = True
        else:
            begins = self.units(tokens)
            starts, unit = np.flatnonzero(begins), np.cumsum(begins) - 1
            lengths = np.bincount(unit) * (tokens[starts] != self.eos_id)
            whole = _fitting(order[starts], lengths, number)
            chosen, tenth = whole[unit], tenth[starts][unit]
        text = self.vocabulary_size - self.extra_ids
        # Id 0 is padding.
        other = 1 + (kind // _TENTHS % max(text - 1, 1)).astype(tokens.dtype)
        mask = self.vocabulary_size - 1 if self.mask_id is None else self.mask_id
        read = np.where(chosen & (tenth < 8), mask, tokens)
        return np.where(chosen & (tenth == 8), other, read), chosen


def _fitting(order: np.ndarray, lengths: np.ndarray, number: int) -> np.ndarray:
    """Chooses units in the order of their draws, but those that would be too much.

    As BERT's whole-word masking passes over them; if all are, the shortest is chosen.

    Args:
        order: uint64[units] of random bits.
        lengths: int64[units], tokens of each; 0: never chosen.
        number: tokens to choose.
    Returns:
        bool[units].
    """
    chosen, left = np.zeros(len(order), bool), number
    for unit in np.argsort(order, kind="stable").tolist():
        if 0 < lengths[unit] <= left:
            chosen[unit] = True
            left -= int(lengths[unit])
        if not left:
            break
    if left == number:
        chosen[np.argmin(np.where(lengths > 0, lengths, lengths.max() + 1))] = True
    return chosen


def masking(data: DataSettings, vocabulary: Vocabulary) -> Masking | None:
    """Returns how tokens are masked, if the objective masks them by themselves.

    Raises:
        ValueError: the list of entities does not suit, or the vocabulary has no such
            MASK_TOKEN.
    """
    if data.objective not in ("masked_lm", "masked_entities"):
        return None
    found = Masking(
        data.noise_density,
        vocabulary.size,
        vocabulary.extra_ids,
        vocabulary.eos_id,
        _mask_id(data.mask_token, vocabulary) if data.mask_token else None,
    )
    if data.objective == "masked_lm":
        return found
    most = max(int(np.rint(data.noise_density * data.length)), 1)
    return dataclasses.replace(found, units=units(vocabulary, data.entities, most))


def _mask_id(token: str, vocabulary: Vocabulary) -> int:
    """Returns the id of MASK_TOKEN, if the vocabulary has it."""
    if isinstance(vocabulary, HuggingFaceVocabulary):
        found = vocabulary.id_of(token)
        if found is not None:
            return found
    raise ValueError(
        f"MASK_TOKEN = {token!r} is no piece of the vocabulary: set it to one of a "
        "tokenizer.json, such as '[MASK]' of BERT's, or to '', and EXTRA_IDS to 1"
    )
