"""Digests of batches for fixed seeds: what a run reads must not change silently.

If it is meant to change, write the file anew, and say so where it is released, since
runs cannot be repeated across the change:

    python tests/tasks/test_batch_hashes.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from memory_store import pair_store, settings, text_store

from tasks.batches import heldout, training
from tasks.settings import MixtureSettings

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).with_name("batch_hashes.json")
BATCH, SEED = 8, 17
TEXT = {"news": 90, "code": 40, "talk": 7}
BOTH_WAYS = {"prefix_attention": "bidirectional"}
SCHEDULE = {
    0: {"news": 1, "code": 1, "talk": 0},
    20: {"news": 1, "code": 2, "talk": 1},
    1000: {"news": 0, "code": 1, "talk": 1},
}
CASES = {
    "causal_lm": {},
    "causal_lm stream": {"packing": "stream"},
    "causal_lm in stored order": {"shuffle": False},
    "prefix_lm": BOTH_WAYS,
    "span_corruption": {},
    "span_corruption bidirectional": BOTH_WAYS,
    "ul2": {},
    "seq2seq": {},
    "seq2seq bidirectional": BOTH_WAYS,
}
MIXTURES = {
    "rates": MixtureSettings(rates={"news": 0.6, "code": 0.3, "talk": 0.1}),
    "proportional": MixtureSettings(
        weighting="proportional", temperature=2.0, cap_tokens=2000
    ),
    "schedule": MixtureSettings(schedule=SCHEDULE),
}


def digest(batch: dict[str, np.ndarray]) -> str:
    """Hash of every feature with its name and its shape."""
    hashed = hashlib.sha256()
    for name in sorted(batch):
        feature = batch[name].astype("<i8")
        hashed.update(f"{name} {feature.shape}".encode() + feature.tobytes())
    return hashed.hexdigest()[:16]


def digests() -> dict[str, list[str]]:
    """Hashes of some batches of every objective and mixture."""
    found = {}
    for case, changes in CASES.items():
        objective = case.split()[0]
        store = pair_store(pairs=70) if objective == "seq2seq" else text_store(**TEXT)
        data = settings(objective, **changes)
        mixtures = {"rates": MixtureSettings()} if len(store.tasks) == 1 else MIXTURES
        for name, mixture in mixtures.items():
            batches = training(store, data, mixture, batch_size=BATCH, seed=SEED)
            found[f"{case}, {name}"] = [
                digest(batches.read(index, 0, BATCH))
                for index in (0, 1, 33, 10**6, 10**11)
            ]
        task = store.tasks[0]
        scored = heldout(store, task, data, batch_size=BATCH, seed=SEED)
        found[f"{case}, held out"] = [
            digest(scored.read(0, 0, BATCH)),
            digest({"documents": scored.documents(0, 0, BATCH)}),
        ]
    return found


def test_batches_are_those_of_before():
    golden = json.loads(GOLDEN.read_text())
    found = digests()
    assert found.keys() == golden.keys()
    changed = [case for case in found if found[case] != golden[case]]
    assert not changed, f"other batches than before: {', '.join(changed)}"
    each = [text for case in found.values() for text in case]
    assert len(set(each)) > 0.95 * len(each)  # and they are not all alike


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(digests(), indent=1) + "\n")
