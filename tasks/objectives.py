"""What rows of tokens ask a model to predict. Read before jax: standard library only.

A gin file names an objective: one of Switchyard's, in `OBJECTIVES`, or one of your own,
as in OBJECTIVE = "my_lab.objectives:infill".
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from tasks.settings import DataSettings
    from tasks.vocabularies import Vocabulary


class Asked(NamedTuple):
    """What is made of a row of stored tokens.

    Attributes:
        inputs: int[...], tokens that are given; may be empty.
        targets: int[...], tokens that are predicted, at least one.
        sources: int[...], for each target the place in the row of the token that it
            is, or stands for: scores by document and language go by it.
    """

    inputs: "np.ndarray"
    targets: "np.ndarray"
    sources: "np.ndarray"


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes inputs and targets of stored text, a row at a time.

    Attributes:
        row_tokens: stored tokens of a row. What is made of so many, or fewer, fits
            the lengths of TASK_FEATURE_LENGTHS, whatever is drawn.
        ask: function (tokens, key) that returns an Asked. `tokens` is int[n], n from 1
            to `row_tokens`; `key` a tuple of integers that no other row of any epoch
            has. Draws are `tasks.draws.bits(count, *key)`: the same key, the same row.
        num_positions: function of n that returns how many tokens are made of n, inputs
            and targets together, on average; None: as many as there are room for.
    """

    row_tokens: int
    ask: Callable[["np.ndarray", tuple[int, ...]], Asked]
    num_positions: Callable[[int], float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective, and what the rest of Switchyard must know of it.

    Attributes:
        maker: function (data, vocabulary, **options) that returns a Maker, and raises
            ValueError, with what to change, if there can be none; OBJECTIVE_OPTIONS
            are its further arguments. "module:name" is imported when it is needed. None
            where rows hold stored tokens as they are.
        lengths: features that TASK_FEATURE_LENGTHS must have.
        layouts: values of ARCHITECTURE that it is for.
        sentinels: least number of EXTRA_IDS. Where it is not 0, `<extra_id_0>` in a
            prompt is the last id of the vocabulary, `<extra_id_1>` the one before it.
        answers: whether a prompt is taken for inputs, which end as documents do, and
            answered by targets; else it is continued.
        fills: whether an answer says what each sentinel of its prompt stands for.
        predicts_all: whether every stored target is predicted, so that bits per byte
            mean something.
        packs: whether PACKING means something.
        reads: stored features.
    """

    maker: Callable[..., Maker] | str | None = None
    lengths: tuple[str, ...] = ("targets",)
    layouts: tuple[str, ...] = ("decoder",)
    sentinels: int = 0
    answers: bool = False
    fills: bool = False
    predicts_all: bool = False
    packs: bool = False
    reads: tuple[str, ...] = ("targets",)

    def make(self, data: "DataSettings", vocabulary: "Vocabulary") -> Maker | None:
        """Returns the maker of a run; None if rows hold what is stored.

        Raises:
            ValueError: the settings do not allow for one; says what to change.
        """
        maker = self.maker
        if isinstance(maker, str):
            module, _, name = maker.partition(":")
            maker = getattr(importlib.import_module(module), name)
        return maker and maker(data, vocabulary, **data.objective_options)


_DENOISING = Objective(
    maker="tasks.denoising:corruption",
    lengths=("inputs", "targets"),
    layouts=("decoder", "encoder_decoder"),
    sentinels=1,
    answers=True,
    fills=True,
)

_MASKED = Objective(layouts=("encoder",), sentinels=1, packs=True)

OBJECTIVES: Mapping[str, Objective] = {
    "causal_lm": Objective(packs=True, predicts_all=True),
    "prefix_lm": Objective(maker="tasks.denoising:prefix"),
    "span_corruption": _DENOISING,
    "ul2": _DENOISING,
    "seq2seq": Objective(
        lengths=("inputs", "targets"),
        layouts=("decoder", "encoder_decoder"),
        answers=True,
        predicts_all=True,
        reads=("inputs", "targets"),
    ),
    "captions": Objective(predicts_all=True, reads=("images", "targets")),
    "masked_lm": _MASKED,
    "masked_entities": _MASKED,
}
