"""`switchyard verify`: is this configuration the same model on a mesh as on one device?

The configuration is shrunk to what a laptop simulates, and run on both.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.reader import ResolvedConfig
from launch.config.settings import PlatformSettings, problems
from launch.errors import EXIT_DONE, EXIT_USER_ERROR, ConfigError, UsageError
from launch.verification import meshes
from launch.verification.shrink import Shrunk, shrink
from partitioning.settings import MeshSettings

if TYPE_CHECKING:
    from launch.verification.examine import Verdict

# Half the time of compiling, for slower code: of it little is run.
_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)


def simulated(config: ResolvedConfig, options: argparse.Namespace) -> ResolvedConfig:
    """Returns the configuration with as many simulated devices as are needed.

    Read before jax is. What the run itself asks of its platform is left out: flags of
    another would end the process.

    Raises:
        ConfigError: every mesh that cannot be verified, and why.
        UsageError: the folder of `--json` is not there.
    """
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UsageError(f"--json={options.json}: its folder is not there")
    options.asked, options.given = asked_meshes(config, options), config.settings
    small = [meshes.shrink(mesh) for mesh in options.asked]
    platform = PlatformSettings(
        "cpu",
        simulated_devices=max(mesh.num_devices for mesh in small),
        xla_flags=_FLAGS,
        compilation_cache_dir=config.settings.platform.compilation_cache_dir,
    )
    largest = max(small, key=lambda mesh: mesh.num_devices)
    settings = dataclasses.replace(config.settings, platform=platform, mesh=largest)
    return dataclasses.replace(config, settings=settings)


def asked_meshes(
    config: ResolvedConfig, options: argparse.Namespace
) -> list[MeshSettings]:
    """The meshes of the command line, or that of the configuration.

    Raises:
        ConfigError: all faults of all meshes.
    """
    settings = config.settings
    found: list[str] = []
    asked = []
    for text in options.mesh:
        mesh, faults = meshes.parse(text)
        found += faults
        if not faults:
            asked.append(mesh)
    if not options.mesh:
        asked = [settings.mesh]
        if settings.mesh.num_devices == 1:
            found.append(
                "every MESH_ axis is 1, and one device is the same as one device: add "
                "a hardware file, or name a mesh, such as --mesh=data=2,expert=4"
            )
    for mesh in asked:
        faults = meshes.problems(mesh)
        if not faults:
            on_mesh = dataclasses.replace(
                settings, mesh=mesh, platform=PlatformSettings()
            )
            faults = problems(on_mesh)
        if options.mesh:
            faults = [f"on {meshes.describe(mesh)}: {fault}" for fault in faults]
        found += faults
    if found:
        raise ConfigError(config.where, list(dict.fromkeys(found)))
    return asked


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Shrinks, runs and compares; prints a table for each mesh.

    Returns:
        0 if every quantity is the same, else 1.
    Raises:
        CompilerCheckError: the compiler of the CPU computes wrong numbers, unless
            SELF_CHECK is "off".
    """
    from launch.run import compiler_check
    from launch.terminal.lines import waiting
    from launch.verification import examine, table

    table.refuse_what_does_not_divide(config, options.asked)
    if config.settings.loop.self_check == "on":
        compiler_check.check()
    shrunk = shrink(options.given, options.asked, config.where)
    show = table.Printer()
    if not options.quiet:
        show.changes(shrunk)
    verdicts = examine.examine(
        config,
        shrunk,
        seed=options.seed,
        waiting=lambda message: waiting(message, quiet=options.quiet),
    )
    for verdict in verdicts:
        show.verdict(verdict, every=not options.quiet)
    if options.json:
        text = json.dumps(report(config, shrunk, verdicts, options.seed), indent=1)
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    for verdict in verdicts:
        show.summary(verdict)
    return EXIT_DONE if all(verdict.ok for verdict in verdicts) else EXIT_USER_ERROR


def report(
    config: ResolvedConfig, shrunk: Shrunk, verdicts: Sequence["Verdict"], seed: int
) -> dict[str, Any]:
    """Everything that was found, for `--json`."""
    return {
        "configuration": config.where,
        "seed": seed,
        "same": all(verdict.ok for verdict in verdicts),
        "changes": [
            {"knob": c.name, "before": _plain(c.before), "after": _plain(c.after)}
            for c in shrunk.changes
        ],
        "meshes": [
            {
                "asked": dataclasses.asdict(verdict.mesh.asked),
                "run": dataclasses.asdict(verdict.mesh.small),
                "transport": verdict.mesh.transport,
                "same": verdict.ok,
                "seconds": round(verdict.seconds, 1),
                "rows": [
                    {
                        "quantity": row.quantity,
                        # JSON has no word for what is not a number.
                        "difference": row.difference
                        if math.isfinite(row.difference)
                        else None,
                        "tolerance": row.tolerance,
                        "same": row.ok,
                        "note": row.note,
                    }
                    for row in verdict.rows
                ],
            }
            for verdict in verdicts
        ],
    }


def _plain(value: Any) -> Any:
    return dict(value) if hasattr(value, "items") else value
