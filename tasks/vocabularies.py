"""Text to token ids and back, without TensorFlow.

Ids are those of SeqIO's vocabularies: 0 is padding, and the end of a document has an
id of its own. `decode` takes whatever a model may emit: ids that stand for no text
give none, and bytes that are not UTF-8 give U+FFFD.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from tasks import end_of_document, files
from tasks.errors import StoreError
from tasks.huggingface_vocabulary import HuggingFaceVocabulary
from tasks.sentinels import extra_outside

DESCRIPTION = "vocabulary.json"
_MODEL = "vocabulary.model"
_TOKENIZER = "tokenizer.json"
_SPACE = "\u2581"  # what SentencePiece writes for a space


class Vocabulary(Protocol):
    """What every vocabulary offers."""

    def __hash__(self) -> int:
        """Vocabularies are records, and may be keys."""

    @property
    def kind(self) -> str:
        """One of "bytes", "sentencepiece" and "huggingface"."""

    @property
    def size(self) -> int:
        """V, how many ids there are."""

    @property
    def extra_ids(self) -> int:
        """Ids at the end that stand for no text."""

    @property
    def pad_id(self) -> int:
        """Fills rows where there is nothing to learn: always 0."""

    @property
    def has_padding(self) -> bool:
        """Id 0 is no text and no end. If not, a document may hold it."""

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

    def id_of(self, token: str) -> int | None:
        """Returns the id of a piece by its name; None if it is none."""

    def piece_of(self, token_id: int) -> str | None:
        """Returns the name of a piece; None if there is none."""


def start_id(vocabulary: Vocabulary, start_token: str) -> int:
    """Returns what a decoder reads before a text: the id of START_TOKEN, or 0.

    Raises:
        StoreError: there is no such piece.
    """
    if not start_token:
        return 0
    found = vocabulary.id_of(start_token)
    if found is None:
        raise StoreError(
            f"START_TOKEN = {start_token!r} is no piece of the vocabulary: set it to "
            "one of its pieces, or to ''"
        )
    return found


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
    """The bytes of UTF-8, each its value + 3 (`seqio.ByteVocabulary`).

    Attributes:
        extra_ids: ids after the bytes that stand for no text.
    """

    extra_ids: int = 0
    kind = "bytes"
    pad_id = 0
    has_padding = True
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
        return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

    def id_of(self, token: str) -> int | None:
        """Returns None: bytes have no names."""
        del token
        return None

    def piece_of(self, token_id: int) -> str | None:
        """Returns None: bytes have no names."""
        del token_id
        return None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of those ids that are bytes."""
        ids = np.fromiter(ids, np.int64)
        kept = (ids[(ids >= 3) & (ids < 259)] - 3).astype(np.uint8)
        return kept.tobytes().decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class SentencePieceVocabulary:
    """A SentencePiece model (arXiv:1808.06226).

    One that `train_sentencepiece` made loses nothing: decode(encode(text)) == text.

    Attributes:
        model: the bytes of the .model file.
        extra_ids: ids at the end that stand for no text: sentinels that the model has
            there itself (mT5), or ids after its pieces.
    """

    model: bytes = dataclasses.field(repr=False)
    extra_ids: int = 0
    kind = "sentencepiece"
    pad_id = 0

    @functools.cached_property
    def size(self) -> int:
        """Pieces, and extra ids that are none of them."""
        return self._processor.get_piece_size() + self._outside

    @property
    def has_padding(self) -> bool:
        """Some public models have a piece as id 0, the unknown one, or the end."""
        return self._bytes_of_id[0] == b"" and self.eos_id != 0

    @property
    def eos_id(self) -> int:
        """The model's own end of a sentence."""
        return self._processor.eos_id()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the model and the extra ids."""
        inside = " inside" if self._outside < self.extra_ids else ""
        return _digest(self.model + f" {self.extra_ids}{inside}".encode())

    def id_of(self, token: str) -> int | None:
        """Returns the id of a piece by its name; None if it is none."""
        found = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None

    def piece_of(self, token_id: int) -> str | None:
        """Returns the name of a piece; None if there is none."""
        if not 0 <= token_id < self._processor.get_piece_size():
            return None
        return str(self._processor.id_to_piece(token_id))

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
        table = self._bytes_of_id[: self.size - self.extra_ids]
        known = b"".join(table[int(i)] for i in ids if 0 <= int(i) < len(table))
        text = known.decode(errors="replace")
        return text.removeprefix(" ") if self._prefixes_a_space else text

    def num_byte_pieces(self, ids: Iterable[int]) -> int:
        """Counts the ids that stand for one byte of a character without a piece."""
        bytes_of = frozenset(self._id_of_byte.values())
        return sum(i in bytes_of for i in ids)

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def _outside(self) -> int:
        model = self._processor
        size = model.get_piece_size()
        return extra_outside(self.extra_ids, size, model.id_to_piece)

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


def from_file(
    path: str | Path, extra_ids: int = 0, eos_token: str = ""
) -> SentencePieceVocabulary | HuggingFaceVocabulary:
    """Returns the vocabulary of a SentencePiece model or a tokenizer.json.

    The content decides which of them it is. What ends a document of a tokenizer.json
    is looked for in it and in the files beside it.

    Args:
        path: local, `gs://` or `s3://`.
        extra_ids: ids after its own that stand for no text.
        eos_token: piece of a tokenizer.json that ends a document; "" looks for it.
    Raises:
        StoreError: there is no such file, it is neither, or it has no end of a
            document.
    """
    content = files.read(path) if str(path) and not Path(path).is_dir() else None
    if content is None:
        raise StoreError(
            f"VOCABULARY = {str(path)!r} is not 'bytes', 'sentencepiece' or 'task', "
            "and as the path of a SentencePiece model or a tokenizer.json it cannot "
            "be read: there is no such file"
        )
    folder = str(path).rpartition("/")[0] or "."
    return _from_content(
        content,
        str(path),
        extra_ids,
        eos_token,
        lambda name: files.read(files.join(folder, name)),
    )


def to_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Returns the files that a store keeps, by name, for `from_files`."""
    description: dict[str, str | int] = {
        "kind": vocabulary.kind,
        "extra_ids": vocabulary.extra_ids,
    }
    content = {}
    if isinstance(vocabulary, SentencePieceVocabulary):
        content[_MODEL] = vocabulary.model
    elif isinstance(vocabulary, HuggingFaceVocabulary):
        content[_TOKENIZER] = vocabulary.tokenizer
        description["eos_token"] = vocabulary.end
    return {DESCRIPTION: f"{json.dumps(description)}\n".encode(), **content}


def from_files(read: Callable[[str], bytes | None], where: str) -> Vocabulary:
    """Returns the vocabulary whose files `to_files` made.

    Args:
        read: returns what a file holds by its name, or None if there is none.
        where: the files are, for messages.
    Raises:
        StoreError: there is none, or a part of it is missing.
    """
    try:
        description = json.loads(read(DESCRIPTION) or b"")
        kind, extra_ids = description["kind"], description["extra_ids"]
        eos_token = description.get("eos_token", "")
        if type(extra_ids) is not int or not 0 <= extra_ids < 2**31:
            raise ValueError("no number of ids")
        if not isinstance(eos_token, str):
            raise ValueError("no token")
        name = {"bytes": "", "sentencepiece": _MODEL, "huggingface": _TOKENIZER}[kind]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(
            f"{where} holds no readable {DESCRIPTION}: it is no prepared store, or "
            "an incomplete copy. Run `switchyard prepare --gin_file=...`"
        ) from None
    if kind == "bytes":
        return ByteVocabulary(extra_ids)
    content = read(name)
    if content is None:
        raise StoreError(
            f"{where} lacks {name}, so its tokens cannot be read: copy the store again "
            "from where it is whole, or prepare it again"
        )
    if kind == "huggingface" and not eos_token:  # a store of an earlier version
        eos_token = end_of_document.first_usual(content)
    return _from_content(content, f"{where}/{name}", extra_ids, eos_token)


def _from_content(
    content: bytes,
    path: str,
    extra_ids: int,
    eos_token: str,
    beside: end_of_document.Read = lambda name: None,
) -> SentencePieceVocabulary | HuggingFaceVocabulary:
    if _is_json(content):
        return _tokenizer(content, path, extra_ids, eos_token, beside)
    vocabulary = SentencePieceVocabulary(content, extra_ids)
    try:
        eos_id = vocabulary.eos_id
        _ = vocabulary.has_padding, vocabulary._id_of_byte, vocabulary.encode("a\u2581")
        _ = vocabulary.size
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except (RuntimeError, ValueError, IndexError):  # the last two of its pieces
        raise StoreError(
            f"{path} is not a SentencePiece model, and no tokenizer.json either"
        ) from None
    if eos_id < 0:
        raise StoreError(
            f"the SentencePiece model {path} has no end of sentence: train it with "
            "--eos_id=1"
        )
    if eos_token:
        raise StoreError(
            f"EOS_TOKEN = {eos_token!r} would be ignored: the SentencePiece model "
            f"{path} says itself what ends a document. Set EOS_TOKEN = ''"
        )
    return vocabulary


def _tokenizer(
    content: bytes,
    path: str,
    extra_ids: int,
    eos_token: str,
    beside: end_of_document.Read,
) -> HuggingFaceVocabulary:
    try:
        end = end_of_document.find(content, beside, eos_token)
        vocabulary = HuggingFaceVocabulary(content, end, extra_ids)
        _ = vocabulary.eos_id, vocabulary.size, vocabulary.has_padding
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None
    except Exception as error:  # the library raises no other class
        reason = str(error).partition("\n")[0][:200]
        raise StoreError(
            f"{path} is not a tokenizer.json of the library `tokenizers`: {reason}"
        ) from None
    return vocabulary


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    except RecursionError:  # nested deep, so it is JSON
        return True
    return True


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
