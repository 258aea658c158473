"""The syntax of gin files: the only file that imports gin.

Gin's parser is the only part of it that runs: nothing in a gin file can import, call
or register anything.
"""

import dataclasses
import importlib.util  # noqa: F401  gin 0.5.0 needs it, and does not import it
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from gin import config_parser

Binding = config_parser.BindingStatement
Include = config_parser.IncludeStatement
Import = config_parser.ImportStatement
Block = config_parser.BlockDeclaration

_STATEMENT = re.compile(r"(?:include|import|from)\b|([A-Za-z_][\w./]*)\s*([=:])")


@dataclasses.dataclass(frozen=True)
class MacroUse:
    """%NAME in a value."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = MacroUse("gin.REQUIRED")


@dataclasses.dataclass(frozen=True)
class Reference:
    """@name in a value, which nothing here accepts."""

    name: str


class Fault(NamedTuple):
    """A statement that gin's parser refuses; `macro` if its left side is legible."""

    line: int
    reason: str
    macro: str


class _Values(config_parser.ParserDelegate):
    """Turns the two special values of gin into inert records."""

    def macro(self, macro_name: str) -> MacroUse:
        return MacroUse(macro_name)

    def configurable_reference(
        self, scoped_configurable_name: str, evaluate: bool
    ) -> Reference:
        return Reference(scoped_configurable_name)


def statements(text: str) -> Iterator[Any]:
    """Yields gin's statements, and a Fault for each that is not one.

    After a fault, reading goes on at the next line that looks like a statement.
    """
    lines = io.StringIO(text).readlines()
    read_lines = 0
    while True:
        # Blank lines in place of what is read keep the line numbers right.
        source = io.StringIO("\n" * read_lines + "".join(lines[read_lines:]))
        begun = read_lines + 1
        try:
            parser = config_parser.ConfigParser(source, _Values())
            while True:
                begun = max(parser.current_token.start[0], read_lines + 1)
                statement = parser.parse_statement()
                if statement is None:
                    return
                yield statement
        except Exception as error:  # gin's parser has many ways to give up
            line = error.lineno if isinstance(error, SyntaxError) else None
            start = _next_statement(lines, begun) or line or begun
            if line is not None and begun <= line < start:
                start = line
            yield _fault(lines, start)
            following = _next_statement(lines, start + 1)
            if following is None:
                return
            read_lines = following - 1


def _next_statement(lines: Sequence[str], line: int) -> int | None:
    """Returns the first line from `line` on, from 1, that looks like a statement."""
    for number in range(line, len(lines) + 1):
        if _STATEMENT.match(lines[number - 1]):
            return number
    return None


def _fault(lines: Sequence[str], line: int) -> Fault:
    """Says what is wrong with a statement.

    It does not quote the file, as gin's message would: nobody may have meant to show
    what is in it.
    """
    match = _STATEMENT.match(lines[line - 1]) if line <= len(lines) else None
    macro, sign = match.groups(default="") if match else ("", "")
    if sign == "=":
        reason = (
            "its value is not one literal: a number, True, False, 'text in quotes', a "
            "(tuple,), a {'dict': 1} or %OTHER_MACRO, every bracket and quote closed"
        )
    else:
        reason = "this is neither `MACRO = value` nor `include 'file.gin'`"
    return Fault(line, reason, macro)


def parts(value: Any) -> Iterator[Any]:
    """Yields a value and everything inside it."""
    yield value
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from parts(item)
