"""Masked tokens: what an encoder's row asks for (BERT, arXiv:1810.04805, section 3.1).

Of the chosen tokens 80 % are replaced by the mask, 10 % by a random token, and 10 % are
left as they are. Choices are a function of integers and differ from epoch to epoch, as
RoBERTa's do (arXiv:1907.11692, section 4.1).
"""

import dataclasses

import numpy as np

from tasks.draws import bits

_TENTHS = 10  # of which 8 are masked and 1 is replaced


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens of a row are masked.

    Attributes:
        density: fraction of the tokens that are chosen; at least one is.
        vocabulary_size: V; the last id stands for a masked token.
        extra_ids: ids at its end that are no text, and replace nothing.
        eos_id: end of a document, which is never chosen.
    """

    density: float
    vocabulary_size: int
    extra_ids: int
    eos_id: int

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
        chosen[candidates[np.argsort(order[candidates], kind="stable")[:number]]] = True
        tenth = kind % _TENTHS
        text = self.vocabulary_size - self.extra_ids
        # Id 0 is padding.
        other = 1 + (kind // _TENTHS % max(text - 1, 1)).astype(tokens.dtype)
        read = np.where(chosen & (tenth < 8), self.vocabulary_size - 1, tokens)
        return np.where(chosen & (tenth == 8), other, read), chosen
