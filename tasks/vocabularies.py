"""Text to token ids and back, without TensorFlow.

Ids are those of SeqIO's vocabularies: 0 is padding, and the end of a document has an
id of its own. `decode` takes whatever a model may emit: ids that stand for no text
give none, and bytes that are not UTF-8 give U+FFFD.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece

from tasks.errors import StoreError

_DESCRIPTION = "vocabulary.json"
_MODEL = "vocabulary.model"
_SPACE = "\u2581"  # what SentencePiece writes for a space


class Vocabulary(Protocol):
    """What every vocabulary offers."""

    @property
    def kind(self) -> str:
        """Either "bytes" or "sentencepiece"."""

    @property
    def size(self) -> int:
        """V, how many ids there are."""

    @property
    def extra_ids(self) -> int:
        """Ids at the end that stand for no text."""

    @property
    def pad_id(self) -> int:
        """Fills rows; never part of a document."""

    @property
    def eos_id(self) -> int:
        """Ends every document."""

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides which ids a text gets."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without the end of a document."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids."""


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """The bytes of UTF-8, each its value + 3 (`seqio.ByteVocabulary`).

    Attributes:
        extra_ids: ids after the bytes that stand for no text.
    """

    extra_ids: int = 0
    kind = "bytes"
    pad_id = 0
    eos_id = 1

    @property
    def size(self) -> int:
        """3 special ids, 256 bytes and the extra ids."""
        return 259 + self.extra_ids

    @property
    def fingerprint(self) -> str:
        """Digest of the kind and the size."""
        return _digest(f"bytes+3 {self.size}".encode())

    def encode(self, text: str) -> list[int]:
        """Returns each byte + 3."""
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of those ids that are bytes."""
        kept = bytes(int(i) - 3 for i in ids if 3 <= int(i) < 259)
        return kept.decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model (arXiv:1808.06226).

    One that `train_sentencepiece` made loses nothing: decode(encode(text)) == text.

    Attributes:
        model: the bytes of the .model file.
        extra_ids: ids after the pieces that stand for no text.
    """

    model: bytes = dataclasses.field(repr=False)
    extra_ids: int = 0
    kind = "sentencepiece"
    pad_id = 0

    @property
    def size(self) -> int:
        """Pieces and extra ids."""
        return self._processor.get_piece_size() + self.extra_ids

    @property
    def eos_id(self) -> int:
        """The model's own end of a sentence."""
        return self._processor.eos_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the model and the number of extra ids."""
        return _digest(self.model + f" {self.extra_ids}".encode())

    def encode(self, text: str) -> list[int]:
        """Returns the pieces' ids.

        SentencePiece takes U+2581 for a space, so that character travels as bytes.
        """
        if self._prefixes_a_space or not self._id_of_byte or _SPACE not in text:
            return self._processor.encode(text)
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE)):
            if number:
                ids += [self._id_of_byte[byte] for byte in _SPACE.encode()]
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of those ids that are pieces or bytes."""
        table = self._bytes_of_id
        known = b"".join(table[int(i)] for i in ids if 0 <= int(i) < len(table))
        text = known.decode(errors="replace")
        return text.removeprefix(" ") if self._prefixes_a_space else text

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _prefixes_a_space(self) -> bool:
        return self._processor.encode("a", out_type=str)[0].startswith(_SPACE)

    @functools.cached_property
    def _bytes_of_id(self) -> tuple[bytes, ...]:
        return tuple(map(self._bytes, range(self._processor.get_piece_size())))

    @functools.cached_property
    def _id_of_byte(self) -> dict[int, int]:
        model = self._processor
        return {
            self._bytes_of_id[i][0]: i
            for i in range(model.get_piece_size())
            if model.is_byte(i)
        }

    def _bytes(self, i: int) -> bytes:
        model = self._processor
        piece = model.id_to_piece(i)
        if model.is_byte(i):  # "<0x0A>"
            return bytes([int(piece[3:5], 16)])
        if model.is_unknown(i):
            return "\ufffd".encode()
        return b"" if model.is_control(i) else piece.replace(_SPACE, " ").encode()


def sentencepiece_model(path: str | Path, extra_ids: int = 0) -> Vocabulary:
    """Returns the vocabulary of a .model file.

    Raises:
        StoreError: there is no such file, it is no model, or it has no end of
            sentence.
    """
    try:
        vocabulary = SentencePieceVocabulary(Path(path).read_bytes(), extra_ids)
        eos_id = vocabulary.eos_id
    except OSError as error:
        raise StoreError(
            f"VOCABULARY = {str(path)!r} is not 'bytes', 'sentencepiece' or 'task', "
            f"and as the path of a SentencePiece model it cannot be read: "
            f"{error.strerror}"
        ) from None
    except RuntimeError:
        raise StoreError(f"{path} is not a SentencePiece model") from None
    if eos_id < 0:
        raise StoreError(
            f"the SentencePiece model {path} has no end of sentence: train it with "
            "--eos_id=1"
        )
    return vocabulary


def save(vocabulary: Vocabulary, folder: str | Path) -> None:
    """Writes a vocabulary into a folder, for `load`."""
    folder = Path(folder)
    description = {"kind": vocabulary.kind, "extra_ids": vocabulary.extra_ids}
    (folder / _DESCRIPTION).write_text(json.dumps(description) + "\n")
    if isinstance(vocabulary, SentencePieceVocabulary):
        (folder / _MODEL).write_bytes(vocabulary.model)


def load(folder: str | Path) -> Vocabulary:
    """Returns the vocabulary that `save` or `switchyard prepare` put into a folder.

    Raises:
        StoreError: there is none.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / _DESCRIPTION).read_text())
        kind, extra_ids = description["kind"], int(description["extra_ids"])
    except (OSError, ValueError, KeyError, TypeError):
        raise StoreError(
            f"{folder} holds no readable {_DESCRIPTION}: it is no prepared store, or "
            "an incomplete copy. Run `switchyard prepare --gin_file=...`"
        ) from None
    if kind == "bytes":
        return ByteVocabulary(extra_ids)
    return sentencepiece_model(folder / _MODEL, extra_ids)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
