"""Trains a SentencePiece model on text, on the spot, losing nothing."""

import collections
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

import sentencepiece

from tasks.errors import StoreError
from tasks.vocabularies import SentencePieceVocabulary

# Trained on a sample: more text changes the pieces little and costs time.
SAMPLE_BYTES = 4 << 20
_BYTES_AND_SPECIAL = 259
_STRETCH_CHARACTERS = 1000  # the trainer skips what is longer than 4,192 bytes

Kept = list[tuple[bytes, int, str]]  # digest, number and text of a stretch


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How well a vocabulary fits the sample that it was trained on.

    Attributes:
        sample_bytes: size of the sample in UTF-8.
        tokens: that it became.
        byte_tokens: number of them that are bytes of characters without a piece.
    """

    sample_bytes: int
    tokens: int
    byte_tokens: int

    @property
    def bytes_per_token(self) -> float:
        """More is shorter."""
        return self.sample_bytes / max(1, self.tokens)

    @property
    def byte_share(self) -> float:
        """Fraction of the tokens that are bytes: high if pieces are too few."""
        return self.byte_tokens / max(1, self.tokens)


def train_vocabulary(
    texts: Iterable[str],
    num_pieces: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    extra_ids: int = 0,
    sample_bytes: int = SAMPLE_BYTES,
) -> tuple[SentencePieceVocabulary, Statistics]:
    """Returns a trained vocabulary and how well it fits.

    Args:
        texts: documents, read once.
        num_pieces: as in `train_sentencepiece`, without the extra ids.
        model_type: as in `train_sentencepiece`.
        extra_ids: ids after the pieces that stand for no text.
        sample_bytes: limit on the text in UTF-8; of more an even sample of this size is
            used.
    Raises:
        StoreError: the text has too few different words for so many pieces.
    """
    sample = _sample(texts, sample_bytes)
    model = _train(sample, num_pieces, model_type)
    vocabulary = SentencePieceVocabulary(model, extra_ids)
    ids = [i for stretch in sample for i in vocabulary.encode(stretch)]
    statistics = Statistics(
        sample_bytes=sum(len(stretch.encode()) for stretch in sample),
        tokens=len(ids),
        byte_tokens=vocabulary.num_byte_pieces(ids),
    )
    return vocabulary, statistics


def train_sentencepiece(
    texts: Iterable[str],
    num_pieces: int,
    *,
    model_type: Literal["bpe", "unigram"] = "bpe",
    sample_bytes: int = SAMPLE_BYTES,
) -> SentencePieceVocabulary:
    """Returns a model of `num_pieces` pieces, the same for the same texts.

    Nothing is normalised: newlines, tabs and runs of spaces survive, and characters
    outside the sample fall back to bytes.

    Args:
        texts: documents, read once.
        num_pieces: V, among them 3 special ids and 256 bytes.
        model_type: "bpe", byte-pair merges (arXiv:1508.07909), or "unigram", the
            likeliest pieces (arXiv:1804.10959): it compresses about as well, and
            takes twenty times as long to train.
        sample_bytes: limit on the text in UTF-8; of more an even sample of this size is
            used.
    Raises:
        StoreError: the text has too few different words for so many pieces.
    """
    model = _train(_sample(texts, sample_bytes), num_pieces, model_type)
    return SentencePieceVocabulary(model)


def _train(sample: list[str], num_pieces: int, model_type: str) -> bytes:
    """The bytes of a .model file."""
    if not sample:
        raise StoreError(
            "VOCABULARY = 'sentencepiece' cannot be trained: the train split holds no "
            "text"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_common_runs(sample, num_pieces),
            model_writer=model,
            vocab_size=num_pieces,
            model_type=model_type,
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
            num_threads=2,  # not the machine's: sums over threads decide pieces
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise StoreError(
            f"VOCABULARY_PIECES = {num_pieces}: SentencePiece cannot make so many "
            f"pieces from {sum(map(len, sample)):,} characters of text "
            f"({reason[:300]}). "
            "Choose fewer, or VOCABULARY = 'bytes'"
        ) from None
    return model.getvalue()


def _common_runs(sample: list[str], num_pieces: int) -> Iterator[str]:
    """Cuts the sample at characters that get no piece of their own.

    Every character gets one if they take at most half of the pieces, else the most
    frequent do: a small vocabulary could not hold those of Chinese text, and the
    trainer fails if the sample has more of them.
    """
    counts: collections.Counter[str] = collections.Counter()
    for stretch in sample:
        counts.update(stretch)
    room = max(1, (num_pieces - _BYTES_AND_SPECIAL) // 2)
    rare = "".join(char for char, _ in counts.most_common()[room:])
    if not rare:
        yield from sample
        return
    for stretch in sample:
        yield from filter(None, re.split(f"[{re.escape(rare)}]+", stretch))


def _sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Those stretches of text whose digests are least, in the order of the text."""
    kept: Kept = []
    num_bytes, least_dropped = 0, b"\xff" * 33
    for number, stretch in enumerate(s for text in texts for s in _stretches(text)):
        encoded = stretch.encode()
        digest = hashlib.sha256(encoded).digest()
        if digest > least_dropped:
            continue
        kept.append((digest, number, stretch))
        num_bytes += len(encoded)
        if num_bytes > 2 * sample_bytes:
            kept, num_bytes, least_dropped = _least(kept, sample_bytes)
    kept, _, _ = _least(kept, sample_bytes)
    return [stretch for _, _, stretch in sorted(kept, key=lambda entry: entry[1])]


def _least(entries: Kept, sample_bytes: int) -> tuple[Kept, int, bytes]:
    """The entries of least digest that together hold at most `sample_bytes`.

    Also returns how much they hold and the first digest that found no room.
    """
    kept: Kept = []
    num_bytes = 0
    for entry in sorted(entries):
        size = len(entry[2].encode())
        if num_bytes + size > sample_bytes:
            return kept, num_bytes, entry[0]
        kept.append(entry)
        num_bytes += size
    return kept, num_bytes, b"\xff" * 33


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
