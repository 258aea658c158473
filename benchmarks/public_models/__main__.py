"""Logits and gradients of whole public models, by `transformers`, beside ours.

    pip install -e '.[convert]'
    python -m benchmarks.public_models [FAMILY ...]

A model of each family with random weights, of 2 layers or a few, and width 32 or 35,
reads 2 rows of 12 tokens in float32 on the CPU: no weights are downloaded.
`families.py` has each in their words and in ours, the tables of `launch/exchange` how
its arrays become ours. Prints the largest difference of logits over the largest logit,
that of the gradients of a loss over the largest of them, and in how many of their
choices of experts the tokens agree; exits with 1 where a difference is above 1e-5 or a
choice is another one.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from typing import Any

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

    print(f"transformers {theirs.VERSION}; differences over the largest")
    print(f"{'family':20s} logits   gradients  choices of experts that agree")
    fine = [compare(name) for name in chosen or FAMILIES]
    raise SystemExit(not all(fine))


def compare(name: str) -> bool:
    """Prints how a family compares, and says whether it is the same."""
    import jax

    from benchmarks.public_models import ours, theirs

    family = FAMILIES[name]
    draw = np.random.default_rng(0)
    most = family.model_settings().vocab_size
    tokens = {
        stack: draw.integers(3, most, (families.ROWS, length))
        for stack, length in family.lengths().items()
    }
    label_BL = draw.integers(3, most, list(tokens.values())[-1].shape)
    right = theirs.computed(family, tokens, label_BL)
    made = ours.computed(family, right.arrays, tokens, label_BL)
    logits = _apart([made.logits_BLV], [right.logits_BLV])
    wanted = ours.parameters(family, ours.described(family), right.gradients)
    gradients = _apart(jax.tree.leaves(made.gradients), jax.tree.leaves(wanted))
    same = total = 0
    for ours_GE, theirs_TE in zip(made.chosen, right.chosen, strict=True):
        theirs_GE = theirs_TE.reshape(len(ours_GE), -1, theirs_TE.shape[-1]).sum(1)
        same += int(np.minimum(ours_GE, theirs_GE).sum())
        total += int(theirs_TE.sum())
    agreement = f"{same} of {total}" if total else "none are made"
    print(f"{name:20s} {logits:.1e}  {gradients:.1e}    {agreement}", flush=True)
    return max(logits, gradients) <= LARGEST_DIFFERENCE and same == total


def _apart(made: Sequence[Any], right: Sequence[Any]) -> float:
    """Largest difference, over the largest number."""
    pairs = zip(made, right, strict=True)
    return float(
        max(np.abs(one - other).max() for one, other in pairs)
        / max(np.abs(other).max() for other in right)
    )


if __name__ == "__main__":
    main()
