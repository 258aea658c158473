"""Configuration files are what their headers and names say, and fit one another."""

import functools
import re
import shlex

import pytest

from benchmarks.ladder.rows import is_shared
from launch import cli, commands
from launch.checkpoints.names import named_arrays
from launch.config import reader
from launch.config.places import configs as configs_folder
from launch.config.settings import Settings
from launch.run.assemble import assemble
from moe.accounting import Counts, count
from partitioning.settings import MeshSettings

RUN = "runs/demo.gin"  # gives a model file what it leaves open, if no run has its name
HEADERS = sorted(
    str(path.relative_to(configs_folder()))
    for folder in ("models", "runs")
    for path in (configs_folder() / folder).glob("*.gin")
    if not is_shared(path)
)
SMALL = [name for name in HEADERS if re.search("/(demo|tiny)", name)]
# Models of papers, each in models/ with a run of its name.
LADDER = sorted(name for name in HEADERS if name not in SMALL and "runs/" in name)
SOME = [  # those of papers are assembled, but are too large to run
    *SMALL,
    *(f"runs/{name}.gin" for name in ("glam_64b_64e", "gpt3_175b", "m6_10t")),
    *(f"runs/{name}.gin" for name in ("mixtral_8x7b", "switch_c_decoder")),
]
HARDWARE = sorted(
    path.stem for path in (configs_folder() / "hardware").glob("cpu*.gin")
)


def files_of(name: str) -> list[str]:
    """The files that make a run of a run's file, or of a model's."""
    if name.startswith("runs/"):
        return [name]
    run = name.replace("models/", "runs/")
    return [run] if run in HEADERS else [RUN, name]


def settings_of(name: str) -> Settings:
    return reader.read(files_of(name)).settings


@functools.cache
def counts_of(files: tuple[str, ...]) -> Counts:
    """A model and its run have the same sizes: they are counted once."""
    settings = reader.read(files).settings
    return count(settings.layers, settings.data.length, settings.data.encoder_length)


@pytest.mark.fast
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_counts_the_parameters_of_its_model(name):
    counts = counts_of(tuple(files_of(name)))
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


@pytest.mark.fast
@pytest.mark.parametrize("name", HEADERS)
def test_the_command_of_a_header_takes_all_that_its_file_sets(name, monkeypatch):
    text = (configs_folder() / name).read_text(encoding="utf-8")
    told = re.search(r"^# Command: switchyard (.*(?:\n#     .*)*)", text, re.MULTILINE)
    assert told, "the header has no command"
    monkeypatch.chdir(configs_folder().parent)
    name_of_verb, command, words = commands.find(
        shlex.split(told[1].replace("\n#", ""))
    )
    options, bindings = cli.parse(name_of_verb, command, words)
    config = cli.read_config(command, options, bindings)
    origins = {knob.macro: knob.origin.partition(":")[0] for knob in config.knobs}
    macros = re.findall(r"^([A-Z_]+) = ", text, re.MULTILINE)
    assert macros
    assert {origins[macro] for macro in macros} == {f"configs/{name}"}


@pytest.mark.fast
@pytest.mark.parametrize("name", LADDER)
def test_a_model_of_a_paper_says_where_it_is_from_and_what_differs(name):
    text = (configs_folder() / name.replace("runs/", "models/")).read_text()
    for line in ("# Published: ", "# Hardware: ", "# Source: "):
        assert f"\n{line}" in text, f"{name} lacks a line {line!r}"


@pytest.mark.fast
@pytest.mark.parametrize("name", LADDER)
def test_a_run_of_a_paper_takes_as_many_tokens_as_it_says(name):
    settings = settings_of(name)
    train = settings.train
    tokens = train.train_steps * train.batch_size * settings.data.tokens_per_row
    text = (configs_folder() / name).read_text(encoding="utf-8").replace("\n# ", " ")
    assert f" {tokens:,} tokens" in text
    assert settings.mesh == MeshSettings(), "a hardware file sets the mesh"
    assert settings.loop.model_dir == name.removesuffix(".gin")


@pytest.mark.fast
def test_the_commands_of_headers_train_in_folders_of_their_own():
    folders = {}
    for name in HEADERS:
        text = (configs_folder() / name).read_text(encoding="utf-8")
        told = re.search(r"MODEL_DIR ?= ?[\"']?([\w/]+)", text)
        # A model of a paper is trained by the run of its name.
        folders[files_of(name)[-1]] = told[1] if told else "that of the demo"
    assert len(set(folders.values())) == len(folders), folders


@pytest.mark.fast
@pytest.mark.parametrize("name", HARDWARE)
def test_a_hardware_file_has_the_mesh_of_its_name(name):
    settings = reader.read([RUN, f"hardware/{name}.gin"]).settings
    told = re.fullmatch(r"cpu(\d+)(?:_d(\d+)e(\d+))?", name)
    assert told
    devices, data, expert = (int(number or 1) for number in told.groups())
    assert settings.mesh == MeshSettings(data=data, expert=expert)
    assert settings.platform.simulated_devices == settings.mesh.num_devices == devices


@pytest.mark.parametrize(
    ("name", "hardware"),
    [*((name, HARDWARE[-1]) for name in SOME), *((RUN, h) for h in HARDWARE)],
)
def test_models_fit_their_meshes(name, hardware):
    run = assemble(reader.read([*files_of(name), f"hardware/{hardware}.gin"]))
    assert run.mesh.size == run.settings.mesh.num_devices
    experts = [
        (array.shape[1], sharding.shard_shape(array.shape)[1])
        for path, array in named_arrays(run.shapes.params).items()
        if "experts/" in path
        for sharding in [named_arrays(run.shardings.params)[path]]
    ]
    assert bool(experts) == (run.settings.model.moe_every > 0)
    for in_all, here in experts:
        assert in_all == here * run.settings.mesh.expert
