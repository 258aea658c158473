"""Files that somebody has damaged, or made up, for tests of what reads them."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.errors import is_user_error

# What would lead out of a folder, end a name early, or be no name at all.
NAMES = st.sampled_from(
    [
        "..", ".", "", " ", "../..", "../../etc/passwd", "/etc/passwd", "a/../../b",
        "a\0b", "\0", "..\\..\\x", "C:\\x", "~", "~root", "a\nb", "\ud800", "%2e%2e",
        "x" * 300, "gs://bucket/x", "s3://..", "file:///etc/passwd", "\u202e..",
    ]
)  # fmt: skip
_DEEP = json.loads("[" * 300 + "]" * 300)
_ODD = st.one_of(
    NAMES,
    st.text(max_size=8),
    st.sampled_from(
        [
            None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308,
            float("nan"), float("inf"), [], {}, [[]], [1, 2], {"a": 1}, "nan", "0",
        ]
    ),
    st.just(_DEEP),
)  # fmt: skip


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draws the content of a file with some of its bytes changed, or another one."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(made) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "all"]))
        if kind == "flip" and made:
            made[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del made[place : place + draw(st.integers(1, len(content) + 1))]
        elif kind == "insert":
            made[place:place] = draw(st.binary(max_size=12))
        elif kind == "repeat":
            made += made[place : place + 64]
        else:
            made = bytearray(draw(st.binary(max_size=64)))
    return bytes(made)


@st.composite
def damaged_json(draw: st.DrawFn, value: Any) -> bytes:
    """Draws the JSON of a value some of whose parts are others, or are gone."""
    made = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        made = draw(_changed(made))
    text = json.dumps(made)
    if draw(st.integers(0, 19)) == 0:
        text = draw(st.sampled_from(["[" * 100_000, '{"a":' * 100_000, "", "9" * 5000]))
    return text.encode()


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """A value with one of its parts changed."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(_ODD)
    if isinstance(value, list):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(_changed(value[place])), *value[place + 1 :]]
    key = draw(st.sampled_from(sorted(value)))
    rest = {name: item for name, item in value.items() if name != key}
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "renamed"]))
    if kind == "gone":
        return rest
    if kind == "renamed":
        return {**rest, draw(NAMES): value[key]}
    return {**rest, key: draw(_changed(value[key]))}


def fuzz(
    strategy: st.SearchStrategy,
    read: Callable[[Any], Any],
    number: int,
    *,
    refuses: bool = True,
) -> None:
    """Reads many of them: each is read, or is an error that is a message to the user.

    Args:
        strategy: what is read.
        read: reads one.
        number: how many.
        refuses: whether some are refused; else what is damaged is passed over.
    """
    outcomes = {True: 0, False: 0}

    @settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(one: Any) -> None:
        error = _refusal(read, one)
        outcomes[error is None] += 1
        assert error is None or 0 < len(str(error)) < 20_000

    check()
    assert (outcomes[False] > 0) == refuses, "nothing was refused, or something was"


def _refusal(read: Callable[[Any], Any], one: Any) -> Exception | None:
    """Why one is refused; None if it is read."""
    try:
        read(one)
    except Exception as error:
        if not is_user_error(error):
            raise
        return error
    return None
