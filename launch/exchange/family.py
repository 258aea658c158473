"""What a family of public models is: rules for arrays, words for its config.json."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from launch.errors import UserError
from launch.exchange.rules import Rules
from moe.settings import ModelSettings, RouterSettings

Config = Mapping[str, Any]
Knobs = dict[str, Any]
Said = dict[str, Any]

_LARGEST, _MOST_EXPERTS = 2**31, 1_000_000


class ExchangeError(UserError):
    """A model that cannot be taken over, or given away; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of public models.

    Attributes:
        architecture: its class, as config.json names it.
        defaults: what config.json need not say. A family has its own.
        must_be: what it may say, and what of it is understood here.
        also: other words of config.json, each with that by which it is known here.
        knobs: function of config.json; returns our knobs.
        config: function of our settings; returns what config.json says besides that
            which is common.
        layers: what the names of a layer's arrays begin with, by stack; {} is the
            layer's number in it.
        memory: rules of its arrays in memory.
        files: rules of its arrays in files, where they are others.
        ignored: function of config.json; returns a pattern of arrays that may be there,
            and are not read.
        copies: arrays that are others again where they are not read by a rule, each
            with the name of the other.
        sentencepiece: name of a tokenizer that is a SentencePiece model.
        renamed: function of an array's name in a file; returns that of the rules, where
            files have several.
        data: gin file of what a run reads that is made of such a model.
    """

    architecture: str
    defaults: Config
    knobs: Callable[[Config], Knobs]
    config: Callable[[ModelSettings, RouterSettings], Said]
    layers: Mapping[str, str]
    memory: Rules
    ignored: Callable[[Config], str] = lambda config: ""
    files: Rules = dataclasses.field(default_factory=dict)
    must_be: Config = dataclasses.field(default_factory=dict)
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Callable[[str], str] = str
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sentencepiece: str = "tokenizer.model"
    data: str = "data/here.gin"

    def readings(self) -> list[Rules]:
        """Returns the rules, those of files first, by which its arrays are written."""
        return [self.memory | self.files, self.memory]

    def left_out(self, config: Config) -> str:
        """Returns a pattern of arrays that may be there, and make none of ours."""
        patterns = [self.ignored(config), *map(re.escape, self.copies)]
        return "|".join(f"(?:{one})" for one in patterns if one)

    def said(self, config: Config) -> dict[str, Any]:
        """Returns what a config.json says, or means by saying nothing, in its words."""
        said = dict(self.defaults) | {self.also.get(k, k): v for k, v in config.items()}
        return {key: value for key, value in said.items() if value is not None}


def refuse_excess(knobs: Knobs) -> None:
    """Refuses numbers that no model has, before anything is counted by them.

    Raises:
        ValueError: one is such a number.
    """
    for macro, value in knobs.items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int | float) and not abs(one) < _LARGEST:
                raise ValueError(f"{macro} would be {one}")
    layers = knobs["NUM_LAYERS"] + knobs.get("NUM_ENCODER_LAYERS", 0)
    if layers * knobs.get("NUM_EXPERTS", 1) > _MOST_EXPERTS:
        raise ValueError(f"it has more than {_MOST_EXPERTS:,} experts in all layers")


def renormalized(yes: bool) -> str:
    """Returns RENORMALIZE_GATES of `norm_topk_prob`."""
    return "before_drop" if yes else "no"
