"""`switchyard convert`."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from launch.commands import Command, Options, RunOptions, kept_by_run, option
from launch.errors import EXIT_DONE, UsageError

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What `convert` accepts."""

    source: str = option(
        "folder of a model of Hugging Face, or of a run", ..., metavar="DIR"
    )
    to: str = option("folder of the other kind that is made", ..., metavar="DIR")
    step: int | None = option(
        "checkpoint of a run to take; default: the newest", metavar="N"
    )
    dtype: Literal["same", "float32", "bfloat16"] = option(
        "type of what a run's parameters are written as; default: that of the run",
        "same",
    )
    family: str | None = option(
        "family that a run's model is written as; default: the first that has such "
        "models",
        metavar="NAME",
    )


def reads(options: ConvertOptions) -> tuple[list[str], list[str]]:
    """Returns the configuration that a run has kept, or that one of a model has."""
    from pathlib import Path

    source = Path(options.source).expanduser()
    if (source / "config.gin").is_file():
        return kept_by_run(RunOptions(model_dir=str(source)))
    if not (source / "config.json").is_file():
        raise UsageError(
            f"{source} holds neither config.json, as a model of Hugging Face does, nor "
            "config.gin, as a run does"
        )
    of_runs = ("step", "dtype", "family")
    if given := [
        f"--{field.name}"
        for field in dataclasses.fields(options)
        if field.name in of_runs and getattr(options, field.name) != field.default
    ]:
        raise UsageError(
            f"{', '.join(given)}: of {source}, which is no run, config.json says the "
            "family, and --gin.PARAM_DTYPE the type; leave it out"
        )
    from launch.exchange.importing import knobs_for

    data, knobs = knobs_for(source, Path(options.to).expanduser())
    bindings = [f"{macro}={value!r}" for macro, value in knobs.items()]
    return ["hardware/here.gin", data], bindings


def run(config: "ResolvedConfig", options: ConvertOptions) -> int:
    """Makes a run of a public model, or a public model of a run."""
    from pathlib import Path

    from launch.checkpoints.provenance import code
    from launch.terminal.lines import waiting

    source, to = (Path(p).expanduser() for p in (options.source, options.to))
    if not (source / "config.gin").is_file():
        from launch.exchange import importing

        with waiting(f"reading {source}", quiet=options.quiet):
            path, left = importing.take_over(source, to, config, code())
        for line in left:
            print(f"left out: {line}", file=sys.stderr)
        print(path)
        return EXIT_DONE
    from launch.checkpoints.there import There
    from launch.exchange import exporting

    there = There(source)
    step = there.step(options.step)
    with (
        waiting(f"writing step {step}", quiet=options.quiet),
        there.held(step) as (path, _),
    ):
        print(exporting.give(path, to, config, options.dtype, options.family))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="make a run of a public model, or the other way round",
    description="""\
Makes a run folder of a model in the layout of Hugging Face: config.json, safetensors
and a tokenizer. Or such a folder of a run. docs/weights.md says which families there
are, and what is kept.

  switchyard convert --source=OLMoE-1B-7B --to=runs/olmoe
  switchyard generate --model_dir=runs/olmoe --prompt='def main('
  switchyard train --gin_file=runs/olmoe/config.gin --gin_file=mine.gin --allow_changes
  switchyard convert --source=runs/olmoe --to=olmoe_tuned --dtype=bfloat16

Of a model that comes in, gin files and knobs given here say everything but the model:
data, learning, PARAM_DTYPE. Every tensor must be used and every parameter made, or
nothing is written. No devices are needed, and memory for one layer of one array.
""",
    options=ConvertOptions,
    reads=reads,
    devices=None,
    keeps_nothing=True,
    about=lambda config, options: [options.source, options.to],
    run=run,
)
