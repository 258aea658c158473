"""Rows of the ladder: which model on which slice, and what became of it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config import edit, reader
from launch.config.reader import ResolvedConfig
from launch.planning.compiler import records
from launch.planning.compiler.records import Compiled, Failure
from launch.planning.cost import memory
from launch.planning.hardware import moving
from launch.planning.hardware.topologies import Topology, parse, standard
from moe.accounting import count

_ROOT = Path(__file__).resolve().parents[2]
FOLDER = _ROOT / "benchmarks" / "ladder" / "results"
LEAST_PARAMETERS = 10**9
ATTEMPTS_PER_SLICE = 3
MOST_SLICES = 3  # that are tried
_PROGRAM = (
    "moe",
    "partitioning",
    "launch/run/assemble.py",
    "launch/planning/compiler/hlo.py",
)

# The chip of a row, by the start of its name. GLaM was trained on v4. Switch-C, GShard
# and LaMDA had v3, whose successor v4 is; M6 had V100 of 32 GB, as large as v4, of the
# same years. The others, v5p, were published without a TPU; small ones have v5e.
CHIP_OF = {
    "glam": "v4",
    "switch": "v4",
    "t5": "v4",
    "gshard": "v4",
    "flan": "v4",
    "m6": "v4",
    "gpt2": "v5e",
    "gpt3_1_3b": "v5e",
    "gpt3_2_7b": "v5e",
    "gpt3_6_7b": "v5e",
    "pangu_alpha_2_6b": "v5e",
    "megatron_8_3b": "v5e",
    "ernie_3_10b": "v5e",
}
# GLaM 64B/64E is compiled for the slice that its authors had.
FIRST_SLICE = {"glam_64b_64e": "v4:8x8x16"}
# 3,840 rows divide over 480 GPUs, and over no large slice. Groups of two rows need two
# on each of 1,024 chips, where there are none of sixteen.
CHANGED = {
    "m6_t_1t": {"BATCH_SIZE": 4096, "TRAIN_STEPS": 47684},
    "switch_c": {"GROUP_ROWS": 2, "GROUP_SIZE": 256, "ENCODER_GROUP_SIZE": 1024},
    "switch_c_decoder": {"BATCH_SIZE": 2048, "TRAIN_STEPS": 250000},
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One compilation: where, with which knobs, and what came of it.

    Attributes:
        topology: the slice.
        knobs: knobs of the search, by macro.
        kind: "fits", "too_large", or that of a `Failure`, evaluation's too.
        message: words of a failure.
        needed_bytes: memory of one device, as far as the compiler said.
        seconds: lowering and compiling, of both programs.
        peak_host_bytes: memory of the compiler's process.
        largest: the largest values of what was too large.
    """

    topology: str
    knobs: Mapping[str, Any]
    kind: str
    message: str
    needed_bytes: int | None
    seconds: float
    peak_host_bytes: int
    largest: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on its slice.

    Attributes:
        name: name of its run.
        parameters: number of them, in all.
        fingerprint: digest of the configuration and the program.
        attempts: all compilations, the last one that of the result.
        compiled: the result; None where nothing compiled.
    """

    name: str
    parameters: int
    fingerprint: str
    attempts: tuple[Attempt, ...]
    compiled: Compiled | None

    @property
    def topology(self) -> Topology:
        """The slice of the result."""
        return parse(self.attempts[-1].topology)


def run_names() -> list[str]:
    """Returns the runs of the repository that are a model of their own."""
    files = sorted((_ROOT / "configs" / "runs").glob("*.gin"))
    return [file.stem for file in files if not is_shared(file)]


def is_shared(file: Path) -> bool:
    """Whether a configuration is only what others include, as its first lines say."""
    header, _, _ = file.read_text(encoding="utf-8").partition("\n\n")
    return " by itself." in header.replace("\n# ", " ")


def rows() -> list[tuple[str, int]]:
    """Returns the runs above a billion parameters, and these; the smallest first."""
    found = []
    for name in run_names():
        settings = read(name).settings
        total = count(
            settings.layers, settings.data.length, settings.data.encoder_length
        ).total
        if total >= LEAST_PARAMETERS:
            found.append((name, total))
    return sorted(found, key=lambda row: row[1])


def read(name: str) -> ResolvedConfig:
    """Reads a run, with what the ladder has to change in it."""
    bindings = [f"{macro}={value!r}" for macro, value in CHANGED.get(name, {}).items()]
    return reader.read([f"configs/runs/{name}.gin"], bindings)


def chip_of(name: str) -> str:
    """Returns the chip on which a row is compiled."""
    starts = [start for start in CHIP_OF if name.startswith(start)]
    return CHIP_OF[max(starts, key=len)] if starts else "v5p"


def slices_of(name: str) -> list[Topology]:
    """Returns the slices that a row may take, growing."""
    offered = list(standard(chip_of(name)))
    first = FIRST_SLICE.get(name)
    return [one for one in offered if str(one) == first] if first else offered


def fingerprint(config: ResolvedConfig) -> str:
    """Returns a digest of what is compiled: settings and source."""
    digest = hashlib.sha256()
    for knob in config.knobs:
        digest.update(f"{knob.macro}={knob.value!r}\n".encode())
    for part in _PROGRAM:
        place = _ROOT / part
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compile_seconds(result: Compiled) -> float:
    """Lowering and compiling of all that was compiled."""
    found = result.lowering_seconds + result.compiling_seconds
    if isinstance(result.evaluation, Failure):
        return found + result.evaluation.seconds
    if result.evaluation is None:
        return found
    return (
        found
        + result.evaluation.lowering_seconds
        + (result.evaluation.compiling_seconds)
    )


# --------------------------------------------------------------------------- results


def save(row: Row, folder: Path = FOLDER) -> None:
    """Writes a row."""
    fields = dataclasses.asdict(row)
    fields["compiled"] = (
        json.loads(records.to_json(row.compiled)) if row.compiled else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fields, indent=1) + "\n"
    (folder / f"{row.name}.json").write_text(text, encoding="utf-8")


def load(name: str, folder: Path = FOLDER) -> Row | None:
    """Reads a row; None if there is none."""
    file = folder / f"{name}.json"
    if not file.is_file():
        return None
    fields = json.loads(file.read_text(encoding="utf-8"))
    written = fields.pop("compiled")
    compiled = records.from_json(json.dumps(written)) if written else None
    assert compiled is None or isinstance(compiled, Compiled)
    attempts = tuple(
        Attempt(**{**one, "largest": tuple(one.get("largest", ()))})
        for one in fields.pop("attempts")
    )
    return Row(**fields, attempts=attempts, compiled=compiled)


def planned(row: Row) -> tuple[ResolvedConfig, memory.MemoryPlan]:
    """Returns a row's configuration as it was compiled, and today's prediction."""
    chosen = row.attempts[-1].knobs
    config = edit.reconfigured(moving.moved(read(row.name), row.topology), chosen)
    return config, memory.predict(config.settings, row.topology.chip.name)
