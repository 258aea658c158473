"""The command line: `switchyard VERB --gin_file=FILE --gin.MACRO=VALUE`.

Help needs neither gin nor jax. A verb's configuration is read, the environment of jax
set, and what is about to happen said; only then does the verb import what it works
with. What a verb is stands in its own file of `launch/commands/`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch import commands
from launch.commands import Command, Options
from launch.doctor import shadows
from launch.doctor.line import masked
from launch.errors import (
    EXIT_CODES,
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    UsageError,
    is_user_error,
    nearest,
)

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig
    from launch.config.settings import PlatformSettings
    from launch.job.together import Job

_ABOUT = """\
Switchyard trains sparse mixture-of-experts transformers in JAX.

A run is described by gin files: one chooses the hardware, one the model, one the data
and the length of training. A run lives in one folder, its MODEL_DIR.
"""
_EXAMPLES = """\
examples:
  switchyard train --gin_file=configs/runs/demo.gin
  switchyard evaluate --model_dir=runs/demo
  switchyard generate --model_dir=runs/demo --prompt='def main('

`switchyard VERB --help` explains a verb. configs/base.gin lists every knob."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the words after the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 gets a "?", rather than ending the run.
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    try:
        return _run(words, argv)
    except KeyboardInterrupt:
        print("switchyard: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if is_user_error(error):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        if wrong := shadows.found_instead():
            print(f"switchyard: {shadows.sentence(wrong)}", file=sys.stderr)
            return EXIT_USER_ERROR
        traceback.print_exception(error)
        print(f"switchyard: {EXIT_CODES[EXIT_FAULT]}", file=sys.stderr)
        return EXIT_FAULT


def _run(words: list[str], argv: Sequence[str] | None) -> int:
    """Reads the words, prepares the environment and runs the command."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE
    if words[0] == "--version":
        print(f"switchyard {_version()}")
        return EXIT_DONE
    name, command, rest = commands.find(words)
    options, bindings = parse(name, command, rest)
    config = read_config(command, options, bindings)
    if command.restarts is not None and (restarts := command.restarts(options)):
        from launch.job.restarts import Supervisor, command_line, is_child

        if not is_child():
            folder = Path(config.settings.loop.model_dir)
            return Supervisor(command_line(argv), folder, restarts).run()
    on, job, told = config, None, list[str]()
    if command.devices is not None:
        on = command.devices(config, options)
        job, told = _before_jax(on.settings.platform)
    if job is not None and job.process > 0:  # the first one speaks for all
        options = dataclasses.replace(options, quiet=True)
    if not options.quiet:
        lines = [_first_line(name, command, config, on, options)]
        lines += [f"  {masked(line)}" for line in (*config.notes, *told)]
        print("\n".join(lines), file=sys.stderr, flush=True)
    # A module of the user's may lie in the working directory: `python -m launch` looks
    # there by itself, the console script does not.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    work = functools.partial(_work, command, config, options)
    if job is None:
        return work()
    from launch.job import together

    return together.run(job, work, config)


def _work(command: Command, config: "ResolvedConfig", options: Options) -> int:
    """Runs the command; if it keeps nothing, a signal ends it at once."""
    if not command.keeps_nothing:
        return command.run(config, options)
    from launch.job.signals import listening

    with listening("stopped", quiet=options.quiet):
        return command.run(config, options)


def _before_jax(platform: "PlatformSettings") -> tuple["Job | None", list[str]]:
    """Sets the environment of jax, and finds out whether others run this job too."""
    from launch.config.platform import prepare_environment

    lines = prepare_environment(platform)
    if platform.num_processes == 1:
        return None, lines
    from launch.job import together

    job = together.find(platform)
    return job, [*lines, str(job or "one process, alone")]


# ------------------------------------------------------------------ words and flags


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        """Raises what the user did wrong, instead of ending the process."""
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(name: str, command: Command, width: int | None = None) -> "_Parser":
    """Returns what reads the options of a verb, and writes its help.

    Args:
        name: name of the verb.
        command: the verb.
        width: columns of the help; None takes the terminal's.
    """
    made = _Parser(
        prog=f"switchyard {name}",
        usage=" ".join(
            [
                f"switchyard {name}",
                *(word.upper() for word in command.words),
                "[OPTION=VALUE ...] [--gin.MACRO=VALUE ...]",
            ]
        ),
        description=command.description,
        epilog=_epilog(command),
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, width=width
        ),
        allow_abbrev=False,
    )
    kinds = typing.get_type_hints(command.options)
    fields = dataclasses.fields(command.options)
    for field in sorted(fields, key=lambda f: f.name in Options.__dataclass_fields__):
        _add_flag(made, field, kinds[field.name], command.words)
    return made


def parse(
    name: str, command: Command, words: Sequence[str]
) -> tuple[Options, list[str]]:
    """Splits the words of a verb into its options and bindings of macros.

    Raises:
        UsageError: a word is neither.
    """
    reads = parser(name, command)
    bindings = [word.removeprefix("--gin.") for word in words if _is_binding(word)]
    for binding in bindings:
        if "=" not in binding:
            raise UsageError(f"--gin.{binding} needs a value: --gin.{binding}=VALUE")
    found, unknown = reads.parse_known_args(
        [word for word in words if not _is_binding(word)]
    )
    left = [word for word in command.words if getattr(found, word) is None]
    bare = [word for word in unknown if not word.startswith("-")]
    for field, word in zip(left, bare, strict=False):
        setattr(found, field, word)
        unknown.remove(word)
    if unknown:
        word = unknown[0]
        known = [flag for flag in reads._option_string_actions if flag[:2] == "--"]
        hint = nearest(word.partition("=")[0], known)
        if not word.startswith("-"):
            hint = "; options are written --name=value"
        elif word.lstrip("-").partition("=")[0].isupper():
            hint = f"; knobs are written --gin.{word.lstrip('-')}"
        reads.error(f"{word!r} is not an option of {name}{hint}")
    if missing := [word for word in command.words if getattr(found, word) is None]:
        reads.error(f"{' and '.join(word.upper() for word in missing)} must be given")
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(found).items()
    }
    return command.options(**values), bindings  # type: ignore[arg-type]


def _add_flag(
    parser: argparse.ArgumentParser,
    field: dataclasses.Field[Any],
    kind: Any,
    words: Sequence[str],
) -> None:
    """Adds the flag of a field of an options record; `words` may come without it."""
    given: dict[str, Any] = {"help": field.metadata["help"]}
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    required = field.default is dataclasses.MISSING
    if not required:
        given["default"] = field.default
    elif field.name not in words:
        given["required"] = True
    if field.metadata["metavar"] or field.metadata["macro"]:
        given["metavar"] = field.metadata["metavar"] or "X"
    if kind is bool:
        given["action"] = "store_true"
    elif typing.get_origin(kind) is tuple:
        given |= {"action": "append", "default": []}
    elif typing.get_origin(kind) is typing.Literal:
        given["choices"] = typing.get_args(kind)
        given.pop("metavar", None)
    elif kind is not str:
        given["type"] = kind
    parser.add_argument(f"--{field.name}", **given)


def _epilog(command: Command) -> str:
    codes = [f"  {code:<3} {words}" for code, words in _codes(command)]
    parts = [command.ending.rstrip(), "\n".join(["exit codes:", *codes])]
    return "\n\n".join(filter(None, parts))


def _codes(command: Command) -> list[tuple[int, str]]:
    codes, found = dict(command.exit_codes), []
    if command.keeps_nothing:
        codes[EXIT_PREEMPTED] = "preempted: restart the same command"
        codes[EXIT_INTERRUPTED] = ""
    for code in sorted(codes):
        words = codes[code] or EXIT_CODES[code]
        found.append((code, textwrap.fill(words, 80, subsequent_indent=" " * 6)))
    return found


def _is_binding(word: str) -> bool:
    return word.startswith("--gin.")


# -------------------------------------------------------------------- configuration


def read_config(
    command: Command, options: Options, bindings: Sequence[str]
) -> "ResolvedConfig":
    """Reads the gin files of a command, and those of the run it is about."""
    from launch.config import reader

    files, knobs = list(options.gin_file), list(bindings)
    if command.reads is not None:
        first, more = command.reads(options)
        _refuse_twice(knobs, more)
        files, knobs = [*first, *files], [*knobs, *more]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.metadata["macro"] and value is not None:
            # Quoted, because a prompt may hold quotes and % of its own.
            knobs.append(f"{field.metadata['macro']}={value!r}")
    if not files:
        raise UsageError(
            "no configuration: give --gin_file=FILE, such as "
            "--gin_file=configs/runs/demo.gin"
        )
    return reader.read(files, knobs)


def _refuse_twice(given: Sequence[str], more: Sequence[str]) -> None:
    """Refuses knobs on the command line that would be ignored."""
    fixed = dict(binding.split("=", 1) for binding in more)
    for binding in given:
        macro, value = binding.split("=", 1)
        if fixed.get(macro, value).strip("'\"") != value.strip("'\""):
            raise UsageError(
                f"--gin.{binding} would be ignored: {macro} = {fixed[macro]} is what "
                "the folder that is named says; leave it out"
            )


# ---------------------------------------------------------------------- what is said


def _help() -> str:
    """All verbs, by what they are for."""
    groups: dict[str, list[str]] = {}
    every = commands.every()
    width = max(map(len, every)) + 2
    for name, command in every.items():
        line = f"  {name:{width}}{command.summary}"
        groups.setdefault(command.group, []).append(line)
    verbs = "\n\n".join(
        "\n".join([f"{group}:", *lines]) for group, lines in groups.items()
    )
    usage = "usage: switchyard VERB [--gin_file=FILE ...] [--gin.MACRO=VALUE ...]"
    return f"{usage}\n\n{_ABOUT}\n{verbs}\n\n{_EXAMPLES}"


def _version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("switchyard")
    return "(not installed)"


def _first_line(
    name: str,
    command: Command,
    config: "ResolvedConfig",
    on: "ResolvedConfig",
    options: Options,
) -> str:
    """Says in one line what is about to happen, on what, and where to."""
    parts = [f"switchyard {_version()}", name, config.where]
    if command.about is not None:
        parts += command.about(config, options)
    else:
        parts += [commands.devices_in_words(on), on.settings.loop.model_dir]
    return " · ".join(parts)
