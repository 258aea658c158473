"""Is a configuration the same model on a mesh as on one device?

The configuration is shrunk to what a laptop simulates, and run on both.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import edit
from launch.config.reader import ResolvedConfig
from launch.config.rules import problems
from launch.config.settings import PlatformSettings
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


def refuse_folder(json_file: str | None) -> None:
    """Refuses a file in a folder that is not there, before anything is computed."""
    if json_file and not Path(json_file).absolute().parent.is_dir():
        raise UsageError(f"--json={json_file}: its folder is not there")


def simulated(config: ResolvedConfig, asked: Sequence[MeshSettings]) -> ResolvedConfig:
    """Returns the configuration with as many simulated devices as are needed.

    Read before jax is. What the run itself asks of its platform is left out: flags of
    another would end the process.
    """
    small = [meshes.shrink(mesh) for mesh in asked]
    platform = PlatformSettings(
        "cpu",
        simulated_devices=max(mesh.num_devices for mesh in small),
        xla_flags=_FLAGS,
        compilation_cache_dir=config.settings.platform.compilation_cache_dir,
    )
    largest = max(small, key=lambda mesh: mesh.num_devices)
    settings = dataclasses.replace(config.settings, platform=platform, mesh=largest)
    return dataclasses.replace(config, settings=settings)


def asked_meshes(config: ResolvedConfig, texts: Sequence[str]) -> list[MeshSettings]:
    """Returns the meshes of the command line, or that of the configuration.

    Raises:
        ConfigError: all faults of all meshes.
    """
    settings = config.settings
    found: list[str] = []
    asked = []
    for text in texts:
        mesh, faults = edit.parse_mesh(text)
        found += faults
        if not faults:
            asked.append(mesh)
    if not texts:
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
        if texts:
            faults = [f"on {edit.describe_mesh(mesh)}: {fault}" for fault in faults]
        found += faults
    if found:
        raise ConfigError(config.where, list(dict.fromkeys(found)))
    return asked


def verify(
    config: ResolvedConfig,
    asked: Sequence[MeshSettings],
    *,
    seed: int = 0,
    json_file: str | None = None,
    quiet: bool = False,
) -> int:
    """Shrinks, runs and compares; prints a table for each mesh.

    Args:
        config: what is verified.
        asked: meshes, from `asked_meshes`.
        seed: seed of weights and tokens.
        json_file: file for all numbers; None writes none.
        quiet: whether what is the same is left out.
    Returns:
        0 if every quantity is the same, else 1.
    Raises:
        CompilerCheckError: the compiler of the CPU computes wrong numbers, unless
            SELF_CHECK is "off".
    """
    from launch.run import compiler_check
    from launch.terminal.lines import waiting
    from launch.verification import examine, table

    table.refuse_what_does_not_divide(config, asked)
    if config.settings.loop.self_check == "on":
        compiler_check.check()
    shrunk = shrink(config.settings, asked, config.where)
    show = table.Printer()
    if not quiet:
        show.changes(shrunk)
    verdicts = examine.examine(
        config,
        shrunk,
        seed=seed,
        waiting=lambda message: waiting(message, quiet=quiet),
    )
    for verdict in verdicts:
        show.verdict(verdict, every=not quiet)
    if json_file:
        text = json.dumps(report(config, shrunk, verdicts, seed), indent=1)
        Path(json_file).write_text(text + "\n", encoding="utf-8")
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
