"""What a run's folder knows of its earlier checkpoints."""

import json
import os
from pathlib import Path

from launch.checkpoints.places import CheckpointError, folder_of, steps_in
from launch.checkpoints.retention import losses_of, stalled_of
from launch.checkpoints.writing import writing
from launch.records.lines import METRICS_FILE, last_step
from launch.records.read import Records

# Beside `checkpoints`, so that a run whose checkpoints were deleted can be told from
# one that has saved none yet.
SAVED_FILE = "newest_saved.json"


def remember_saved(model_dir: Path, step: int) -> None:
    """Keeps the newest step that was ever saved whole."""
    file = model_dir / SAVED_FILE
    part = file.with_suffix(".part")
    with writing(file):
        part.write_text(json.dumps({"step": step}), encoding="utf-8")
        os.replace(part, file)


def refuse_deleted(model_dir: Path) -> None:
    """Does nothing unless a run's checkpoints are gone and its metrics are not.

    Raises:
        CheckpointError: they are; the run would begin again, and write over them.
    """
    folder = folder_of(model_dir)
    if steps_in(folder):
        return
    saved = _remembered(model_dir)
    if saved is None and folder.exists():
        return  # it ended before it had saved anything
    last = last_step(model_dir) or 0
    if last < 1:
        return
    known = "" if saved is None else f"; step {saved:,} was saved"
    raise CheckpointError(
        f"{folder} holds no checkpoint, but {METRICS_FILE} beside it goes to step "
        f"{last:,}{known}: put the checkpoints back, take another MODEL_DIR, or delete "
        f"{model_dir / METRICS_FILE} to start afresh"
    )


def known(
    model_dir: Path, *, losses: bool
) -> tuple[list[tuple[int, float]], list[int]]:
    """Returns what retention must know: held-out losses by step, and stalled steps.

    Args:
        model_dir: the run.
        losses: whether losses are wanted; else there are none.
    """
    folder = folder_of(model_dir)
    found = losses_of(Records(model_dir).each("heldout")) if losses else {}
    return list(found.items()), stalled_of(folder, steps_in(folder))


def _remembered(model_dir: Path) -> int | None:
    """The newest step that was ever saved; None if none is known of."""
    try:
        found = json.loads((model_dir / SAVED_FILE).read_text(encoding="utf-8"))
        return int(found["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
