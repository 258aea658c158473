"""Every file of a checkpoint, spoilt in every way: fallen back from, or the same."""

from collections import Counter
from pathlib import Path

from benchmarks.reliability import lives
from launch.config import reader
from launch.run.assemble import assemble
from tests.support import damage

_WAYS = {
    "flip": "a bit flipped",
    "truncate": "truncated",
    "empty": "emptied",
    "delete": "deleted",
    "replace": "replaced by another run's",
}


def spoilt(shared: Path, store: Path, whole: Path) -> Counter[tuple[str, str]]:
    """Spoils each file of the newest checkpoint of a run in each way, and goes on.

    Starts jax in this process: no life may be begun afterwards.

    Args:
        shared: folder for another run.
        store: prepared tokens.
        whole: a finished run; it is only read.
    Returns:
        Number of cases by way and outcome.
    """
    other = shared / "other_run"
    life = lives.Life(lives.words_of(other, store, SEED=1), shared / "other_run.log")
    if code := life.end():
        raise RuntimeError(f"the other run ended with {code}")
    run = assemble(reader.read([str(whole / "config.gin")], []))
    cases = damage.injected(whole, other, run)
    return Counter((_WAYS[case.fault], case.outcome) for case in cases)
