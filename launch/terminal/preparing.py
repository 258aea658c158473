"""What a user watches while a token store is made."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.spinner import Spinner
from rich.text import Text

from launch.terminal.lines import (
    PLAIN_PERIOD_SECONDS,
    Clock,
    compact,
    duration,
    is_live,
    is_utf8,
    legible,
    live,
    print_line,
    stderr,
)

if TYPE_CHECKING:
    from tasks.prepare import Progress


@contextlib.contextmanager
def preparing(
    *,
    quiet: bool = False,
    console: Console | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Callable[["Progress"], None]]:
    """Shows how far the making of a token store is.

    Gives the callback that `tasks.prepare.prepare` reports to. Each phase ends with a
    line that stays.
    """
    display = _Preparing(console or stderr(), quiet, clock)
    with contextlib.ExitStack() as stack:
        if display.is_live:
            stack.enter_context(live(display.console, display.renderable))
        yield display.update
    display.finish_phase()


class _Preparing:
    """The display behind `preparing`."""

    def __init__(self, console: Console, quiet: bool, clock: Clock) -> None:
        self.console = console
        self.is_live = not quiet and is_live(console)
        self._quiet = quiet
        self._clock = clock
        self._began = self._printed = clock()
        self._state: Progress | None = None
        self._spinner = Spinner("dots" if is_utf8(console) else "line", style="cyan")

    def update(self, new: "Progress") -> None:
        if self._state is not None and new.phase != self._state.phase:
            self.finish_phase()
        self._state = new
        now = self._clock()
        plain = not self.is_live and not self._quiet
        if plain and now - self._printed >= PLAIN_PERIOD_SECONDS:
            self._printed = now
            print_line(self.console, self._line())

    def finish_phase(self) -> None:
        if self._state is not None and not self._quiet:
            took = duration(self._clock() - self._began)
            print_line(self.console, f"{self._line()} · {took}")
        self._began = self._printed = self._clock()

    def renderable(self) -> Spinner:
        self._spinner.update(text=legible(Text(self._line()), self.console))
        return self._spinner

    def _line(self) -> str:
        state = self._state
        if state is None:
            return "preparing tokens"
        seconds = self._clock() - self._began
        parts = []  # a phase such as the vocabulary counts no tokens
        if state.documents:
            parts.append(f"{state.documents:,} documents")
        if state.tokens:
            parts.append(f"{compact(state.tokens)} tokens")
        if state.text_bytes:
            parts.append(compact(state.text_bytes, "B"))
        if seconds >= 1 and state.text_bytes:  # a rate over less says nothing
            rate = state.text_bytes / seconds
            parts.append(compact(rate, "B/s"))
            left = state.expected_bytes - state.text_bytes
            if left > 0 and state.expected_bytes:
                parts.append(f"{duration(left / rate)} left")
        return f"preparing {state.phase}" + ": " * bool(parts) + " · ".join(parts)
