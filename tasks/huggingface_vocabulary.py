"""A Hugging Face tokenizer.json as a vocabulary (see `tasks.vocabularies`)."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable

import tokenizers

from tasks.errors import StoreError

# What the makers of public models call the end of a document.
_EOS_TOKENS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|eot_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
)


@dataclasses.dataclass(frozen=True)
class HuggingFaceVocabulary:
    """A tokenizer of the library `tokenizers`, without the special tokens it may add.

    The name of a special token in a text is text: no document can end itself.

    Attributes:
        tokenizer: the bytes of tokenizer.json.
        eos_token: ends a document; "" takes the first of the usual names.
        extra_ids: ids after the tokenizer's own that stand for no text.
    """

    tokenizer: bytes = dataclasses.field(repr=False)
    eos_token: str = ""
    extra_ids: int = 0
    kind = "huggingface"
    pad_id = 0

    @functools.cached_property
    def size(self) -> int:
        """Ids up to the largest, and extra ids."""
        return self._size_of_tokenizer + self.extra_ids

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
        return self._loaded.get_vocab(with_added_tokens=True)[self._end]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the file, the end of a document and the number of extra ids."""
        described = self.tokenizer + f" {self.eos_id} {self.extra_ids}".encode()
        return hashlib.sha256(described).hexdigest()[:32]

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
        known = [int(i) for i in ids if 0 <= int(i) < self._size_of_tokenizer]
        return self._loaded.decode(known, skip_special_tokens=True)

    @functools.cached_property
    def _size_of_tokenizer(self) -> int:
        return max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def _end(self) -> str:
        """The token that ends a document."""
        model = tokenizers.Tokenizer.from_str(self.tokenizer.decode())
        names = (self.eos_token,) if self.eos_token else _EOS_TOKENS
        for name in names:
            if model.token_to_id(name) is not None:
                return name
        added = model.get_added_tokens_decoder().values()
        special = [token.content for token in added if token.special]
        wanted = (
            f"EOS_TOKEN = {self.eos_token!r} is no token of the tokenizer.json"
            if self.eos_token
            else "the tokenizer.json has no token of a usual name for the end of a "
            "document"
        )
        raise StoreError(
            f"{wanted}: set EOS_TOKEN to one of its special tokens, "
            f"{', '.join(map(repr, special[:20])) or 'of which it has none'}"
        )

    @functools.cached_property
    def _loaded(self) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(self.tokenizer.decode())
        model.no_truncation()  # which a file may ask for
        model.no_padding()
        model.add_special_tokens([self._end])
        model.encode_special_tokens = True
        return model
