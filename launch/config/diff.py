"""What changed between two configurations, and what may change while a run goes on."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from launch.config.places import sections
from launch.config.syntax import Binding, MacroUse, statements

OF_THE_MODEL = ("the model", "the sparse layers")  # sections of `base.gin`
# Of these, what only learning sees, or what becomes of choices when experts are full.
_OF_LEARNING = re.compile(
    r"(ENCODER_)?(\w*CAPACITY\w*|SLOT_ORDER|OVERFLOW)|(EXPERT_)?DROPOUT_RATE"
    r"|JITTER_NOISE|LOGIT_NOISE|INIT_SCALE|ALLOW_FUTURE_LEAK|ROUTER_BIAS_\w+"
)
# Sections whose knobs say what is learnt, and from what.
_FIXED_SECTIONS = (
    *OF_THE_MODEL,
    "the data",
    "the mixture",
    "what is left out",
)
_FIXED = {"BATCH_SIZE", "BATCH_RAMP", "SEED"}
# Of those sections, what regularises, bounds or only says where to find something.
_FREE = {
    "READ_RETRIES",
    "MIXTURE_OR_TASK_MODULE",
    "DROPOUT_RATE",
    "EXPERT_DROPOUT_RATE",
    "JITTER_NOISE",
    "LOGIT_NOISE",
    "ROUTER_BIAS_UPDATE",
    "ROUTER_BIAS_RATE",
    "TRAIN_CAPACITY_FACTOR",
    "EVAL_CAPACITY_FACTOR",
    "MIN_EXPERT_CAPACITY",
    "ENCODER_TRAIN_CAPACITY_FACTOR",
    "ENCODER_EVAL_CAPACITY_FACTOR",
    "ENCODER_MIN_EXPERT_CAPACITY",
    "ALLOW_FUTURE_LEAK",
    "INIT_SCALE",  # of weights that are there by now
}
# What is of one life of a run, and not of the run.
_OF_A_LIFE = {
    "MODEL_DIR",
    "CHECKPOINT_DIR",
    "STORE_DIR",
    "PROCESS_ID",
    "COORDINATOR_ADDRESS",
    "COMPILATION_CACHE_DIR",
    "SELF_CHECK",
    "COMPILE_AHEAD",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """A knob with two values.

    Attributes:
        macro: its name.
        before: text of the earlier value.
        now: text of the later one.
        fixed: whether a run with the one is not a run with the other.
    """

    macro: str
    before: str
    now: str
    fixed: bool

    def __str__(self) -> str:
        """Such as "LEARNING_RATE 0.001 → 0.0003"."""
        return f"{self.macro} {self.before} → {self.now}"


def changes(before: str, now: str) -> list[Change]:
    """Compares two configurations as runs keep them.

    Args:
        before: gin text that sets every knob that there was.
        now: likewise; knobs that only one of them has are not compared.
    """
    old, new, section = _given(before), _given(now), sections()
    found = []
    for macro, given in new.items():
        follows = isinstance(given, MacroUse) and isinstance(old.get(macro), MacroUse)
        if macro not in old or follows or macro in _OF_A_LIFE:
            continue
        was, value = _value(old, macro), _value(new, macro)
        if was != value:
            fixed = section.get(macro) in _FIXED_SECTIONS and macro not in _FREE
            shown = repr(was), repr(value)
            found.append(Change(macro, *shown, fixed or macro in _FIXED))
    return found


def values(text: str, macros: Sequence[str]) -> dict[str, Any]:
    """Returns what knobs come to in a configuration, of those that it sets."""
    given = _given(text)
    return {macro: _value(given, macro) for macro in macros if macro in given}


def is_of_model(macro: str) -> bool:
    """Whether a knob says what a model computes, where no expert is full."""
    inside = sections().get(macro) in OF_THE_MODEL
    return inside and not _OF_LEARNING.fullmatch(macro)


def told(found: Sequence[Change]) -> str:
    """Names changes in one line."""
    return ", ".join(map(str, found))


def _given(text: str) -> dict[str, Any]:
    return {
        statement.selector: statement.value
        for statement in statements(text)
        if isinstance(statement, Binding)
    }


def _value(given: dict[str, Any], macro: str) -> Any:
    """What a knob comes to, references followed."""
    found = given[macro]
    return _value(given, found.name) if isinstance(found, MacroUse) else found
