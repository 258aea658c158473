"""Which token of a tokenizer.json ends a document.

The files that come with a tokenizer say so; what the makers of public models usually
call it is asked last, and only of special tokens, since `</s>` may also be a tag of
HTML.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tokenizers

from tasks.errors import StoreError

USUAL = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<|eot_id|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
)
_NAMING = ("tokenizer_config.json", "special_tokens_map.json")
_NUMBERING = ("generation_config.json", "config.json")

Read = Callable[[str], bytes | None]


def first_usual(tokenizer: bytes) -> str:
    """Returns the first of the usual names that a tokenizer has, or "".

    What earlier versions took, so that their stores stay readable.
    """
    known = _loaded(tokenizer)
    return next((name for name in USUAL if known.token_to_id(name) is not None), "")


def find(tokenizer: bytes, read: Read, eos_token: str = "") -> str:
    """Returns the token that ends a document.

    Args:
        tokenizer: the bytes of tokenizer.json.
        read: returns what a file beside it holds, by its name, or None if there is
            none.
        eos_token: that the user names; "" looks for it.
    Raises:
        StoreError: there is no such token, or several and nothing decides.
    """
    known = _loaded(tokenizer)
    if eos_token:
        if known.token_to_id(eos_token) is None:
            raise StoreError(
                f"EOS_TOKEN = {eos_token!r} is no token of the tokenizer.json: "
                f"{_advice(_special(known))}"
            )
        return eos_token
    for where, names in _said(tokenizer, known, read):
        if len(names) > 1:
            raise StoreError(
                f"{where} names several ends of a document: "
                f"{_advice(names, 'one of them')}"
            )
        if known.token_to_id(names[0]) is None:
            raise StoreError(
                f"{where} says that {names[0]!r} ends a document, and the "
                f"tokenizer.json has no such token: {_advice(_special(known))}"
            )
        return names[0]
    return _guessed(known)


def _said(
    tokenizer: bytes, known: tokenizers.Tokenizer, read: Read
) -> Iterator[tuple[str, list[str]]]:
    """What each of the tokenizer's files calls the end, the surest first."""
    for file in _NAMING:
        token = _fields(read(file)).get("eos_token")
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str) and name:
            yield file, [name]
    if appended := _appended(json.loads(tokenizer).get("post_processor"), known):
        yield "the post-processor of the tokenizer.json", [appended]
    for file in _NUMBERING:
        found = _fields(read(file)).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        found_names = [known.id_to_token(i) for i in ids if type(i) is int and i >= 0]
        if names := list(dict.fromkeys(filter(None, found_names))):
            yield file, names


def _fields(content: bytes | None) -> dict[str, Any]:
    """The fields of a file of JSON; none of one that is missing or is something else.

    These files are not ours and may be of any other library, so what they do not say is
    looked for elsewhere.
    """
    try:
        fields = json.loads(content or b"{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _appended(processor: Any, known: tokenizers.Tokenizer) -> str:
    """The one token that a post-processor puts behind a text; "" if it puts none."""
    if not isinstance(processor, dict):
        return ""
    if processor.get("type") == "Sequence":
        found = [_appended(one, known) for one in processor.get("processors", ())]
        return next(filter(None, reversed(found)), "")
    if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return str(processor["sep"][0])
    single = processor.get("single")
    if not isinstance(single, list) or not single:
        return ""
    last = single[-1]
    if "SpecialToken" not in last or not any("Sequence" in one for one in single):
        return ""
    name = last["SpecialToken"]["id"]
    special = processor.get("special_tokens", {}).get(name, {})
    tokens = special.get("tokens") or [name]  # a name may stand for several
    return str(tokens[-1])


def _guessed(known: tokenizers.Tokenizer) -> str:
    """The one special token of a usual name, where no file says anything."""
    special = _special(known)
    there = [name for name in USUAL if known.token_to_id(name) is not None]
    candidates = [name for name in there if name in special or not special]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise StoreError(
            "the tokenizer.json has several tokens that may end a document, and no "
            f"file beside it says which does: {_advice(candidates, 'one of them')}"
        )
    raise StoreError(
        "the tokenizer.json has no special token of a usual name for the end of a "
        f"document, and no file beside it says which it is: {_advice(special, there)}"
    )


def _special(known: tokenizers.Tokenizer) -> list[str]:
    added = known.get_added_tokens_decoder().values()
    return [token.content for token in added if token.special]


def _advice(names: Iterable[str], more: Iterable[str] | str = ()) -> str:
    if isinstance(more, str):
        return f"set EOS_TOKEN to {more}, {', '.join(map(repr, names))}"
    listed = ", ".join(map(repr, list(names)[:20])) or "of which it has none"
    plain = ", ".join(map(repr, more))
    plain = f", or to {plain}, which are ordinary tokens of it" if plain else ""
    return f"set EOS_TOKEN to one of its special tokens, {listed}{plain}"


def _loaded(tokenizer: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.decode())
