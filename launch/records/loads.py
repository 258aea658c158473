"""How the experts are loaded: whole matrices in files of their own, and in few numbers.

A matrix of [layers][experts] is a file `loads/SPLIT/STEP.npy`, for `numpy.load`. It is
put in its place when it is whole, so that a kill leaves it or leaves none.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.terminal.training import load_extremes

LOADS_DIR = "loads"
LOAD = "router/load"

_FILE = re.compile(r"(\d{1,18})\.npy")
_DRAFT = re.compile(r"\d{1,18}\.npy\.tmp")


def summary(load_LE: np.ndarray) -> dict[str, Any]:
    """Describes a matrix in few numbers; {} where no layer has a finite load.

    Args:
        load_LE: [layers][experts] in any unit. NaN stands for experts that a layer has
            not.
    Returns:
        The most and the least loaded expert of all, with load over the mean of its
        layer; and of each layer the coefficient of variation over its experts.
    """
    extremes = load_extremes(load_LE)
    if extremes is None:
        return {}
    found: dict[str, Any] = {}
    for name, extreme in zip(("most", "least"), extremes, strict=True):
        found |= {
            f"{LOAD}_{name}": extreme.relative,
            f"{LOAD}_{name}_layer": extreme.layer,
            f"{LOAD}_{name}_expert": extreme.expert,
        }
    with np.errstate(invalid="ignore", divide="ignore"):
        there_LE = ~np.isnan(load_LE)
        sizes = {"axis": 1, "where": there_LE}
        variation_L = np.std(load_LE, **sizes) / np.mean(load_LE, **sizes)
    return found | {f"{LOAD}_variation_per_layer": variation_L.tolist()}


def save(
    model_dir: pathlib.Path, split: str, step: int, load_LE: np.ndarray
) -> pathlib.Path:
    """Writes a matrix as float32, whole or not at all, and returns its file."""
    folder = model_dir / LOADS_DIR / split
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step:012d}.npy"
    draft = path.with_name(f"{path.name}.tmp")
    with open(draft, "wb") as file:
        np.save(file, np.asarray(load_LE, np.float32), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    return path


def saved(model_dir: pathlib.Path, split: str) -> list[tuple[int, pathlib.Path]]:
    """Lists steps and files of a split's matrices, in order; passes over others."""
    folder = model_dir / LOADS_DIR / split
    if not folder.is_dir():
        return []
    found = [(_FILE.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def truncate(model_dir: pathlib.Path, step: int) -> None:
    """Removes matrices of later steps, and what a kill left of one."""
    root = model_dir / LOADS_DIR
    for folder in root.iterdir() if root.is_dir() else ():
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            match = _FILE.fullmatch(path.name)
            if _DRAFT.fullmatch(path.name) or (match and int(match[1]) > step):
                path.unlink()


def read(path: pathlib.Path) -> np.ndarray | None:
    """Reads a matrix; None where the file is damaged, or is none."""
    try:
        load_LE = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return _checked(load_LE)


def matrix(record: Mapping[str, Any]) -> np.ndarray | None:
    """Returns the matrix in a record, as versions before these files wrote it."""
    try:
        return _checked(np.array(record[LOAD], float))
    except (KeyError, ValueError, TypeError):
        return None


def _checked(load_LE: Any) -> np.ndarray | None:
    if not isinstance(load_LE, np.ndarray) or load_LE.dtype.kind != "f":
        return None
    return load_LE if load_LE.ndim == 2 and load_LE.size else None
