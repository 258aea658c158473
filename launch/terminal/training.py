"""What a user watches while something runs: live on a terminal, plain lines elsewhere.

On a terminal two or three lines are redrawn in place, and whatever is printed or
logged meanwhile appears above them. Elsewhere (logs, CI) a line comes now and then.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from launch.terminal.lines import (
    PLAIN_PERIOD_SECONDS,
    Clock,
    compact,
    duration,
    is_live,
    legible,
    live,
    print_line,
    spinner,
    stderr,
)

_WARN_DROPPED = 0.05
_WARN_DATA_WAIT = 0.1


@dataclasses.dataclass(frozen=True)
class Extreme:
    """An expert of a sparse layer, both counted from 0, and its load over the mean."""

    layer: int
    expert: int
    relative: float

    def __str__(self) -> str:
        return f"L{self.layer}·e{self.expert} {self.relative:.1f}×"


def load_extremes(load_LE: Any) -> tuple[Extreme, Extreme] | None:
    """Finds the most and the least loaded expert of all sparse layers.

    Args:
        load_LE: [layers][experts], in any unit; compared with the mean of its layer.
            NaN stands for experts that a layer has not.

    Returns:
        The most and the least loaded, the first of equals; None if no layer has a
        finite, positive load.
    """
    load_LE = np.asarray(load_LE)
    if load_LE.ndim != 2 or not load_LE.size:
        return None
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # Much faster than functions that know NaN, for which there is seldom need.
        sum_L, number_L = load_LE.sum(axis=1), np.full(len(load_LE), load_LE.shape[1])
        most_L, least_L = load_LE.argmax(axis=1), load_LE.argmin(axis=1)
        for layer in np.flatnonzero(~np.isfinite(sum_L)).tolist():
            row_E = load_LE[layer]
            there_E = ~np.isnan(row_E)
            sum_L[layer] = row_E[there_E].sum()
            number_L[layer] = there_E.sum()
            most_L[layer] = np.where(there_E, row_E, -np.inf).argmax()
            least_L[layer] = np.where(there_E, row_E, np.inf).argmin()
        good = np.flatnonzero(np.isfinite(sum_L) & (sum_L > 0))
        if not len(good):
            return None
        found = []
        for expert_L, find in ((most_L, np.argmax), (least_L, np.argmin)):
            share_L = load_LE[good, expert_L[good]] * number_L[good] / sum_L[good]
            place = int(find(share_L))
            layer, relative = int(good[place]), float(share_L[place])
            found.append(Extreme(layer, int(expert_L[layer]), relative))
    return found[0], found[1]


class TrainProgress:
    """Shows where training stands. Use it as a context manager.

    Args:
        total_steps: the step at which training is complete.
        start_step: the step it starts from, above 0 when resumed.
        quiet: show nothing at all.
        console: where to show it; standard error by default.
        clock: seconds, rising.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._step = self._start = start_step
        self._quiet = quiet
        self._console = console or stderr()
        self._clock = clock
        self._began = clock()
        self._train: Mapping[str, Any] = {}
        self._extremes: tuple[Mapping[str, Any], Any] = ({}, None)  # of which record
        self._heldout: Mapping[str, Any] = {}
        self._first: tuple[int, float] | None = None  # step and time, rates start here
        self._latest = (start_step, self._began)
        self._printed: float | None = None
        self._printed_step = -1
        self._waiting: Spinner | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "TrainProgress":
        if not self._quiet and is_live(self._console):
            self._stack.enter_context(
                live(self._console, lambda: self, transient=False)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiting = None
        self._stack.close()

    def advance(self, step: int) -> None:
        """Moves the bar to a step whose numbers are not there yet."""
        self._step = max(self._step, step)

    def update(self, record: Mapping[str, Any]) -> None:
        """Takes a record of metrics, of training or held out, and shows it."""
        if record["split"] != "train":
            self._heldout = {**self._heldout, **record}
            self._say(f"step {record['step']:,}  {_heldout_words(record)}")
            return
        now = self._clock()
        self._train = record
        self.advance(record["step"])
        self._first = self._first or (record["step"], now)
        self._latest = (record["step"], now)
        if not is_live(self._console):
            due = self._printed is None or now - self._printed >= PLAIN_PERIOD_SECONDS
            last = record["step"] >= self._total > self._printed_step
            if due or last:
                self._printed, self._printed_step = now, record["step"]
                self._say(self.plain_line())

    @contextlib.contextmanager
    def waiting(self, message: str) -> Iterator[None]:
        """Shows what the loop waits for; says how long it took when it is done."""
        began = self._clock()
        if not self._quiet and is_live(self._console):
            self._waiting = spinner(self._console, message, began, self._clock)
        else:
            self._say(f"{message} ...")
        outcome = "stopped after "
        try:
            yield
            outcome = ""
        finally:
            self._waiting = None
            self._say(f"{message}: {outcome}{duration(self._clock() - began)}")

    def plain_line(self) -> str:
        """The state in one line, as logs show it."""
        parts: list[Text | str] = [f"step {self._step:,}/{self._total:,}"]
        parts += self._quantities()
        if self._step >= self._total:
            parts.append(f"{duration(self._clock() - self._began)} in all")
        elif (left := self._seconds_left()) is not None:
            parts.append(f"{duration(left)} left")
        parts += [part.plain for part in self._routing()]
        return "  ".join(str(part) for part in parts)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        """The live display: two lines, and a third for sparse layers or a wait."""
        width = options.max_width
        yield self._bar_line(width)
        if self._train:
            yield _join(self._quantities(), width, console)
            routing = self._routing()
            if routing:
                yield _join(routing, width, console)
        else:
            yield _join([Text("waiting for the first step", "dim")], width, console)
        if self._waiting:
            yield self._waiting

    def _bar_line(self, width: int) -> Table:
        left = self._seconds_left()
        if self._step >= self._total:
            ending = f"{duration(self._clock() - self._began)} in all"
        else:
            ending = "–" if left is None else f"{duration(left)} left"
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.expand = True
        line.width = width
        done = self._step / self._total if self._total else 1.0
        line.add_row(
            Text.assemble(
                (f"step {self._step:,}", "bold"), (f" / {self._total:,}", "dim")
            ),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            legible(Text(f"{math.floor(100 * done)} %  {ending}"), self._console),
        )
        return line

    def _quantities(self) -> list[Text]:
        """Loss, held-out loss, speed and the wait for data."""
        record = self._train
        parts = []
        loss = record.get("loss/nats_per_token")
        if loss is not None:
            parts.append(Text.assemble("loss ", (f"{loss:.4f}", "bold"), " nats/token"))
        heldout = self._heldout.get("loss/nats_per_token")
        if heldout is not None:
            parts.append(Text.assemble("held-out ", (f"{heldout:.4f}", "bold")))
        speed = record.get("perf/tokens_per_second")
        if speed is not None:
            parts.append(Text(f"{compact(speed)} tokens/s"))
        wait, step = (record.get(f"perf/{n}_seconds") for n in ("data_wait", "step"))
        if wait is not None and step:
            style = "yellow" if wait / step > _WARN_DATA_WAIT else ""
            parts.append(Text(f"data wait {_percent(wait / step)}", style))
        return parts

    def _routing(self) -> list[Text]:
        """What went otherwise than it should, and the extremes of load, if any."""
        parts = []
        skipped = self._train.get("state/skipped_steps")
        if skipped:
            parts.append(Text(f"{skipped:,.0f} steps skipped", "bold red"))
        again = self._train.get("perf/steps_taken_again")
        if again:
            parts.append(Text(f"{again:,.0f} steps taken again", "yellow"))
        spilled = self._train.get("router/spilled_fraction")
        if spilled:
            parts.append(Text(f"spilled {_percent(spilled)}"))
        dropped = self._train.get("router/dropped_fraction")
        if dropped is not None:
            style = "yellow" if dropped > _WARN_DROPPED else ""
            parts.append(Text(f"dropped {_percent(dropped)}", style))
        alone = self._train.get("router/tokens_without_expert_fraction")
        if alone and alone != dropped:  # with one choice each they are the same
            style = "yellow" if alone > _WARN_DROPPED else ""
            parts.append(Text(f"without expert {_percent(alone)}", style))
        extremes = self._load_extremes()
        if extremes:
            parts += [Text(f"most {extremes[0]}"), Text(f"least {extremes[1]}")]
        return parts

    def _load_extremes(self) -> tuple[Extreme, Extreme] | None:
        """Those of the last record, looked for once, however often they are drawn."""
        record = self._train
        if self._extremes[0] is not record:
            self._extremes = record, load_extremes(record.get("router/load", ()))
        return self._extremes[1]

    def _seconds_left(self) -> float | None:
        """Time to the last step at the rate since the first record of this process."""
        if self._first is None:
            return None
        (first_step, first_time), (step, seen) = self._first, self._latest
        if step > first_step:
            pace = (seen - first_time) / (step - first_step)
        else:
            pace = self._train.get("perf/step_seconds") or math.nan
        left = pace * (self._total - step) - (self._clock() - seen)
        return max(left, 0.0) if math.isfinite(left) else None

    def say(self, line: str) -> None:
        """Prints a line above the display."""
        self._say(line)

    def _say(self, line: str) -> None:
        if not self._quiet:
            print_line(self._console, line)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _heldout_words(record: Mapping[str, Any]) -> str:
    """What a held-out evaluation found."""
    parts = []
    nats = record.get("loss/nats_per_token")
    if nats is not None:
        parts.append(f"{nats:.4f} nats/token")
    bits = record.get("loss/bits_per_byte")
    if bits is not None:
        parts.append(f"{bits:.4f} bits/byte")
    if record.get("tokens") is not None:
        parts.append(f"over {record['tokens']:,} tokens")
    measured = {n: v for n, v in record.items() if n.startswith("metric/")}
    parts += [f"{n.removeprefix('metric/')} {v:.4g}" for n, v in measured.items()]
    return "held-out " + "  ".join(parts)


def _join(parts: Sequence[Text], width: int, console: Console) -> Text:
    """As many parts as fit in one line; the most important come first."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        more = Text.assemble((" · ", "dim"), part) if line.plain else part
        if line.cell_len + more.cell_len > width:
            break
        line.append_text(more)
    return legible(line, console)
