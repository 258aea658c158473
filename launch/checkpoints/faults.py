"""Everything that is wrong with a checkpoint, file by file and array by array."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from launch.checkpoints import located
from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import (
    CheckpointError,
    DamagedError,
    read_manifest,
    short,
)
from launch.checkpoints.sums import digest_of

# What Orbax keeps for itself: JSON, which nothing of Switchyard reads.
_OF_ORBAX = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one checkpoint.

    Attributes:
        path: its folder.
        num_arrays: how many arrays it should hold.
        num_bytes: size of all its files.
        faults: what is damaged, a line each; none if it is whole.
    """

    path: Path
    num_arrays: int
    num_bytes: int
    faults: tuple[str, ...]


def find(path: Path, progress: Callable[[str], None] = lambda name: None) -> Verdict:
    """Reads all of a checkpoint, and compares every array with its digest.

    Memory for a few pieces of an array is needed, and no devices.

    Args:
        path: the folder of a step.
        progress: told the name of each array before it is read.
    Raises:
        CheckpointError: it cannot be read for a reason that is no damage, such as a
            permission, or is of another format.
    """
    sizes = sizes_of(path)
    found = _unreadable(path)
    try:
        manifest = read_manifest(path)
    except DamagedError as damage:
        return Verdict(path, 0, sum(sizes.values()), (*found, damage.what))
    arrays, files = Arrays(path, manifest), dict[str, set[str]]()
    missing: dict[str, str] = {}  # by file
    try:
        for piece in located.pieces(path):
            files.setdefault(piece.array, set()).add(piece.file)
            if fault := located.fault_of(path, piece):
                missing.setdefault(piece.file, fault)
    except ValueError:  # found again, and said, by whichever array it is of
        pass
    found += missing.values()
    for name, said in arrays.saved.items():
        progress(name)
        try:
            digest = digest_of(tuple(said["shape"]), arrays.blocks(name))
        except DamagedError as damage:
            found.append(damage.what)
            continue
        if digest != said["digest"]:
            where = ", ".join(sorted(files.get(name, ()))) or "the nodes of state/d"
            found.append(f"{name} is not what was saved; it is in {where}")
    return Verdict(path, len(arrays.saved), sum(sizes.values()), tuple(_once(found)))


def sizes_of(path: Path) -> dict[str, int]:
    """Returns the size of every file of a checkpoint, by its path below it."""
    try:
        return {
            str(file.relative_to(path)): file.stat().st_size
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {short(error)}") from error


def _unreadable(path: Path) -> list[str]:
    """Files that Orbax keeps beside the arrays, and that are not as they should be."""
    of_processes = sorted((path / "state" / "array_metadatas").glob("*"))
    of_orbax = [path / name for name in _OF_ORBAX]
    if not any(file.exists() for file in of_orbax):
        return []  # a mean, which Orbax has not written
    found = []
    for file in [*of_orbax, *of_processes]:
        name = file.relative_to(path)
        try:
            json.loads(file.read_bytes())
        except FileNotFoundError:
            found.append(f"{name} is missing (nothing reads it)")
        except ValueError:
            found.append(f"{name} is not JSON (nothing reads it)")
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    return found


def _once(faults: list[str]) -> list[str]:
    """Without what several arrays say of the same file, but for the first two."""
    kept: list[str] = []
    by_file: dict[str, int] = {}
    for fault in faults:
        file = fault.partition(" ")[0] if fault.startswith("state/") else ""
        by_file[file] = by_file.get(file, 0) + 1
        if not file or by_file[file] <= 2:
            kept.append(fault)
    more = {file: n - 2 for file, n in by_file.items() if file and n > 2}
    kept += [
        f"{file}: {n:,} more arrays of it cannot be read" for file, n in more.items()
    ]
    return kept
