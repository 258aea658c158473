"""Trains a SentencePiece model on text, on the spot, losing nothing."""

import hashlib
import io
from collections.abc import Iterable, Iterator

import sentencepiece

from tasks.errors import StoreError
from tasks.vocabularies import SentencePieceVocabulary

# Trained on a sample: more text changes the pieces little and costs time.
SAMPLE_BYTES = 4 << 20
_STRETCH_CHARACTERS = 1000  # the trainer skips what is longer than 4,192 bytes


def train_sentencepiece(
    texts: Iterable[str], num_pieces: int, *, sample_bytes: int = SAMPLE_BYTES
) -> SentencePieceVocabulary:
    """Returns a model of `num_pieces` pieces, the same for the same texts.

    Nothing is normalised: newlines, tabs and runs of spaces survive, and characters
    outside the sample fall back to bytes. Pieces are byte-pair merges
    (arXiv:1508.07909): they compress as well as a unigram model here, and train in a
    twentieth of its time.

    Args:
        texts: documents, read once.
        num_pieces: V, among them 3 special ids and 256 bytes.
        sample_bytes: of more text an even sample of this size is used.
    Raises:
        StoreError: the text has too few different words for so many pieces.
    """
    sample = _sample(texts, sample_bytes)
    if not sample:
        raise StoreError(
            "VOCABULARY = 'sentencepiece' cannot be trained: the train split holds no "
            "text"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=num_pieces,
            model_type="bpe",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise StoreError(
            f"VOCABULARY_SIZE = {num_pieces}: SentencePiece cannot make so many pieces "
            f"from {sum(map(len, sample)):,} characters of text ({reason[:300]}). "
            "Choose fewer, or VOCABULARY = 'bytes'"
        ) from None
    return SentencePieceVocabulary(model.getvalue())


def _sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Those stretches of text whose digests are least, in the order of the text."""
    kept: list[tuple[bytes, int, str]] = []
    num_bytes = 0
    for number, stretch in enumerate(s for text in texts for s in _stretches(text)):
        digest = hashlib.sha256(stretch.encode()).digest()
        kept.append((digest, number, stretch))
        num_bytes += len(stretch.encode())
        if num_bytes > 2 * sample_bytes:
            kept, num_bytes = _least(kept, sample_bytes)
    kept, _ = _least(kept, sample_bytes)
    return [stretch for _, _, stretch in sorted(kept, key=lambda entry: entry[1])]


def _least(
    entries: list[tuple[bytes, int, str]], sample_bytes: int
) -> tuple[list[tuple[bytes, int, str]], int]:
    """The entries of least digest that together hold at most `sample_bytes`."""
    kept, num_bytes = [], 0
    for entry in sorted(entries):
        size = len(entry[2].encode())
        if num_bytes + size > sample_bytes:
            break
        kept.append(entry)
        num_bytes += size
    return kept, num_bytes


def _stretches(text: str) -> Iterator[str]:
    """Cuts a text after newlines; of a longer line, its beginning.

    The trainer skips a text that holds NUL and reads U+2581 as a space.
    """
    kept = ""
    for line in text.replace("\u2581", " ").replace("\0", " ").splitlines(True):
        if kept and len(kept) + len(line) > _STRETCH_CHARACTERS:
            yield kept
            kept = ""
        kept += line[:_STRETCH_CHARACTERS]
    if kept:
        yield kept
