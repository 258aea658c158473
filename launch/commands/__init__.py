"""The verbs of the command line, one file each.

A new verb is one new file: `NAME.py` here, with a `COMMAND`, is `switchyard NAME`; a
folder is a verb with verbs of its own. Nothing lists them. A package of somebody else
adds a verb by an entry point of the group "switchyard.commands" that names its module.

These files are read for every help, so they import the standard library,
`launch.errors` and this module alone; what a verb works with is imported by its
functions when they are called.
"""

import dataclasses
import glob
import importlib
import importlib.metadata
import os
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR, UsageError, nearest

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig

ENTRY_POINTS = "switchyard.commands"
_DEVICES = {"cuda": ("/dev/nvidia[0-9]*",), "tpu": ("/dev/accel*", "/dev/vfio/[0-9]*")}
# In the order of help; other groups follow.
GROUPS = ("Train", "Use a model", "Data", "Before paying for a pod")


def option(
    help: str, default: Any = None, *, metavar: str = "", macro: str = ""
) -> Any:
    """Describes a field of a verb's options: the flag `--FIELD`.

    Args:
        help: what it does, for `--help`.
        default: value where it is not given; `...` if it must be.
        metavar: what stands for its value in help.
        macro: knob that it sets, like `--gin.MACRO=VALUE`; "" sets none.
    """
    words = {"help": help, "metavar": metavar, "macro": macro}
    if default is ...:
        return dataclasses.field(metadata=words)
    return dataclasses.field(default=default, metadata=words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every verb accepts.

    A verb adds fields of type bool (a switch), str, int, float, Literal (choices), any
    of these or None, or a tuple of texts (a flag that may be repeated).
    """

    gin_file: tuple[str, ...] = option(
        "gin file to read; may be given several times", (), metavar="FILE"
    )
    quiet: bool = option("print results, warnings and errors only", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What a verb accepts that works on a checkpoint of a run."""

    model_dir: str = option("folder of the run", ..., metavar="DIR")
    step: int | None = option("checkpoint to take; default: the newest", metavar="N")


def _as_read(config: "ResolvedConfig", options: Any) -> "ResolvedConfig":
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A verb.

    Attributes:
        group: heading under which help lists it.
        summary: one line of help.
        description: what `switchyard VERB --help` says, with examples.
        run: function of the configuration and the options; returns the exit code.
        options: record of the flags.
        words: options that may be given as bare words too, in this order.
        ending: text of help after the flags.
        exit_codes: codes with which it ends, and what they mean where that is not
            what `errors.EXIT_CODES` says.
        reads: function of the options; returns gin files that are read first, and
            bindings that are read last.
        devices: function of the configuration and the options; returns the
            configuration whose platform and mesh jax is started for. None if the verb
            starts no jax, or starts it by itself.
        keeps_nothing: whether a signal may end the verb as it is, be it inside the
            compiler. One that has something to keep, or ends others, sees to it.
        restarts: function of the options; returns how often the verb is started again,
            each time in a child process, when it dies. None if it never is.
        about: function of the configuration and the options; returns what the first
            line says after the configuration's name, where it is not the devices.
    """

    group: str
    summary: str
    description: str
    run: Callable[["ResolvedConfig", Any], int]
    options: type[Options]
    words: tuple[str, ...] = ()
    ending: str = ""
    exit_codes: Mapping[int, str] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            (EXIT_DONE, EXIT_USER_ERROR, EXIT_FAULT), ""
        )
    )
    reads: Callable[[Any], tuple[list[str], list[str]]] | None = None
    devices: Callable[["ResolvedConfig", Any], "ResolvedConfig"] | None = _as_read
    keeps_nothing: bool = False
    restarts: Callable[[Any], int] | None = None
    about: Callable[["ResolvedConfig", Any], list[str]] | None = None


def find(words: Sequence[str]) -> tuple[str, Command, list[str]]:
    """Finds the verb that a command line begins with.

    Returns:
        Its name, the command, and the words that are left.
    Raises:
        UsageError: there is no such verb.
    """
    verbs, name = modules(), ""
    for place, word in enumerate(words, 1):
        if word not in verbs:
            raise UsageError(
                f"{f'{name} {word}'.strip()!r} is not a verb{nearest(word, verbs)}; "
                f"the verbs are {', '.join(verbs)}; see switchyard --help"
            )
        name, module = f"{name} {word}".strip(), _imported(verbs[word])
        if isinstance(module, str):
            raise UsageError(f"{name}, a verb of another package, {module}")
        if hasattr(module, "COMMAND"):
            return name, module.COMMAND, list(words[place:])
        verbs = _within(module)
    raise UsageError(f"{name} is followed by one of {', '.join(verbs)}")


def modules() -> dict[str, str]:
    """Returns the verbs, and the module of each."""
    import launch.commands

    others = importlib.metadata.entry_points(group=ENTRY_POINTS)
    # Switchyard's own win: installing a package cannot change what `train` does.
    return {one.name: one.value for one in others} | _within(launch.commands)


def every() -> dict[str, Command]:
    """Returns all commands by name, those of folders as "VERB SUBVERB".

    One of another package that cannot be had is there with the reason as its summary.
    """
    found: dict[str, Command] = {}

    def visit(prefix: str, verbs: dict[str, str]) -> None:
        for word, path in verbs.items():
            module = _imported(path)
            if isinstance(module, str):
                found[f"{prefix}{word}"] = _missing(module)
            elif hasattr(module, "COMMAND"):
                found[f"{prefix}{word}"] = module.COMMAND
            else:
                visit(f"{prefix}{word} ", _within(module))

    visit("", modules())
    order = {group: place for place, group in enumerate(GROUPS)}
    return dict(
        sorted(found.items(), key=lambda item: order.get(item[1].group, len(order)))
    )


def _imported(path: str) -> ModuleType | str:
    """The module of a verb; of one of another package that fails, in what way."""
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever another package raises
        if path.startswith(f"{__name__}."):
            raise
        return f"cannot be imported: {type(error).__name__}: {error}"
    if hasattr(module, "COMMAND") or hasattr(module, "__path__"):
        return module
    return f"cannot be used: {path} has no COMMAND"


def _missing(reason: str) -> Command:
    return Command(
        group="Not to be had",
        summary=reason,
        description=reason,
        run=lambda config, options: EXIT_USER_ERROR,
        options=Options,
    )


def _within(package: ModuleType) -> dict[str, str]:
    return {
        one.name: f"{package.__name__}.{one.name}"
        for one in pkgutil.iter_modules(package.__path__)
    }


# ------------------------------------------------------------------ what several share


def kept_by_run(options: Any) -> tuple[list[str], list[str]]:
    """Returns the configuration that a run has kept, and where its folder is now.

    Where the run's hardware is not, one device of this machine takes its place.

    Raises:
        UsageError: the folder is not one of a run.
    """
    folder = os.path.expanduser(options.model_dir)
    if not folder.strip():
        raise UsageError(
            "--model_dir is empty: give the folder of a run, such as "
            f"--model_dir=runs/demo{_runs_beside(Path('runs/demo'))}"
        )
    written = Path(folder, "config.gin")
    if not written.is_file():
        raise UsageError(
            f"{written} is not there: --model_dir is the folder of a run that "
            f"`switchyard train` has started{_runs_beside(Path(folder))}"
        )
    files = [str(written)]
    if not _is_here(written.read_text(encoding="utf-8")):
        files.append("hardware/here.gin")
    return files, [f"MODEL_DIR={folder!r}"]


def _is_here(config: str) -> bool:
    """Whether the devices that a run has had may be those of this process.

    A GPU or TPU shows in the file system; and who belongs to a job is told so by what
    started it.
    """
    from launch.job.together import OF_A_JOB

    kept = dict(re.findall(r"^(PLATFORM|NUM_PROCESSES) = (\S+)", config, re.MULTILINE))
    devices = _DEVICES.get(kept.get("PLATFORM", "").strip("'\""), ())
    there = not devices or any(glob.glob(pattern) for pattern in devices)
    alone = kept.get("NUM_PROCESSES", "1") == "1"
    return there and (alone or bool(OF_A_JOB & os.environ.keys()) or bool(devices))


def _runs_beside(folder: Path) -> str:
    """Names the runs that the user may have meant, to end a message with."""
    parent = folder.absolute().parent
    names = sorted(
        str(folder.parent / p.parent.name) for p in parent.glob("*/config.gin")
    )
    return f"; runs beside it: {', '.join(names[:5])}" if names else ""


def store_of(config: "ResolvedConfig", options: Options) -> list[str]:
    """Says which text a verb is about, and where its tokens are."""
    del options
    data = config.settings.data
    return [data.mixture_or_task_name, data.store_dir]


def allow_module() -> Any:
    """Describes the flag with which code of the user's may run."""
    return option(
        "import what the configuration names and is not Switchyard's own "
        "(MIXTURE_OR_TASK_MODULE, ROUTER, OBJECTIVE, OPTIMIZER, SCHEDULE), and so run "
        "its code",
        False,
    )


def allowed_modules(config: "ResolvedConfig", options: Any) -> tuple[str, ...]:
    """Returns the modules whose code may be run."""
    named = config.settings.data.mixture_or_task_module
    return (named,) if options.allow_module else ()


def devices_in_words(config: "ResolvedConfig") -> str:
    """Returns words such as "4 simulated CPU devices, data 2 × expert 2"."""
    platform, mesh = config.settings.platform, config.settings.mesh
    axes = {axis: getattr(mesh, axis) for axis in mesh.__dataclass_fields__}
    large = " × ".join(f"{axis} {size}" for axis, size in axes.items() if size > 1)
    kinds = {"cpu": "CPU", "cuda": "GPU", "tpu": "TPU", "auto": ""}
    kind = f"{kinds[platform.name]} device".strip()
    simulated = platform.simulated_devices * max(platform.num_processes, 1)
    if simulated > 1:
        kind = f"simulated {kind}"
    number = max(simulated, mesh.num_devices)
    if number == 1:
        return f"1 {kind}"
    return f"{number} {kind}s, {large or 'one of them used'}"
