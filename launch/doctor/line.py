"""What the doctor says: one line for each thing it looked at."""

import dataclasses
import os
import re
from typing import Any, Literal

Verdict = Literal["fine", "note", "problem"]
VERDICTS: tuple[Verdict, ...] = ("fine", "note", "problem")  # from good to bad

# Of "https://name:word@host/", what lets somebody in.
_PASSWORD = re.compile(r"//[^/@\s]+@")


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at.

    Attributes:
        group: heading under which it stands.
        name: what it is.
        value: what was found.
        verdict: "fine", "note" or "problem".
        remedy: what to change, or to know, in a sentence; "" where it is fine.
        processes: numbers of the processes of a job that say so; () if all do.
    """

    group: str
    name: str
    value: str
    verdict: Verdict = "fine"
    remedy: str = ""
    processes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Takes out what nobody but the user should see."""
        object.__setattr__(self, "value", masked(self.value))
        object.__setattr__(self, "remedy", masked(self.remedy))
        assert (self.verdict == "fine") == (not self.remedy), self


def worst(lines: list[Line]) -> Verdict:
    """Returns the worst verdict of some lines."""
    return max((line.verdict for line in lines), key=VERDICTS.index, default="fine")


def from_fields(fields: dict[str, Any]) -> Line:
    """Returns the line of which `dataclasses.asdict` and JSON have made a dict."""
    return Line(**{**fields, "processes": tuple(fields["processes"])})


def masked(text: str) -> str:
    """Returns a text without passwords in addresses, and with ~ for the home."""
    text = _PASSWORD.sub("//…@", text)
    home = os.path.expanduser("~").rstrip("/")
    if home and home != "~":
        text = re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text)
    return text
