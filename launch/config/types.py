"""What a value must be to become a setting, read from the records' annotations."""

import functools
import keyword
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from launch.config.settings import Settings
from launch.errors import is_utf8, nearest
from moe.settings import Options


@functools.cache
def annotation(setting: str) -> Any:
    """Returns the type of a setting, such as that of "model.num_layers"."""
    record, field = setting.split(".")
    return typing.get_type_hints(typing.get_type_hints(Settings)[record])[field]


def is_text(kind: Any) -> bool:
    """Whether a setting of this type is text, free or one of several words."""
    return kind is str or bool(words(kind))


def words(kind: Any) -> tuple[Any, ...]:
    """Returns the words that a setting of this type may be; () for any other type."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    parts = typing.get_args(kind) if is_union else (kind,)
    return next(
        (typing.get_args(part) for part in parts if typing.get_origin(part) is Literal),
        (),
    )


def fit(value: Any, kind: Any) -> Any:
    """Returns the value as the type of a setting.

    An integer may stand for a number and a list for a tuple; True is no integer.

    Raises:
        ValueError: what the value must be, as the end of a sentence.
    """
    if choices := words(kind):
        if value in choices:
            return value
        or_own = ""
        if typing.get_origin(kind) is not Literal:
            if isinstance(value, str) and ":" in value:
                return _named(value)
            or_own = ", or 'module:name' of your own"
        hint = nearest(value, choices) if isinstance(value, str) else ""
        known = ", ".join(map(repr, choices))
        raise ValueError(f"must be one of {known}{or_own}{hint}")
    make = typing.get_origin(kind) or kind
    rule, fits = _RULES[kind]
    if not fits(value):
        quoted = isinstance(value, str) and make in (bool, int, float)
        raise ValueError(f"must be {rule}{', without quotes' if quoted else ''}")
    texts = (value,) if make is str else value if kind == tuple[str, ...] else ()
    if not all(map(is_utf8, texts)):
        raise ValueError("is not UTF-8: \\ud800 to \\udfff in it are no characters")
    if kind == tuple[tuple[int, int], ...]:
        value = tuple(map(tuple, value))
    return dict(value) if make is Mapping else make(value)


def stand_in(kind: Any) -> Any:
    """Returns some value of the type, for a setting that was never given."""
    if choices := words(kind):
        return choices[0]
    make = typing.get_origin(kind) or kind
    if make is Mapping:
        return {"targets": 2} if kind == Mapping[str, int] else {}
    return () if make is tuple else make("1")


def fill(fields: Mapping[str, Any]) -> Settings:
    """Builds the records from values such as {"model.num_layers": 4}."""
    records: dict[str, dict[str, Any]] = {}
    for setting, value in fields.items():
        record, field = setting.split(".")
        records.setdefault(record, {})[field] = value
    kinds = typing.get_type_hints(Settings)
    return Settings(**{name: kinds[name](**records.get(name, {})) for name in kinds})


def _named(value: str) -> str:
    """A name such as "my_lab.routers:soft"; whether it is there is not asked."""
    module, _, name = value.partition(":")
    parts = [*module.split("."), name]
    if not all(p.isidentifier() and not keyword.iskeyword(p) for p in parts):
        raise ValueError("must be 'module:name', such as 'my_lab.routers:soft'")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)


def _is_integers(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_int, value))


def _is_pairs(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(
        _is_integers(pair) and len(pair) == 2 for pair in value
    )


def _is_lengths(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and _is_int(number) for key, number in value.items()
    )


def _is_rates(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and _is_number(rate) for key, rate in value.items()
    )


def _is_schedule(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_int(step) and _is_rates(rates) for step, rates in value.items()
    )


def _is_options(value: Any) -> bool:
    return isinstance(value, dict | Options) and all(
        isinstance(name, str) and name.isidentifier() and all(map(_is_option, parts))
        for name, option in value.items()
        for parts in [option if isinstance(option, tuple | list) else (option,)]
    )


def _is_option(value: Any) -> bool:
    is_text = isinstance(value, str) and is_utf8(value)
    return is_text or isinstance(value, bool) or _is_number(value)


_OPTIONS_RULE = (
    "a dict of numbers, texts, True, False, or tuples of them, such as {'tau': 0.3}"
)
_RULES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("an integer", _is_int),
    float: ("a finite number", _is_number),
    str: ("text in quotes", lambda value: isinstance(value, str)),
    tuple[str, ...]: ("a tuple of texts, such as ('--flag=1',)", _is_texts),
    tuple[int, ...]: ("a tuple of integers, such as (32, 64)", _is_integers),
    tuple[tuple[int, int], ...]: (
        "a tuple of pairs of integers, such as ((0, 32), (1000, 64))",
        _is_pairs,
    ),
    Options: (_OPTIONS_RULE, _is_options),
    Mapping[str, object]: (_OPTIONS_RULE, _is_options),
    Mapping[str, int]: ("a dict of integers, such as {'targets': 256}", _is_lengths),
    Mapping[str, float]: ("a dict of numbers, such as {'a': 0.3, 'b': 0.7}", _is_rates),
    Mapping[int, Mapping[str, float]]: (
        "a dict from steps to rates, such as {0: {'a': 1, 'b': 0}, 1000: {'a': 1, "
        "'b': 1}}",
        _is_schedule,
    ),
}
