"""Damages every file of a checkpoint in every way, and says what a run makes of it.

cases = damage.injected(model_dir, other_dir, run)
print(damage.table(cases))
"""

import collections
import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from launch.checkpoints.names import named_arrays
from launch.checkpoints.newest import from_newest
from launch.checkpoints.places import CheckpointError, folder_of, steps_in
from launch.checkpoints.store import Checkpoints
from launch.run.assemble import Run
from moe.training.train_state import TrainState

FELL_BACK, REFUSED = "fell back", "refused"
UNHARMED, LEARNT = "same bits", "LEARNT FROM IT"
OUTCOMES = (FELL_BACK, REFUSED, UNHARMED, LEARNT)


@dataclasses.dataclass(frozen=True)
class Case:
    """What became of one fault.

    Attributes:
        file: what was damaged, below the folder of the step.
        fault: how, one of FAULTS.
        outcome: one of OUTCOMES.
        said: what the user was told.
    """

    file: str
    fault: str
    outcome: str
    said: str


def _flip(file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def _truncate(file: Path, other: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


FAULTS: Mapping[str, Callable[[Path, Path], object]] = {
    "flip": _flip,
    "truncate": _truncate,
    "empty": lambda file, other: file.write_bytes(b""),
    "delete": lambda file, other: file.unlink(),
    "replace": lambda file, other: file.write_bytes(other.read_bytes()),
}


def injected(
    model_dir: Path,
    other_dir: Path,
    run: Run,
    faults: Sequence[str] = tuple(FAULTS),
    is_wanted: Callable[[str], bool] = lambda file: True,
) -> list[Case]:
    """Damages the newest checkpoint of copies of a run, one fault at a time.

    Args:
        model_dir: the run, of two checkpoints or more; it is only read.
        other_dir: another run of the same model, whose files replace the first's.
        run: the run, assembled, to restore it with.
        faults: which faults.
        is_wanted: which files, by their path below the folder of the step.
    """
    newest = steps_in(folder_of(model_dir))[-1]
    other = folder_of(other_dir) / str(steps_in(folder_of(other_dir))[-1])
    steps = steps_in(folder_of(model_dir))
    right = {step: _bits(_restored(model_dir, step, run)) for step in steps[-2:]}
    path, cases = folder_of(model_dir) / str(newest), []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = str(file.relative_to(path))
        if not is_wanted(name):
            continue
        for fault in faults:
            with _copy(model_dir) as copy:
                damaged = folder_of(copy) / str(newest) / name
                FAULTS[fault](damaged, _counterpart(file, path, other))
                cases.append(Case(name, fault, *_outcome(copy, run, right)))
    return cases


def table(cases: Sequence[Case]) -> str:
    """Lays out outcomes: files down, faults across, and how often each came."""
    faults = list(dict.fromkeys(case.fault for case in cases))
    found = {(case.file, case.fault): case.outcome for case in cases}
    files = list(dict.fromkeys(case.file for case in cases))
    width = max(map(len, files))
    lines = [" ".join([" " * width, *(f"{fault:14}" for fault in faults)])]
    for file in files:
        cells = (f"{found.get((file, fault), '–'):14}" for fault in faults)
        lines.append(" ".join([f"{file:{width}}", *cells]))
    counts = collections.Counter(case.outcome for case in cases)
    lines.append(", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES))
    return "\n".join(line.rstrip() for line in lines)


def _outcome(
    model_dir: Path, run: Run, right: Mapping[int, Mapping[str, bytes]]
) -> tuple[str, str]:
    """Goes on from a run as `train` does."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), Checkpoints(str(model_dir), 9) as saved:

            def restore(step: int | None) -> tuple[int, TrainState]:
                assert step is not None, "a damaged run must not begin again"
                return step, saved.restore(step, run)

            step, state = from_newest(saved, restore)
    except CheckpointError as error:
        return REFUSED, str(error)
    same = step in right and _bits(state) == right[step]
    if not same:
        return LEARNT, said.getvalue()
    return (UNHARMED if step == max(right) else FELL_BACK), said.getvalue()


def _restored(model_dir: Path, step: int, run: Run) -> TrainState:
    with Checkpoints(str(model_dir), 1, read_only=True) as saved:
        return saved.restore(step, run)


def _bits(state: TrainState) -> dict[str, bytes]:
    return {
        name: np.asarray(jax.device_get(array)).tobytes()
        for name, array in named_arrays(state).items()
    }


def _counterpart(file: Path, path: Path, other: Path) -> Path:
    """The file of another checkpoint in the place of this one; names are drawn."""
    same = other / file.relative_to(path)
    if same.is_file():
        return same
    here = sorted(file.parent.iterdir()).index(file)
    there = sorted((other / file.parent.relative_to(path)).iterdir())
    return there[here % len(there)]


@contextlib.contextmanager
def _copy(model_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield shutil.copytree(model_dir, Path(folder, "run"))
