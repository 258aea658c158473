"""One small store that no Task has to run for, and one that SeqIO prepared."""

from pathlib import Path

import numpy as np
import pytest
from corpus import MODULE, settings, write_split

from tasks import vocabularies
from tasks.manifest import Manifest, write_manifest
from tasks.store import TokenStore, open_store


def write_store(folder: Path, row_length: int = 32) -> Path:
    """Writes a store of documents of 2 to 120 tokens, without SeqIO."""
    vocabulary = vocabularies.ByteVocabulary()
    folder.mkdir()
    vocabularies.save(vocabulary, folder)
    rng = np.random.default_rng(0)
    splits = {
        name: write_split(folder / name, rng.integers(2, 121, n).tolist(), row_length)
        for name, n in (("train", 50), ("validation", 9))
    }
    manifest = Manifest(
        task="made_up",
        vocabulary="bytes",
        vocabulary_size=vocabulary.size,
        vocabulary_fingerprint=vocabulary.fingerprint,
        train_split="train",
        heldout_split="validation",
        splits=splits,
        baselines={},
    )
    write_manifest(manifest, folder)
    return folder


@pytest.fixture(scope="session")
def quick_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """A store that tests only read."""
    return open_store(write_store(tmp_path_factory.mktemp("quick") / "store"))


@pytest.fixture
def own_store(tmp_path: Path) -> Path:
    """A store that a test may damage."""
    return write_store(tmp_path / "store")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """The made-up corpus with a trained SentencePiece vocabulary."""
    from tasks.prepare import prepare

    data = settings(
        tmp_path_factory.mktemp("prepared") / "store",
        vocabulary="sentencepiece",
        vocabulary_size=320,
    )
    prepare(data, allowed_modules=(MODULE,))
    return open_store(data.store_dir, data)
