"""Looks at everything, and shows it."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.config.reader import ResolvedConfig
from launch.doctor import accelerator, environment, folders, host, network, software
from launch.doctor.line import Line, Verdict, worst
from launch.errors import EXIT_DONE, EXIT_USER_ERROR, UserError
from launch.job import end, together

FORMAT = 1
_WIDTH = 100  # where output is no terminal
_NARROW = 60  # columns below which a value stands under its name
_STYLES = {"fine": "green", "note": "yellow", "problem": "bold red"}


class DoctorError(UserError):
    """What the doctor found cannot be written."""


def examine(
    config: ResolvedConfig, *, has_config: bool, json_file: str | None, quiet: bool
) -> int:
    """Looks at this machine, and at the others of its job; shows what was found.

    Args:
        config: the run that is asked about, or any.
        has_config: whether a run is asked about.
        json_file: file to write all to, besides; None writes none.
        quiet: whether only what is not fine is shown.
    Returns:
        The exit code: 1 if there is a problem.
    Raises:
        DoctorError: that file cannot be written.
    """
    lines = _looked_at(config, has_config=has_config, quiet=quiet)
    if end.in_job():
        import jax

        process, number = jax.process_index(), jax.process_count()
        between = network.measure(process, number, quiet=quiet)
        lines = [*network.gathered(lines, process, number), *between]
        told = together.as_first_finds("the doctor's verdict", lambda: worst(lines))
        if process:
            return _code(told)
    if json_file:
        _write(json_file, lines)
    show(lines, Console(width=_width(), highlight=False), quiet=quiet)
    return _code(worst(lines))


def _code(verdict: Verdict) -> int:
    return EXIT_USER_ERROR if verdict == "problem" else EXIT_DONE


def _looked_at(config: ResolvedConfig, *, has_config: bool, quiet: bool) -> list[Line]:
    """What this process finds."""
    settings = config.settings
    store_dir = settings.data.store_dir
    needed = None
    if has_config and "://" not in store_dir:
        needed = not folders.is_prepared(store_dir)
    devices: accelerator.Devices | str
    if end.in_job():
        devices = accelerator.ask(settings.platform)
    else:
        devices = accelerator.ask_child(settings.platform, quiet=quiet)
    return [
        *software.versions(),
        *software.packages(),
        *accelerator.lines(devices, settings.platform, settings.mesh),
        *environment.flags(),
        *environment.variables(),
        *host.lines(),
        *folders.lines(settings, quiet=quiet),
        software.preparing(needed, quiet=quiet),
        *software.encoding(),
    ]


def show(lines: Sequence[Line], console: Console, *, quiet: bool = False) -> None:
    """Prints the lines by their group, and how many are not fine.

    Args:
        lines: what was found.
        console: where they are printed.
        quiet: whether only what is not fine is shown.
    """
    shown = [line for line in lines if not quiet or line.verdict != "fine"]
    width = max((len(line.name) for line in shown), default=0)
    for group, of_group in itertools.groupby(shown, key=lambda line: line.group):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=len("problem"))
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for line in of_group:
            mark = Text(line.verdict, style=_STYLES[line.verdict])
            table.add_row(mark, Text(line.name), _value(line))
        console.print(Text(group, style="bold"))
        console.print(table)
    console.print(Text(_verdict(lines)), soft_wrap=True)


def _value(line: Line) -> Text:
    who = ""
    if line.processes:
        noun = "process" if len(line.processes) == 1 else "processes"
        who = f"{noun} {', '.join(map(str, line.processes))}: "
    text = Text(f"{who}{line.value}")
    if line.remedy:
        text.append(f"\n-> {line.remedy}", style=_STYLES[line.verdict])
    return text


def _verdict(lines: Sequence[Line]) -> str:
    def count(verdict: Verdict) -> str:
        number = sum(line.verdict == verdict for line in lines)
        return f"{number} {verdict}{'' if number == 1 else 's'}"

    if worst(list(lines)) == "problem":
        return f"not fit: {count('problem')}, {count('note')}"
    return f"fit: {count('note')}" if worst(list(lines)) == "note" else "fit"


def _width() -> int | None:
    """That of the terminal, if there is one."""
    return None if Console().is_terminal else _WIDTH


def _write(path: str, lines: Sequence[Line]) -> None:
    found = {
        "format": FORMAT,
        "switchyard": importlib.metadata.version("switchyard"),
        "verdict": worst(list(lines)),
        "lines": [dataclasses.asdict(line) for line in lines],
    }
    try:
        Path(os.path.expanduser(path)).write_text(
            f"{json.dumps(found, indent=1)}\n", encoding="utf-8"
        )
    except OSError as error:
        raise DoctorError(
            f"--json={path} cannot be written: {error.strerror or error}; name a file "
            "in a folder that is there"
        ) from error
