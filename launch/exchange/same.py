"""In what a configuration is another model than one that is described by knobs."""

from collections.abc import Mapping
from typing import Any

from launch.config import reader
from launch.config.diff import OF_THE_MODEL, changes, is_of_model
from launch.config.places import sections
from launch.config.reader import ResolvedConfig
from launch.errors import ConfigError


def differences(config: ResolvedConfig, knobs: Mapping[str, Any]) -> list[str]:
    """Lists the knobs in which a model is another, such as "QK_NORM 'head' → 'none'".

    Args:
        config: configuration of a run.
        knobs: all of a model that is not a default.
    """
    kept = [
        f"{knob.macro}={knob.text}"
        for knob in config.knobs
        if not is_of_model(knob.macro)
    ]
    described = [
        f"{macro}={value!r}" for macro, value in knobs.items() if is_of_model(macro)
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
        if sections()[change.macro] in OF_THE_MODEL
    ]
