"""What a family of public models is: rules for arrays, words for its config.json."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from launch.exchange import tables
from launch.exchange.rules import Rules
from moe.settings import ModelSettings, RouterSettings

Config = Mapping[str, Any]
Knobs = dict[str, Any]
Said = dict[str, Any]
# Of rotary positions, which follow from the base; old files have them.
FOLLOWING = r".*\.rotary_emb\.inv_freq"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of public models.

    Attributes:
        architecture: its class, as config.json names it.
        defaults: what config.json need not say. A family has its own.
        must_be: what it may say, and what of it is understood here.
        knobs: function of config.json; returns our knobs.
        config: function of our settings; returns what config.json says besides that
            which is common.
        memory: rules of its arrays in memory, beside those of `tables.RULES`.
        files: rules of its arrays in files, beside those.
        ignored: pattern of arrays that may be there, and are not read.
    """

    architecture: str
    defaults: Config
    knobs: Callable[[Config], Knobs]
    config: Callable[[ModelSettings, RouterSettings], Said]
    must_be: Config = dataclasses.field(default_factory=dict)
    memory: Rules = dataclasses.field(default_factory=dict)
    files: Rules = dataclasses.field(default_factory=dict)
    ignored: str = FOLLOWING

    def readings(self) -> list[Rules]:
        """Returns the rules, those of files first, by which its arrays are written."""
        in_memory = tables.RULES | self.memory
        return [in_memory | self.files, in_memory]


def renormalized(yes: bool) -> str:
    """Returns RENORMALIZE_GATES of `norm_topk_prob`."""
    return "before_drop" if yes else "no"
