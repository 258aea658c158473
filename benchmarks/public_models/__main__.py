"""Logits of whole public models, as `transformers` computes them, beside ours.

    pip install -e '.[convert]'
    python -m benchmarks.public_models [FAMILY ...]

A model of each family with random weights, of 2 layers, or 4 of Llama 4, and width 32,
reads 2 rows of 12 tokens in float32 on the CPU: no weights are downloaded.
`families.py` has each in their words and in ours, `launch/exchange/tables.py` how its
arrays become ours. Prints the largest difference of logits over the largest logit, and
in how many of their choices of experts the tokens agree; exits with 1 where a
difference is above 1e-5 or a choice is another one.
"""

import argparse
import importlib.util

import numpy as np

from benchmarks.public_models import families
from benchmarks.public_models.families import FAMILIES
from launch.config.platform import prepare_environment
from launch.config.settings import PlatformSettings

LARGEST_DIFFERENCE = 1e-5


def main() -> None:
    """Compares the families, and prints a line for each."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.public_models",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "family", nargs="*", help=f"{', '.join(FAMILIES)}; all if none is named"
    )
    chosen = parser.parse_args().family
    if unknown := [name for name in chosen if name not in FAMILIES]:
        parser.error(f"no family {', '.join(unknown)}: there are {', '.join(FAMILIES)}")
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this compares with transformers: pip install -e '.[convert]'")
    prepare_environment(PlatformSettings(name="cpu"))
    from benchmarks.public_models import theirs

    print(f"transformers {theirs.VERSION}; difference over the largest logit")
    print(f"{'family':14s} difference  choices of experts that agree")
    fine = [compare(name) for name in chosen or FAMILIES]
    raise SystemExit(not all(fine))


def compare(name: str) -> bool:
    """Prints how a family compares, and says whether it is the same."""
    from benchmarks.public_models import ours, theirs

    family = FAMILIES[name]
    shape = families.ROWS, families.LENGTH
    token_BL = np.random.default_rng(0).integers(3, families.VOCAB, shape)
    arrays, logits_BLV, chosen = theirs.computed(family, token_BL)
    our_logits_BLV, our_chosen = ours.computed(family, arrays, token_BL)
    largest = np.abs(logits_BLV).max()
    difference = float(np.abs(our_logits_BLV - logits_BLV).max() / largest)
    same, total = int((our_chosen & chosen).sum()), int(chosen.sum())
    agreement = f"{same} of {total}" if total else "none are made"
    print(f"{name:14s} {difference:.1e}     {agreement}", flush=True)
    return difference <= LARGEST_DIFFERENCE and same == total


if __name__ == "__main__":
    main()
