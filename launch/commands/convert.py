"""`switchyard convert`."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from launch.commands import Command, Options, RunOptions, kept_by_run, option
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from launch.config.reader import ResolvedConfig
    from launch.exchange.checking import Side
    from launch.exchange.seen import Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """What `convert` accepts."""

    source: str = option(
        "folder of a model of Hugging Face, or of a run", ..., metavar="DIR"
    )
    to: str = option("folder of the other kind that is made", ..., metavar="DIR")
    check: bool = option(
        "make nothing: compare both folders, which may be of either kind", False
    )
    unchecked: bool = option("do not compare what is made with the source", False)
    step: int | None = option(
        "checkpoint of a run to take; default: the newest", metavar="N"
    )
    dtype: Literal["same", "float32", "bfloat16"] = option(
        "type of what a run's parameters are written as; default: that of the run, or "
        "of the model that it was made of",
        "same",
    )
    family: str | None = option(
        "family that a run's model is written as; default: the first that has such "
        "models",
        metavar="NAME",
    )


def reads(options: ConvertOptions) -> tuple[list[str], list[str]]:
    """Returns the configuration that a run has kept, or that one of a model has."""
    source, to = _folders(options)
    if options.check:
        of_making = ("unchecked", "dtype", "family")
        if given := _given(options, of_making):
            raise UsageError(f"{given}: nothing is made with --check; leave it out")
        _refuse_neither(to)
    if (source / "config.gin").is_file():
        return kept_by_run(RunOptions(model_dir=str(source)))
    _refuse_neither(source)
    if given := _given(options, ("step", "dtype", "family")):
        raise UsageError(
            f"{given}: of {source}, which is no run, config.json says the family, and "
            "--gin.PARAM_DTYPE the type; leave it out"
        )
    from launch.exchange.folder import knobs_for

    data, knobs = knobs_for(source, to)
    bindings = [f"{macro}={value!r}" for macro, value in knobs.items()]
    return ["hardware/here.gin", data], bindings


def devices(config: "ResolvedConfig", options: ConvertOptions) -> "ResolvedConfig":
    """Returns a configuration of one CPU, on which both are compared."""
    from launch.config.settings import PlatformSettings
    from partitioning.settings import MeshSettings

    del options
    settings = dataclasses.replace(
        config.settings, platform=PlatformSettings(name="cpu"), mesh=MeshSettings()
    )
    return dataclasses.replace(config, settings=settings)


def run(config: "ResolvedConfig", options: ConvertOptions) -> int:
    """Makes a run of a public model, or a public model of a run, and compares them."""
    source, to = _folders(options)
    if options.check:
        return _compare(source, to, options)
    if (source / "config.gin").is_file():
        return _give(source, to, config, options)
    return _take_over(source, to, config, options)


def _take_over(
    source: "Path", to: "Path", config: "ResolvedConfig", options: ConvertOptions
) -> int:
    from launch.checkpoints.provenance import code
    from launch.doctor.host import free_bytes
    from launch.exchange import checking, importing
    from launch.exchange.seen import FINGERPRINT
    from launch.terminal.lines import waiting

    with waiting(f"reading {source}", quiet=options.quiet):
        path, left = importing.take_over(source, to, config, code())
    for line in left:
        print(f"left out: {line}", file=sys.stderr)
    print(path)
    if options.unchecked:
        return EXIT_DONE
    with waiting("comparing", quiet=options.quiet):
        rounds = checking.is_rounded(path)
        right, why = checking.elsewhere(source, free_bytes(), rounds=rounds)
        made = None if right is None else checking.of_run(_config_of(to))
    if right is None or made is None:
        print(
            f"not compared: {why}; or take a folder with {FINGERPRINT}",
            file=sys.stderr,
        )
        return EXIT_DONE
    return _said(right, made)


def _give(
    source: "Path", to: "Path", config: "ResolvedConfig", options: ConvertOptions
) -> int:
    from launch.checkpoints.there import There
    from launch.doctor.host import free_bytes
    from launch.exchange import checking, exporting
    from launch.terminal.lines import waiting

    there = There(source)
    step = there.step(options.step)
    found: list[Side] = []
    with (
        waiting(f"writing step {step}", quiet=options.quiet),
        there.held(step) as (path, _),
    ):
        same = options.dtype == "same"
        dtype = exporting.dtype_of(path, config) if same else options.dtype

        def observe() -> "Seen":
            found.append(checking.of_run(config, step, rounds=dtype == "bfloat16"))
            return found[0].seen

        given = path, to, config, dtype, options.family
        print(exporting.give(*given, None if options.unchecked else observe))
    if not found:
        return EXIT_DONE
    with waiting("comparing", quiet=options.quiet):
        made = checking.of_public(to, free_bytes())
    return _said(found[0], made)


def _compare(source: "Path", to: "Path", options: ConvertOptions) -> int:
    from launch.checkpoints.places import MANIFEST
    from launch.checkpoints.there import There
    from launch.doctor.host import free_bytes
    from launch.exchange import checking
    from launch.terminal.lines import waiting

    def side(folder: "Path", step: int | None, *, rounds: bool) -> "Side":
        with waiting(f"computing {folder}", quiet=options.quiet):
            if (folder / "config.gin").is_file():
                return checking.of_run(_config_of(folder), step, rounds=rounds)
            return checking.of_public(folder, free_bytes(), rounds=rounds)

    def is_rounded(folder: "Path", step: int | None) -> bool:
        if not (folder / "config.gin").is_file():
            return checking.is_rounded(folder)
        there = There(folder)
        with there.held(there.step(step), MANIFEST) as (path, _):
            return checking.is_rounded(path)

    # Either may be made of the other.
    rounds = is_rounded(source, options.step) or is_rounded(to, None)
    right = side(source, options.step, rounds=rounds)
    return _said(right, side(to, None, rounds=rounds))


def _config_of(run: "Path") -> "ResolvedConfig":
    from launch.config import reader

    return reader.read(*kept_by_run(RunOptions(model_dir=str(run))))


def _said(right: "Side", made: "Side") -> int:
    """Says how far two are apart."""
    from launch.exchange import checking

    for why in filter(None, (right.why, made.why)):
        print(f"not by transformers: {why}", file=sys.stderr)
    found = checking.compared(right, made)
    print(f"{right.by} and {made.by}: {found}", file=sys.stderr)
    if found.relative <= checking.ALLOWED:
        return EXIT_DONE
    print(
        f"they are not the same: {checking.ALLOWED:.0e} of the largest logit is "
        "allowed",
        file=sys.stderr,
    )
    return EXIT_USER_ERROR


def _folders(options: ConvertOptions) -> tuple["Path", "Path"]:
    from pathlib import Path

    return Path(options.source).expanduser(), Path(options.to).expanduser()


def _given(options: ConvertOptions, names: tuple[str, ...]) -> str:
    """Names those of some options that are given."""
    return ", ".join(
        f"--{field.name}"
        for field in dataclasses.fields(options)
        if field.name in names and getattr(options, field.name) != field.default
    )


def _refuse_neither(folder: "Path") -> None:
    if not any((folder / name).is_file() for name in ("config.json", "config.gin")):
        raise UsageError(
            f"{folder} holds neither config.json, as a model of Hugging Face does, nor "
            "config.gin, as a run does"
        )


COMMAND = Command(
    group="Use a model",
    summary="make a run of a public model, or the other way round",
    description="""\
Makes a run folder of a model in the layout of Hugging Face: config.json, safetensors
and a tokenizer. Or such a folder of a run. docs/weights.md says which families there
are, and what is kept.

  switchyard convert OLMoE-1B-7B runs/olmoe
  switchyard generate --model_dir=runs/olmoe --prompt='def main('
  switchyard train --gin_file=runs/olmoe/config.gin --gin_file=mine.gin \\
      --gin.MODEL_DIR=runs/tuned --gin.START_FROM=runs/olmoe
  switchyard convert runs/tuned olmoe_tuned --dtype=bfloat16
  switchyard convert --check olmoe_tuned runs/tuned

Of a model that comes in, gin files and knobs given here say everything but the model:
data, learning, PARAM_DTYPE. Every tensor must be used and every parameter made, or
nothing is written. No devices are needed, and memory for one layer of one array.

Then both are asked for the logits of the same few tokens, in float32, and are compared
layer by layer: a run with memory for one layer; a public model by transformers, if it
is installed (pip install 'switchyard[convert]'), or by the fingerprint that is written
beside every model that goes out.
""",
    exit_codes={
        EXIT_DONE: "",
        EXIT_USER_ERROR: "it cannot be converted, or the two are not the same",
        EXIT_FAULT: "",
    },
    options=ConvertOptions,
    words=("source", "to"),
    reads=reads,
    devices=devices,
    keeps_nothing=True,
    about=lambda config, options: [options.source, options.to],
    run=run,
)
