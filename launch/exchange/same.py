"""In what a configuration is another model than one that is described by knobs."""

import re
from collections.abc import Mapping
from typing import Any

from launch.config import places, reader
from launch.config.diff import changes
from launch.config.reader import ResolvedConfig
from launch.errors import ConfigError

_OF_THE_MODEL = ("the model", "the sparse layers")
# Of these sections, what only learning sees, or what becomes of choices when experts
# are full; public models have nothing of it.
_OF_LEARNING = re.compile(
    r"(ENCODER_)?(\w*CAPACITY\w*|SLOT_ORDER|OVERFLOW)|(EXPERT_)?DROPOUT_RATE"
    r"|JITTER_NOISE|LOGIT_NOISE|INIT_SCALE|ALLOW_FUTURE_LEAK|ROUTER_BIAS_\w+"
)


def differences(config: ResolvedConfig, knobs: Mapping[str, Any]) -> list[str]:
    """Lists the knobs in which a model is another, such as "QK_NORM 'head' → 'none'".

    Args:
        config: configuration of a run.
        knobs: all of a model that is not a default.
    """
    section = places.sections()
    kept = [
        f"{knob.macro}={knob.text}"
        for knob in config.knobs
        if section[knob.macro] not in _OF_THE_MODEL
        or _OF_LEARNING.fullmatch(knob.macro)
    ]
    described = [
        f"{macro}={value!r}"
        for macro, value in knobs.items()
        if not _OF_LEARNING.fullmatch(macro)
    ]
    try:
        other = reader.read([], [*kept, *described])
    except ConfigError as error:
        return list(error.problems)
    if other.settings.layers == config.settings.layers:
        return []
    return [
        str(change)
        for change in changes(config.operative, other.operative)
        if section[change.macro] in _OF_THE_MODEL
    ]
