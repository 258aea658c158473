"""docs/commands.md says what `--help` says.

    python tests/launch/test_commands_page.py

writes the page again.
"""

import re
from pathlib import Path

import pytest

from launch import cli, commands

pytestmark = pytest.mark.fast

PAGE = Path(__file__).resolve().parents[2] / "docs" / "commands.md"
HEAD = """# Commands

What `switchyard VERB --help` says, verb by verb. [extending.md](extending.md) adds one.
"""


def page() -> str:
    """The help of every verb, under its group."""
    parts, group = [HEAD], ""
    for name, command in commands.every().items():
        if command.group != group:
            group = command.group
            parts.append(f"## {group}\n")
        text = cli.parser(name, command, width=88).format_help()
        parts.append(f"### {name}\n\n```\n{text.rstrip()}\n```\n")
    return "\n".join(parts)


def test_the_page_of_commands_is_their_help():
    # Newer versions of Python lay the list of choices out in other words.
    squeezed = [re.sub(r"\s+", " ", text) for text in (PAGE.read_text(), page())]
    assert squeezed[0] == squeezed[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
