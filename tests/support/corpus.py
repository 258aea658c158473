"""The made-up corpus, and settings that prepare it. TensorFlow-free."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tasks import files
from tasks.arrays import write_array
from tasks.manifest import SplitManifest
from tasks.settings import DataSettings

MODULE = "corpus_for_tests"
BROKEN = b"caf\xe9 and so on"  # byte 3 is no UTF-8
_WORDS = (
    "def", "return", "if", "    self.", "\n", "\n\n\t", "x = 1", "(", "):", "été",
    "the row", "漢字", "🙂", "  ", "expert", "token", "\u2581", "# why", "0123", "\r\n",
)  # fmt: skip


def documents(split: str, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields documents of 1 to 400 words; the third has no text."""
    rng = np.random.default_rng([count, len(split)])
    for number in range(count):
        size = 0 if number == 2 else int(rng.integers(1, 400))
        words = rng.choice(_WORDS, size)
        yield f"{split}/{number}", " ".join(words).encode()


def texts(split: str, count: int) -> list[str]:
    """The documents that a store keeps."""
    return [text.decode() for _, text in documents(split, count) if text]


def settings(store_dir: Path, name: str = "made_up", **changes) -> DataSettings:
    """Settings for a Task of `corpus_for_tests`."""
    values = {"vocabulary": "bytes", "task_feature_lengths": {"targets": 64}, **changes}
    return DataSettings(
        mixture_or_task_name=name,
        mixture_or_task_module=MODULE,
        store_dir=str(store_dir),
        **values,
    )


def write_split(path: str, lengths: list[int]) -> SplitManifest:
    """Writes a split of random byte tokens without running any Task."""
    rng = np.random.default_rng(len(lengths))
    tokens = [np.append(rng.integers(3, 259, n - 1), 1) for n in lengths]
    folder = files.join(path, "targets")
    flat = np.concatenate(tokens).astype(np.uint16)
    write_array(files.join(folder, "tokens"), flat)
    write_array(files.join(folder, "offsets"), np.cumsum([0, *lengths]))
    return SplitManifest(
        documents=len(lengths),
        tokens={"targets": len(flat)},
        text_bytes=len(flat) - len(lengths),
        fingerprint=hashlib.sha256(flat.tobytes()).hexdigest()[:32],
    )
