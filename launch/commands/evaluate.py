"""`switchyard evaluate`."""

import dataclasses
import functools
import sys
from typing import TYPE_CHECKING, Literal

from launch.commands import (
    Command,
    RunOptions,
    allow_module,
    allowed_modules,
    kept_by_run,
    option,
)
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """What `evaluate` accepts."""

    metrics: Literal["on", "off"] | None = option(
        "run the Tasks' own metric functions on what is predicted for held-out inputs; "
        "default: where there are inputs and the Tasks' code may be run"
    )
    allow_module: bool = allow_module()


def run(config: "ResolvedConfig", options: EvaluateOptions) -> int:
    """Scores a checkpoint on the whole held-out split, and runs the Tasks' metrics."""
    from launch.checkpoints.trained import restored
    from launch.data import opening
    from launch.evaluation import heldout
    from launch.evaluation.task_metrics import TaskMetrics, are_wanted
    from launch.run import user_code
    from launch.run.assemble import assemble
    from launch.run.describe import sparse_facts
    from launch.terminal.lines import waiting
    from moe import architecture

    during = functools.partial(waiting, quiet=options.quiet)
    allowed = allowed_modules(config, options)
    config = user_code.admitted(config, allowed=options.allow_module)
    run = assemble(config)
    store = opening.open_checked(config)
    given = config, run, store.vocabulary, options.step
    with restored(*given, quiet=options.quiet) as (params, step):
        if architecture.has_experts(config.settings.model) and not options.quiet:
            for name, fact in sparse_facts(config.settings, run.mesh):
                print(f"  {name}: {fact}", file=sys.stderr, flush=True)
        compiled = functools.cache(run.compile_eval_step)
        with during("scoring the held-out split"):
            record = heldout.heldout(run, store, params, compiled(), 0)
        print("\n".join(heldout.table(record, store, config.settings.data)))
        if not are_wanted(options.metrics, config.settings, allowed):
            return EXIT_DONE
        metrics = TaskMetrics(
            run, store, compiled, allowed_modules=allowed, during=during
        )
        measured = metrics(params, step)
    for name, value in measured.items():
        print(f"{name:32} {value:.4f}")
    for line in metrics.notes:
        print(f"note: {line}")
    for path in metrics.paths:
        print(f"predictions  {path}")
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="score held-out data with a trained model",
    description="""\
Scores the held-out split, each token once, with a checkpoint of a run.

  switchyard evaluate --model_dir=runs/demo
  switchyard evaluate --model_dir=runs/demo --step=200 --gin.EVAL_CAPACITY_FACTOR=2.0

The run's own config.gin is read first; files and knobs given here override it.
""",
    options=EvaluateOptions,
    reads=kept_by_run,
    keeps_nothing=True,
    run=run,
)
