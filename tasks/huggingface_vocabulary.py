"""A Hugging Face tokenizer.json as a vocabulary (see `tasks.vocabularies`)."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

import tokenizers

from tasks import end_of_document
from tasks.errors import StoreError
from tasks.sentinels import extra_outside


@dataclasses.dataclass(frozen=True)
class HuggingFaceVocabulary:
    """A tokenizer of the library `tokenizers`, without the special tokens it may add.

    The name of a special token in a text is text: no document can end itself.

    Attributes:
        tokenizer: the bytes of tokenizer.json.
        eos_token: ends a document; "" takes the one that the file says, or that has a
            usual name.
        extra_ids: ids at the end that stand for no text: sentinels that the tokenizer
            has there itself, or ids after its own.
    """

    tokenizer: bytes = dataclasses.field(repr=False)
    eos_token: str = ""
    extra_ids: int = 0
    kind = "huggingface"
    pad_id = 0

    @functools.cached_property
    def size(self) -> int:
        """Ids up to the largest, and extra ids that are none of them."""
        return self._size_of_tokenizer + self._outside

    @functools.cached_property
    def has_padding(self) -> bool:
        """Whether id 0 is a special token that ends nothing.

        In GPT-2 it is an exclamation mark, in GPT-NeoX the end of a document.
        """
        if self.eos_id == 0:
            return False
        special = self._loaded.get_added_tokens_decoder().get(0)
        return special.special if special else self._loaded.id_to_token(0) is None

    @functools.cached_property
    def eos_id(self) -> int:
        """The id of `eos_token`."""
        return self._loaded.get_vocab(with_added_tokens=True)[self.end]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the file, the end of a document and the extra ids."""
        inside = " inside" if self._outside < self.extra_ids else ""
        described = f" {self.eos_id} {self.extra_ids}{inside}".encode()
        described = self.tokenizer + described
        return hashlib.sha256(described).hexdigest()[:32]

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token by its name; None if it is none."""
        return self._loaded.token_to_id(token)

    def piece_of(self, token_id: int) -> str | None:
        """Returns the name of a token; None if there is none."""
        if not 0 <= token_id < self._size_of_tokenizer:
            return None
        return self._loaded.id_to_token(token_id)

    def encode(self, text: str) -> list[int]:
        """Returns the tokens' ids."""
        try:
            return self._loaded.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises no other class
            reason = str(error).partition("\n")[0][:200]
            raise StoreError(
                f"the tokenizer.json has no tokens for a text: {reason}"
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of those ids that are tokens, special ones left out."""
        text_ids = self.size - self.extra_ids
        known = [int(i) for i in ids if 0 <= int(i) < text_ids]
        return self._loaded.decode(known, skip_special_tokens=True)

    @functools.cached_property
    def _size_of_tokenizer(self) -> int:
        return max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _outside(self) -> int:
        size, token_of = self._size_of_tokenizer, self._loaded.id_to_token
        return extra_outside(self.extra_ids, size, token_of)

    @functools.cached_property
    def end(self) -> str:
        """The token that ends a document."""
        return end_of_document.find(self.tokenizer, lambda name: None, self.eos_token)

    @functools.cached_property
    def _loaded(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.tokenizer.decode())
        model.no_truncation()  # which a file may ask for
        model.no_padding()
        model.add_special_tokens([self.end])
        model.encode_special_tokens = True
        return model
