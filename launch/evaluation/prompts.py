"""What a prompt is to a model: its tokens, and how an answer is shown beside it."""

import re

from launch.config.settings import Settings
from launch.errors import UserError
from tasks.vocabularies import Vocabulary

_BLANK = re.compile(r"<extra_id_(\d+)>")  # as T5 writes its sentinels


class SampleError(UserError):
    """What is to be drawn does not fit the model."""


def encode_prompt(
    settings: Settings, vocabulary: Vocabulary, num_patches: int = 0
) -> list[int]:
    """Returns the tokens of the settings' prompt.

    Args:
        settings: the prompt, and what the model is.
        vocabulary: mapping between text and tokens.
        num_patches: places before it, for the patches of an image.
    Raises:
        SampleError: the model has nothing that follows a prompt, or no sentinels for
            its blanks; or with what is to follow they are more than a model of learned
            positions knows.
    """
    model, sample = settings.model, settings.sample
    if settings.layers.decoder is None:
        raise SampleError(
            f"ARCHITECTURE = {model.shape!r}: an encoder alone draws nothing; leave "
            "SAMPLE_PROMPT empty"
        )
    prompt = [0] * num_patches + _with_sentinels(settings, vocabulary)
    if answers(settings):  # as every document of inputs ends
        prompt = [*prompt, vocabulary.eos_id]
    known, apart = model.max_positions, model.shape == "encoder_decoder"
    needed = len(prompt) + sample.num_tokens
    if apart:
        needed = max(len(prompt), sample.num_tokens)
    if model.positions == "learned" and needed > known:
        left = known if apart else known - len(prompt)
        remedy = f"lower SAMPLE_TOKENS (--num_tokens) to {left}"
        if left < 1 or len(prompt) > known:
            remedy = f"shorten the prompt to fewer than {known} tokens"
        raise SampleError(
            f"MAX_POSITIONS = {known}: a prompt of {len(prompt)} tokens and "
            f"SAMPLE_TOKENS = {sample.num_tokens} need {needed} positions, and the "
            f"model has learned no more: {remedy}"
        )
    return prompt


def _with_sentinels(settings: Settings, vocabulary: Vocabulary) -> list[int]:
    """Tokens of the prompt, of whose blanks each is a sentinel where there are some."""
    text = settings.sample.prompt
    asks = settings.data.asks
    if asks is None or not asks.sentinels:
        return vocabulary.encode(text)
    *_, last = parts = _BLANK.split(text)
    found: list[int] = []
    for words, blank in zip(parts[:-1:2], parts[1::2], strict=True):
        if int(blank) >= vocabulary.extra_ids:
            raise SampleError(
                f"the prompt has <extra_id_{blank}>, and the vocabulary has sentinels "
                f"up to <extra_id_{vocabulary.extra_ids - 1}> (EXTRA_IDS)"
            )
        found += [*vocabulary.encode(words), vocabulary.size - 1 - int(blank)]
    return [*found, *vocabulary.encode(last)]


def answers(settings: Settings) -> bool:
    """Whether inputs are answered by targets, rather than text continued."""
    asks = settings.data.asks
    return asks is not None and asks.answers


def fills(settings: Settings) -> bool:
    """Whether an answer says what each blank of its prompt stands for."""
    asks = settings.data.asks
    return asks is not None and asks.fills


def with_prompt(settings: Settings, text: str) -> str:
    """Returns what is shown of a prompt and the text that was drawn for it."""
    if fills(settings):
        return text  # the prompt with its blanks filled
    return settings.sample.prompt + ("\n" if answers(settings) else "") + text


def filled(prompt: str, tokens: list[int], vocabulary: Vocabulary) -> str:
    """Puts what was said of each sentinel in its place; what was not stays a blank."""
    said: dict[int, list[int]] = {}
    current: list[int] = []
    for token in tokens:
        sentinel = vocabulary.size - 1 - token
        if sentinel < vocabulary.extra_ids:
            current = said.setdefault(sentinel, [])
        else:
            current.append(token)

    def text(match: re.Match[str]) -> str:
        own = said.get(int(match[1]))
        return match[0] if own is None else vocabulary.decode(own)

    return _BLANK.sub(text, prompt)
