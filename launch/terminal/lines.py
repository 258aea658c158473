"""Words and lines for a terminal: live where there is one, plain elsewhere.

Everything goes to standard error, so that results on standard output can be piped.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

Clock = Callable[[], float]
PLAIN_PERIOD_SECONDS = 10.0  # between lines where none can be redrawn


@contextlib.contextmanager
def waiting(
    message: str,
    *,
    quiet: bool = False,
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[None]:
    """Shows a spinner beside a message, and the time it took when it is done."""
    console = console or stderr()
    shown_live = not quiet and is_live(console)
    began = clock()
    outcome = "stopped after "
    try:
        with contextlib.ExitStack() as stack:
            if shown_live:
                line = spinner(console, message, began, clock)
                stack.enter_context(live(console, lambda: line))
            elif not quiet:
                print_line(console, f"{message} ...")
            yield
        outcome = ""
    finally:
        if not quiet:
            print_line(console, f"{message}: {outcome}{duration(clock() - began)}")


def duration(seconds: float) -> str:
    """Says a duration in at most two units: "42 ms", "3 min 05 s", "2 d 04 h"."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def compact(number: float, unit: str = "") -> str:
    """Says a count in three digits: 987, "61.2k", "1.23M"; with a unit "12.1 MB"."""
    if not math.isfinite(number):
        return str(number)
    for power, prefix in ((4, "T"), (3, "G" if unit else "B"), (2, "M"), (1, "k")):
        scaled = number / 1000**power
        if abs(scaled) >= 0.9995:
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{' ' * bool(unit)}{prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


class _Elapsed:
    """A spinner's text with the seconds since a moment, read at each redraw."""

    def __init__(
        self, console: Console, message: str, began: float, clock: Clock
    ) -> None:
        self._console = console
        self._message = message
        self._began = began
        self._clock = clock

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        elapsed = f" {self._clock() - self._began:.0f} s"
        yield legible(Text.assemble(self._message, (elapsed, "dim")), self._console)


def stderr() -> Console:
    """Returns the console that everything is shown on."""
    return Console(stderr=True, highlight=False)


def is_live(console: Console) -> bool:
    """Says whether lines can be redrawn."""
    return console.is_terminal and not console.is_dumb_terminal


def is_utf8(console: Console) -> bool:
    """Says whether the console has more than ASCII."""
    return console.encoding.lower().startswith("utf")


def spinner(console: Console, message: str, began: float, clock: Clock) -> Any:
    """One line: a turning sign, the message, the seconds so far."""
    line = Table.grid(padding=(0, 1))
    line.add_row(
        Spinner("dots" if is_utf8(console) else "line", style="cyan"),
        _Elapsed(console, message, began, clock),
    )
    return line


def legible(text: Text, console: Console) -> Text:
    """The text in the characters that the console has."""
    if is_utf8(console):
        return text
    plain = text.plain
    for sign, substitute in {"·": ".", "×": "x", "–": "-", "‹": "<", "›": ">"}.items():
        plain = plain.replace(sign, substitute)
    plain = plain.encode(console.encoding, "replace").decode(console.encoding)
    return Text(plain, style=text.style, spans=text.spans)


def print_line(console: Console, line: str) -> None:
    """Prints one unbroken line, above a live display where there is one."""
    text = legible(Text(line), console)
    console.print(text, soft_wrap=True, markup=False, highlight=False)


@contextlib.contextmanager
def live(
    console: Console, get_renderable: Callable[[], Any], *, transient: bool = True
) -> Iterator[None]:
    """A display redrawn four times a second, with log lines led around it.

    rich takes over sys.stdout and sys.stderr; handlers of `logging` (absl's too) hold
    the stream they were made with, so they are pointed at the new one meanwhile.
    """
    old = {
        id(stream): name
        for name in ("stdout", "stderr")
        if (stream := getattr(sys, name))
    }
    with Live(
        console=console,
        get_renderable=get_renderable,
        transient=transient,
        refresh_per_second=4,
    ):
        moved = []
        for handler in _stream_handlers():
            name = old.get(id(handler.stream))
            if name is not None:
                moved.append((handler, handler.stream))
                handler.setStream(getattr(sys, name))
        try:
            yield
        finally:
            for handler, stream in moved:
                handler.setStream(stream)


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    """Every handler of any logger that writes to a stream."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = {
        id(handler): handler
        for logger in loggers
        for outer in getattr(logger, "handlers", ())
        for handler in (outer, getattr(outer, "python_handler", None))
        if isinstance(handler, logging.StreamHandler)
    }
    return list(handlers.values())
