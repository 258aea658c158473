"""Sentinels that a vocabulary has itself, such as T5's <extra_id_0>."""

from collections.abc import Callable

from tasks.errors import StoreError

_SPACE = "\u2581"  # mT5's pieces begin with what SentencePiece writes for a space


def extra_outside(
    extra_ids: int, size: int, token_of: Callable[[int], str | None]
) -> int:
    """Returns how many of the extra ids come after those of a vocabulary.

    Sentinels are counted from the end: where the last of its tokens is <extra_id_0>,
    the one before <extra_id_1>, and so on, these are the extra ids, and none is added.

    Args:
        extra_ids: how many there are.
        size: number of the vocabulary's own ids.
        token_of: function of an id; returns its token.
    Raises:
        StoreError: it has sentinels itself, but not so many.
    """
    for number in range(extra_ids):
        token = token_of(size - 1 - number) if number < size else None
        if token is None or token.lstrip(_SPACE) != f"<extra_id_{number}>":
            break
    else:
        return 0
    if number == 0:
        return extra_ids
    raise StoreError(
        f"EXTRA_IDS = {extra_ids}: the vocabulary ends with {number} sentinels of its "
        f"own, <extra_id_0> the last: set it to {number} at most"
    )
