"""Where gin files lie, and what `base.gin` says of each knob's section."""

import functools
import importlib.resources
import os
import re
from pathlib import Path

from launch.errors import is_utf8, nearest

_SECTION = re.compile(r"# -{10,} (.+)")


def configs() -> Path:
    """Returns the installed `configs` folder."""
    return Path(str(importlib.resources.files("configs")))


def base() -> str:
    """Returns the text of `base.gin`."""
    return (configs() / "base.gin").read_text(encoding="utf-8")


@functools.cache
def sections() -> dict[str, str]:
    """Returns the title under which `base.gin` lists each knob."""
    found, title = {}, ""
    for line in base().splitlines():
        if heading := _SECTION.fullmatch(line):
            title = heading[1]
        elif knob := re.match(r"([A-Z][A-Z0-9_]*) = ", line):
            found[knob[1]] = title
    return found


def shown(path: Path) -> str:
    """Names a file as a reader would: relative to here, or to `configs`."""
    absolute = Path(os.path.abspath(path))
    for root, prefix in ((Path.cwd(), Path()), (configs(), Path("configs"))):
        if absolute.is_relative_to(root):
            return str(prefix / absolute.relative_to(root))
    return str(absolute)


def _places(name: str, folder: Path | None) -> list[Path]:
    """Where a gin file may be, in the order of the search.

    Args:
        name: path of the file, as it was written.
        folder: folder of the file that includes it; None on the command line.
    """
    ours = configs() / name.removeprefix("configs/")
    if folder is None:
        places = [Path(name), ours]
    elif folder.resolve().is_relative_to(configs().resolve()):
        places = [folder / name, ours]  # not what happens to lie here
    else:
        places = [folder / name, Path(name), ours]
    return list({os.path.abspath(place): place for place in places}.values())


def find(name: str, folder: Path | None) -> Path | str:
    """Returns a gin file; or why there is none, as a sentence.

    Args:
        name: path of the file, as it was written.
        folder: folder of the file that includes it; None on the command line.
    """
    if not is_utf8(name):
        return f"{name!r} is not UTF-8: rename that file"
    places = _places(name, folder)
    for path in places:
        if os.path.isfile(path):  # False, too, for what cannot be looked at
            return path
    if not name.strip():
        return "a file has no name: write --gin_file=FILE"
    folders = [path for path in places if os.path.isdir(path)]
    if folders:
        return f"{shown(folders[0])} is a folder: name a gin file that is in it"
    root = configs()
    known = [str(path.relative_to(root)) for path in root.rglob("*.gin")]
    return (
        f"{name} was not found; looked at "
        f"{', '.join(shown(path) for path in places)}"
        f"{nearest(name.removeprefix('configs/'), known)}"
    )
