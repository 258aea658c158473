"""Foreign modules that bear the names of our packages. Standard library only.

`tasks` and `configs` are names that others use too: which of them an import finds
depends on the working directory and on what else is installed.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("launch", "moe", "partitioning", "tasks", "configs")


def ours() -> Path:
    """Returns the folder that our packages are in."""
    return Path(__file__).resolve().parents[2]


def found_instead() -> dict[str, str]:
    """Returns the packages that an import does not find as ours, and what it finds."""
    wrong = {}
    for name in PACKAGES:
        try:
            spec = importlib.util.find_spec(name)
        except ValueError:  # a module in memory that says not where it is from
            spec = None
        where = "" if spec is None else _file_of(spec)
        if not where or Path(where).resolve() != ours() / name / "__init__.py":
            wrong[name] = where or "nothing"
    return wrong


def beside(folders: Iterable[str] | None = None) -> dict[str, str]:
    """Returns foreign modules of these names that an import could find.

    Args:
        folders: those that are searched; by default the working directory, and where
            Python looks for modules.
    """
    if folders is None:
        folders = [os.getcwd(), *sys.path]
    found: dict[str, str] = {}
    for folder in dict.fromkeys(os.path.realpath(folder or ".") for folder in folders):
        if Path(folder) == ours():
            continue
        for name in PACKAGES:
            # As Python prefers them; a folder without __init__.py hides no package.
            for end in (f"{name}/__init__.py", f"{name}.py"):
                file = Path(folder, end)
                if name not in found and file.is_file():
                    found[name] = str(file)
    return {name: found[name] for name in PACKAGES if name in found}


def sentence(wrong: dict[str, str]) -> str:
    """Says what was found in place of ours, and what to change."""
    named = " and ".join(f"{name!r} is {where}" for name, where in wrong.items())
    return (
        f"of Switchyard's packages in {ours()}, {named}: rename or move that away, or "
        "call `switchyard` from another folder, in an environment of its own"
    )


def _file_of(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.origin:
        return spec.origin
    return ", ".join(spec.submodule_search_locations or ())
