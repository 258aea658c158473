"""`switchyard plan`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands import Command, Options, allow_module, option
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig

_WIDTH = 132  # where output is no terminal


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """What `plan` accepts."""

    topology: str = option(
        "slice or GPUs, such as v4:8x8x16", ..., metavar="CHIP:SHAPE"
    )
    mesh: str | None = option(
        "mesh in place of the configuration's; axes not named have size 1",
        metavar="AXIS=N,AXIS=N",
    )
    search: bool = option(
        "look for the mesh and the knobs that fit and are fast", False
    )
    compile: bool = option(
        "ask the TPU's compiler; of a search, about the best few", False
    )
    compile_best: int = option(
        "meshes of a search that are compiled; default: 3", 3, metavar="N"
    )
    output: str | None = option("write what --search finds there", metavar="FILE.gin")
    json: str | None = option("write all numbers there", metavar="FILE")
    html: str | None = option("write a page there", metavar="FILE")
    pue: float = option(
        "power of the building over that of the chips; default: 1.1", 1.1, metavar="R"
    )
    tonnes_per_mwh: float | None = option(
        "tonnes of CO2 equivalents per MWh; without it none is said", metavar="T"
    )
    price: float | None = option(
        "price of an hour of a chip; without it no cost is said", metavar="P"
    )
    time_limit: float = option(
        "seconds after which compiling ends; default: 600", 600, metavar="S"
    )
    memory_limit: float = option(
        "GiB of this machine, for compiling; default: 12", 12, metavar="GIB"
    )
    allow_module: bool = allow_module()


def run(config: "ResolvedConfig", options: PlanOptions) -> int:
    """Plans, and shows what was found."""
    from rich.console import Console

    from launch.planning.answer import PlanError, answer

    console = Console(width=None if Console().is_terminal else _WIDTH)
    plan, failed = answer(config, options, console)
    from launch.planning import tables
    from launch.planning.plan import to_json
    from launch.report.plan import render

    tables.show(plan, console)
    if options.json:
        Path(options.json).write_text(to_json(plan), encoding="utf-8")
    if options.html:
        Path(options.html).write_text(render(plan), encoding="utf-8")
    if failed:
        raise PlanError(failed)
    return EXIT_DONE if plan.fits else EXIT_USER_ERROR


COMMAND = Command(
    group="Before paying for a pod",
    summary="say whether a run fits, how fast it could be, and what it costs",
    description="""\
Answers, without the hardware: does a run fit, how fast could it be, what would it cost?

  switchyard plan --gin_file=configs/runs/demo.gin --topology=v5e:2x2 --search
  switchyard plan --gin_file=configs/runs/glam_64b_64e.gin --topology=v4:8x8x16 \\
      --mesh=data=16,expert=64 --gin.FSDP=data_expert --gin.REMAT=full --compile
  switchyard plan --gin_file=configs/runs/m6_t_1t.gin --topology=v100-32g:480 \\
      --search --output=mine.gin --html=plan.html

A topology is v4:8x8x16, 2*v5e:16x16 (two slices) or h100:64. Without --compile all is
arithmetic; with it the TPU's own compiler answers for memory, collectives and products
(`make tpu-compiler`; no TPU is needed). docs/plan.md says how to read the tables.
""",
    exit_codes={
        EXIT_FAULT: "",
        EXIT_DONE: "it fits",
        EXIT_USER_ERROR: "it does not fit, or cannot be planned",
    },
    options=PlanOptions,
    devices=None,
    about=lambda config, options: [options.topology],
    run=run,
)
