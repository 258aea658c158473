"""The command line: `switchyard VERB --gin_file=FILE --gin.MACRO=VALUE`.

Help needs neither gin nor jax. A verb reads its configuration, sets the environment of
jax, and says what it is about to do; only then is its own module imported.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    UsageError,
    is_user_error,
    nearest,
)
from launch.verbs import ABOUT, EXAMPLES, SAMPLE_KNOBS, VERBS, Parser, Verb

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig
    from launch.config.settings import PlatformSettings, Settings
    from launch.job.together import Job


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
        return _run(words)
    except KeyboardInterrupt:
        print("switchyard: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _run(words: list[str]) -> int:
    """Reads the words, prepares the environment and calls the verb's module."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE
    if words[0] == "--version":
        print(f"switchyard {_version()}")
        return EXIT_DONE
    name, *rest = words
    if name not in VERBS:
        raise UsageError(
            f"{name!r} is not a verb{nearest(name, VERBS)}; "
            f"the verbs are {', '.join(VERBS)}; see switchyard --help"
        )
    verb = VERBS[name]
    options, bindings = _parse(name, verb, rest)
    config = _read_config(options, bindings)
    if verb.simulates:
        config = importlib.import_module(verb.module).simulated(config, options)
    lines = [_first_line(name, config, getattr(options, "topology", ""))]
    job = None
    if verb.uses_jax:
        job, told = _before_jax(config.settings.platform, options)
        lines += [f"  {line}" for line in told]
    if not options.quiet:
        print("\n".join(lines), file=sys.stderr, flush=True)
    # A module of the user's may lie in the working directory: `python -m launch` looks
    # there by itself, the console script does not.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module = "launch.dry_run" if getattr(options, "dry_run", False) else verb.module

    def work() -> int:
        return importlib.import_module(module).main(config, options)

    if job is None:
        return work()
    from launch.job import together

    return together.run(job, work, config)


def _before_jax(
    platform: "PlatformSettings", options: argparse.Namespace
) -> tuple["Job | None", list[str]]:
    """Sets the environment of jax, and finds out whether others run this job too."""
    from launch.config.platform import prepare_environment

    if getattr(options, "dry_run", False):
        platform = _alone(platform)
    lines = prepare_environment(platform)
    if platform.num_processes == 1:
        return None, lines
    from launch.job import together

    job = together.find(platform)
    if job is not None and job.process > 0:
        options.quiet = True  # the first one speaks for all
    return job, [*lines, str(job or "one process, alone")]


def _alone(platform: "PlatformSettings") -> "PlatformSettings":
    """One process in place of a job's: a dry run simulates the devices of them all."""
    together = platform.simulated_devices * max(platform.num_processes, 1)
    return dataclasses.replace(
        platform,
        num_processes=1,
        simulated_devices=together,
        coordinator_address="",
        process_id=-1,
    )


# ------------------------------------------------------------------ words and flags


def _parse(
    name: str, verb: Verb, words: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """Splits the words into the verb's own options and bindings of macros."""
    parser = Parser(
        prog=f"switchyard {name}",
        usage=f"switchyard {name} [OPTION=VALUE ...] [--gin.MACRO=VALUE ...]",
        description=verb.description,
        epilog=verb.epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.flags(parser)
    parser.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="gin file to read; may be given several times",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="print results, warnings and errors only",
    )
    bindings = [word.removeprefix("--gin.") for word in words if _is_binding(word)]
    for binding in bindings:
        if "=" not in binding:
            raise UsageError(f"--gin.{binding} needs a value: --gin.{binding}=VALUE")
    options, unknown = parser.parse_known_args(
        [word for word in words if not _is_binding(word)]
    )
    if unknown:
        word = unknown[0]
        known = [flag for flag in parser._option_string_actions if flag[:2] == "--"]
        hint = nearest(word.partition("=")[0], known)
        if not word.startswith("-"):
            hint = "; options are written --name=value"
        elif word.lstrip("-").partition("=")[0].isupper():
            hint = f"; knobs are written --gin.{word.lstrip('-')}"
        parser.error(f"{word!r} is not an option of {name}{hint}")
    return options, bindings


def _is_binding(word: str) -> bool:
    return word.startswith("--gin.")


# -------------------------------------------------------------------- configuration


def _read_config(
    options: argparse.Namespace, bindings: Sequence[str]
) -> "ResolvedConfig":
    """Reads the gin files of a command, and those of the run it is about."""
    from launch.config import reader

    files, knobs = list(options.gin_file), list(bindings)
    if (model_dir := getattr(options, "model_dir", None)) is not None:
        if not model_dir.strip():
            raise UsageError(
                "--model_dir is empty: give the folder of a run, such as "
                f"--model_dir=runs/demo{_runs_beside(Path('runs/demo'))}"
            )
        written = Path(model_dir, "config.gin")
        if not written.is_file():
            raise UsageError(
                f"{written} is not there: --model_dir is the folder of a run that "
                f"`switchyard train` has started{_runs_beside(Path(model_dir))}"
            )
        files.insert(0, str(written))
        knobs.append(f"MODEL_DIR={model_dir!r}")  # the folder may have been moved
        for option, (macro, _) in SAMPLE_KNOBS.items():
            if (value := getattr(options, option, None)) is not None:
                # Quoted, because a prompt may hold quotes and % of its own.
                text = repr(value) if option == "prompt" else value
                knobs.append(f"{macro}={text}")
    if getattr(options, "self_check", None):
        knobs.append(f"SELF_CHECK={options.self_check!r}")
    if not files:
        raise UsageError(
            "no configuration: give --gin_file=FILE, such as "
            "--gin_file=configs/runs/demo.gin"
        )
    return reader.read(files, knobs)


def _runs_beside(folder: Path) -> str:
    """Names the runs that the user may have meant, to end a message with."""
    parent = folder.absolute().parent
    names = sorted(
        str(folder.parent / p.parent.name) for p in parent.glob("*/config.gin")
    )
    return f"; runs beside it: {', '.join(names[:5])}" if names else ""


# ---------------------------------------------------------------------- what is said


def _help() -> str:
    verbs = "\n".join(f"  {name:10}{verb.summary}" for name, verb in VERBS.items())
    usage = "usage: switchyard VERB [--gin_file=FILE ...] [--gin.MACRO=VALUE ...]"
    return f"{usage}\n\n{ABOUT}\nverbs:\n{verbs}\n\n{EXAMPLES}".rstrip()


def _version() -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("switchyard")
    return "(not installed)"


def _first_line(name: str, config: "ResolvedConfig", topology: str) -> str:
    """Says in one line what is about to happen, on what, and where to."""
    settings = config.settings
    parts = [f"switchyard {_version()}", name, config.where]
    if topology:
        parts.append(topology)
    elif VERBS[name].uses_jax:
        parts += [_describe_devices(settings), settings.loop.model_dir]
    else:
        parts += [settings.data.mixture_or_task_name, settings.data.store_dir]
    return " · ".join(parts)


def _describe_devices(settings: "Settings") -> str:
    """Such as "4 simulated CPU devices, data 2 × expert 2"."""
    platform, mesh = settings.platform, settings.mesh
    axes = {axis: getattr(mesh, axis) for axis in mesh.__dataclass_fields__}
    large = " × ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
    kinds = {"cpu": "CPU", "cuda": "GPU", "tpu": "TPU", "auto": ""}
    kind = f"{kinds[platform.name]} device".strip()
    if platform.simulated_devices * max(platform.num_processes, 1) > 1:
        kind = f"simulated {kind}"
    simulated = platform.simulated_devices * max(platform.num_processes, 1)
    number = max(simulated, mesh.num_devices)
    if number == 1:
        return f"1 {kind}"
    return f"{number} {kind}s, {large or 'one of them used'}"
