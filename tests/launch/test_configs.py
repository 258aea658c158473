"""The headers of configuration files say what their models are."""

import re

import pytest

from launch import gin_files
from launch.gin_files import _configs as configs_folder
from moe.accounting import count

RUN = "runs/demo.gin"  # gives a model file what it leaves open
HEADERS = sorted(
    str(path.relative_to(configs_folder()))
    for folder in ("models", "runs")
    for path in (configs_folder() / folder).glob("*.gin")
    if not path.stem.endswith("_base")
)


@pytest.mark.fast
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_counts_the_parameters_of_its_model(name):
    files = [name] if name.startswith("runs/") else [RUN, name]
    settings = gin_files.read(files).settings
    counts = count(settings.model, settings.router, settings.data.length)
    text = (configs_folder() / name).read_text(encoding="utf-8")
    told = re.search(r"^# Parameters: ([\d,]+) total, ([\d,]+) active", text, re.M)
    assert told, "the header has no line of parameters"
    assert [int(n.replace(",", "")) for n in told.groups()] == [
        counts.total,
        counts.active,
    ]


@pytest.mark.fast
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_names_its_paper_its_command_and_what_to_expect(name):
    text = (configs_folder() / name).read_text(encoding="utf-8")
    for line in ("# Paper: ", "# Command: switchyard ", "# Expected: "):
        assert f"\n{line}" in text, f"{name} lacks a line {line!r}"
    assert "TBD" not in text
