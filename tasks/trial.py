"""An objective of somebody's own, tried before anything is prepared or compiled."""

import numpy as np

from tasks.layouts import broken_rule
from tasks.objectives import Maker
from tasks.settings import DataSettings
from tasks.vocabularies import ByteVocabulary

_KEYS = 4


def broken_rule_of_objective(data: DataSettings) -> str:
    """Returns the first rule that an objective of somebody's own breaks; "" if none.

    What it makes of rows of several lengths fits, has ids of the vocabulary and a
    source for each target; the same key makes the same; and it writes nothing into the
    tokens. The vocabulary is that of bytes, with EXTRA_IDS. Every row of a run is held
    to the same, but for the last two rules. What the objective raises is not caught.

    Args:
        data: settings with the objective as `own`.
    """
    own, vocabulary = data.own, ByteVocabulary(data.extra_ids)
    assert own is not None
    maker = own.make(data, vocabulary)
    if not isinstance(maker, Maker):
        return f"its maker returned a {type(maker).__name__}, not a Maker"
    most = maker.row_tokens
    if not isinstance(most, int | np.integer) or most < 1:
        return f"its row_tokens is {most!r}: it must be at least 1"
    draw = np.random.default_rng(0)
    for num_tokens in sorted({1, min(2, most), -(-most // 2), most}):
        given = draw.integers(3, 259, num_tokens).astype(np.int32)
        given[draw.random(num_tokens) < 0.1] = vocabulary.eos_id
        for key in ((1, 2, 3, number) for number in range(_KEYS)):
            tokens = given.copy()
            asked = maker.ask(tokens, key)
            if broken := broken_rule(asked, num_tokens, data, vocabulary.size):
                return f"{broken}, of {num_tokens} tokens"
            if not np.array_equal(tokens, given):
                return f"it changes the {num_tokens} tokens that it is given"
            again = maker.ask(tokens, key)
            if not all(map(np.array_equal, asked, again)):
                return f"it makes other rows of {num_tokens} tokens with the same key"
    return ""
