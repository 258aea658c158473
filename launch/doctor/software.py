"""Versions, foreign modules, what preparing needs, and how text is encoded."""

import importlib.metadata
import importlib.util
import locale
import os
import platform
import re
import subprocess
import sys
import tempfile

from launch.doctor import shadows
from launch.doctor.line import Line, Verdict
from launch.errors import is_utf8
from launch.terminal.lines import waiting

_OURS = "switchyard"
# Shown; of what else a run needs, only what is missing or too old.
_SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
_PLUGINS = re.compile(r"libtpu|jax-(cuda\d+|rocm\d+)-(plugin|pjrt)", re.IGNORECASE)
_OLDEST_PYTHON = (3, 11)
# How both are imported by what prepares; only then do they show what they lack.
_IMPORT = "import tensorflow, seqio"
_IMPORT_SECONDS = 300.0


def versions() -> list[Line]:
    """Returns Python, Switchyard, what it needs, and the plugins of accelerators."""
    old = sys.version_info < _OLDEST_PYTHON
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    lines = [
        Line(
            "versions",
            "python",
            f"{platform.python_version()} on {platform.platform(terse=True)}",
            "problem" if old else "fine",
            f"install Python {wanted} or newer" if old else "",
        )
    ]
    ours = _version(_OURS)
    lines.append(
        Line(
            "versions",
            _OURS,
            f"{ours or 'not installed'}, in {shadows.ours()}",
            "fine" if ours else "note",
            "" if ours else "`pip install -e .` tells which versions it needs",
        )
    )
    needed = minimums()
    for name in dict.fromkeys((*_SHOWN, *needed)):
        line = _needed(name, needed.get(name, ""))
        if name in _SHOWN or line.verdict != "fine":
            lines.append(line)
    return lines + [
        Line("versions", name, version) for name, version in _plugins().items()
    ]


def minimums() -> dict[str, str]:
    """Returns the oldest version of each package that a run needs, "" for any."""
    try:
        requirements = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = {}
    for text in requirements:
        requirement, _, marker = text.partition(";")
        if "extra" in marker:
            continue
        if name := re.match(r"[\w.-]+", requirement):
            oldest = re.search(r">=\s*([\w.]+)", requirement)
            found[name[0]] = oldest[1] if oldest else ""
    return found


def older(version: str, oldest: str) -> bool:
    """Says whether a version is below another, by their numbers."""
    return _numbers(version) < _numbers(oldest)


def _needed(name: str, oldest: str) -> Line:
    version, wanted = _version(name), f"{name}>={oldest}" if oldest else name
    if version is None:
        advice = f"`pip install '{wanted}'`: a run needs it"
        return Line("versions", name, "not installed", "problem", advice)
    if oldest and older(version, oldest):
        value = f"{version}, older than {oldest}"
        advice = f"`pip install --upgrade '{wanted}'`"
        return Line("versions", name, value, "problem", advice)
    return Line("versions", name, f"{version}{f' (>= {oldest})' if oldest else ''}")


def _plugins() -> dict[str, str]:
    names = {
        str(one.metadata["Name"]): one.version
        for one in importlib.metadata.distributions()
        if one.metadata["Name"] and _PLUGINS.fullmatch(one.metadata["Name"])
    }
    return dict(sorted(names.items()))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in release[0].split(".")] if release else [0]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def packages() -> list[Line]:
    """Returns whether our packages are ours, and what else bears their names."""
    wrong, others = shadows.found_instead(), shadows.beside()
    if wrong:
        value = ", ".join(wrong)
        return [Line("packages", "ours", value, "problem", shadows.sentence(wrong))]
    if not others:
        return [Line("packages", "ours", f"all in {shadows.ours()}")]
    advice = "not imported now; started from another folder it could be: rename it"
    return [
        Line("packages", name, f"another one is {where}", "note", advice)
        for name, where in others.items()
    ]


def preparing(needed: bool | None, *, quiet: bool) -> Line:
    """Returns whether SeqIO and TensorFlow are there, as far as that matters.

    Args:
        needed: whether a store is still to be prepared; None if nobody knows.
        quiet: whether no progress is shown.
    """
    group, name = "preparing", "seqio, tensorflow"
    absent = [one for one in ("seqio", "tensorflow") if not _is_there(one)]
    if needed is False:
        state = f"{' and '.join(absent)} not installed" if absent else "installed"
        return Line(group, name, f"{state}; not needed, the store is there")
    advice = "`pip install 'switchyard[data]'` (Python below 3.13) makes tokens here"
    verdict: Verdict = "problem" if needed else "note"
    if absent:
        return Line(group, name, f"{' and '.join(absent)} missing", verdict, advice)
    with (
        waiting("importing seqio and tensorflow", quiet=quiet),
        tempfile.TemporaryFile() as output,
    ):
        try:
            done = subprocess.run(
                [sys.executable, "-c", _IMPORT],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=_IMPORT_SECONDS,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )
        except subprocess.TimeoutExpired:
            value = f"not imported within {_IMPORT_SECONDS:.0f} s"
            return Line(group, name, value, verdict, advice)
        output.seek(0)
        said = output.read().decode(errors="replace").strip().splitlines()
    if done.returncode:
        last = said[-1][:200] if said else f"exit code {done.returncode}"
        return Line(group, name, f"cannot be imported: {last}", verdict, advice)
    found = ", ".join(f"{one} {_version(one)}" for one in ("seqio", "tensorflow"))
    return Line(group, name, f"can be imported: {found}")


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def encoding() -> list[Line]:
    """Returns how text is encoded here: names of files, files, and the terminal."""
    names = sys.getfilesystemencoding().lower()
    text = locale.getpreferredencoding(False).lower()
    terminal = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    value = f"names {names}, text {text}, output {terminal}"
    advice = "`export LC_ALL=C.UTF-8` or `export PYTHONUTF8=1`"
    folder = os.getcwd()
    if not is_utf8(folder):
        advice = "start from a folder whose name is UTF-8"
        return [Line("text", "encoding", value, "problem", advice)]
    if not _utf8(names):
        advice = f"names of files with other letters than ASCII fail: {advice}"
        return [Line("text", "encoding", value, "problem", advice)]
    if not (_utf8(text) and _utf8(terminal)):
        advice = f"other letters than ASCII are shown as '?': {advice}"
        return [Line("text", "encoding", value, "note", advice)]
    return [Line("text", "encoding", value)]


def _utf8(name: str) -> bool:
    return name.replace("_", "-") in ("utf-8", "utf8")
