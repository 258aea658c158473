"""What a run's page says beside its metrics, kept in the run's folder."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.errors import UserError

FILE = "report.json"


class ReportError(UserError):
    """A page that cannot be made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a run when it starts, and what came out of it.

    Attributes:
        title: heading of the page.
        facts: names and values that say what was trained on what.
        baselines: bits per byte of simpler models of the same held-out text, such as
            {"unigram": 4.6, "gzip": 2.9, "xz": 2.4}; or the token store's, of which
            those named `*_bits_per_byte` are taken.
        sample: "prompt" and "continuation", both text; None before there is one.
        knobs: macro, value, and where the value comes from.
        checkpoint: place of the last one; "" before there is one.
        command: what reproduces the run.
        manifest: names and values of provenance: versions, fingerprints.
        tokens_per_step: second axis of the loss curve; None has none.
    """

    title: str
    facts: Sequence[Sequence[str]] = ()
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    sample: Mapping[str, str] | None = None
    knobs: Sequence[Sequence[str]] = ()
    checkpoint: str = ""
    command: str = ""
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens_per_step: int | None = None

    def save(self, model_dir: str | os.PathLike[str]) -> None:
        """Writes `report.json`, whole or not at all."""
        path = Path(model_dir, FILE)
        draft = path.with_suffix(".tmp")
        # A byte-level model can sample half a character, which no encoding can hold.
        text = json.dumps(dataclasses.asdict(self), indent=1)
        draft.write_text(f"{text}\n", encoding="utf-8")
        os.replace(draft, path)


def load(model_dir: str | os.PathLike[str]) -> About:
    """Reads what `About.save` wrote.

    Raises:
        ReportError: there is nothing readable.
    """
    path = Path(model_dir, FILE)
    try:
        return About(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ReportError(
            f"{path} is not there: the run was started by a version that did not write "
            "it; its page is made when it ends"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
