"""Injects faults into tiny runs and stores, and writes docs/reliability.md.

    python -m benchmarks.reliability [--minutes 30] [--faults 300] [--seed 0] [--print]

A run is killed, stopped and damaged at random instants until it is done, and compared
with one that was left in peace, to the last bit; then the next, for so many minutes and
so many faults, whichever takes longer. Jobs of two processes, preparations and
evaluations are killed too. Every file of a checkpoint and of a token store is spoilt in
every way. What a table says is what this command has counted.
"""

import argparse
import math
import random
import tempfile
import time
from pathlib import Path

from benchmarks.reliability import checkpoints, lives, others, page, soak, stores


def main() -> None:
    """Runs everything, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="length of the soak"
    )
    parser.add_argument("--faults", type=int, default=300, help="faults at least")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn")
    parser.add_argument("--store", type=Path, help="prepared tokens of runs/tiny.gin")
    parser.add_argument("--print", action="store_true", help="print the page only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reliability_") as folder:
        shared = Path(folder)
        lives.warm_up(shared / "compiled")
        store = options.store or shared / "tokens"
        if not store.exists():
            lives.prepare(store)
        tally = soak.soak(
            shared,
            store,
            seconds=60 * options.minutes,
            least_faults=options.faults,
            seed=options.seed,
            say=_say,
        )
        _say(f"{tally.lost} runs were not as the undisturbed one")
        rng, kills = random.Random(options.seed), math.ceil(options.faults / 9)
        killed = [
            others.pairs(shared, store, kills, rng, _say),
            others.preparations(shared, kills, rng, _say),
            others.evaluations(shared, tally.undisturbed, kills, rng, _say),
        ]
        began = time.monotonic()
        of_runs = checkpoints.spoilt(shared, store, tally.undisturbed)
        of_stores = stores.spoilt(shared, times=5, seed=options.seed)
        number = of_runs.total() + of_stores.total()
        _say(f"spoilt {number} files in {time.monotonic() - began:.0f} s")
    text = page.text(tally, killed, of_runs, of_stores)
    if options.print:
        print(text)
    else:
        page.PAGE.write_text(text, encoding="utf-8")
        _say(f"wrote {page.PAGE}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
