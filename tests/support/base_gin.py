"""What `base.gin` says, read without the reader that is tested."""

import dataclasses
import re
import typing
from pathlib import Path

import configs
from launch.config.macros import bound
from launch.config.settings import Settings

CONFIGS = Path(configs.__file__).parent
BASE = (CONFIGS / "base.gin").read_text(encoding="utf-8")


def macros_of_base() -> list[str]:
    return re.findall(r"^([A-Z][A-Z0-9_]*) = ", BASE, re.MULTILINE)


def settings_and_macros() -> list[tuple[str, str]]:
    return list(bound(macros_of_base()).items())


def fields_of_settings() -> dict[str, dataclasses.Field]:
    return {
        f"{record}.{field.name}": field
        for record, kind in typing.get_type_hints(Settings).items()
        for field in dataclasses.fields(kind)
        if field.metadata.get("knob", True)
    }
