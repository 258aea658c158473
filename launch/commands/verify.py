"""`switchyard verify`."""

import dataclasses
from typing import TYPE_CHECKING

from launch.commands import Command, Options, allow_module, option
from launch.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """What `verify` accepts."""

    mesh: tuple[str, ...] = option(
        "mesh in place of the configuration's; axes that are not named have size 1; "
        "may be given several times",
        (),
        metavar="AXIS=N,AXIS=N",
    )
    json: str | None = option("write all numbers there", metavar="FILE")
    seed: int = option("seed of weights and tokens", 0, metavar="N")
    allow_module: bool = allow_module()


def devices(config: "ResolvedConfig", options: VerifyOptions) -> "ResolvedConfig":
    """As many simulated devices as the largest of the shrunk meshes needs."""
    from launch.verification import verify

    verify.refuse_folder(options.json)
    return verify.simulated(config, verify.asked_meshes(config, options.mesh))


def run(config: "ResolvedConfig", options: VerifyOptions) -> int:
    """Shrinks, runs and compares."""
    from launch.run import user_code
    from launch.verification import verify

    config = user_code.admitted(config, allowed=options.allow_module)
    return verify.verify(
        config,
        verify.asked_meshes(config, options.mesh),
        seed=options.seed,
        json_file=options.json,
        quiet=options.quiet,
    )


COMMAND = Command(
    group="Before paying for a pod",
    summary="prove that a mesh computes what one device computes",
    description="""\
Proves that a configuration is the same model on a mesh as on one device.

  switchyard verify --gin_file=configs/runs/demo.gin
  switchyard verify --gin_file=configs/runs/m6_t_1t.gin --mesh=data=60,expert=8 \\
      --mesh=expert=480
  switchyard verify --gin_file=mine.gin --json=verified.json

Sizes shrink, choices stay; at most 16 CPU devices are simulated, whatever PLATFORM
says. Loss, gradient of every parameter, parameters after a step, choices of the
routers, and more, are compared in float32. No data are needed. docs/verify.md says
what is compared, and why each tolerance is what it is.
""",
    exit_codes={
        EXIT_FAULT: "",
        EXIT_DONE: "the same",
        EXIT_USER_ERROR: "something differs, or cannot be verified",
    },
    options=VerifyOptions,
    devices=devices,
    keeps_nothing=True,
    run=run,
)
