"""From a configuration to a trained model and its report."""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from launch.checkpoints import provenance as saving
from launch.checkpoints.newest import from_newest
from launch.checkpoints.store import Checkpoints
from launch.config.diff import Change, told
from launch.config.reader import ResolvedConfig
from launch.config.settings import LoopSettings, Settings
from launch.data import opening
from launch.data.opening import cut_words
from launch.errors import EXIT_DONE, ConfigError
from launch.evaluation import heldout, prompts
from launch.job import together
from launch.job.signals import GOES_ON, Signals, Stopped, listening
from launch.run import compiler_check, describe, self_check
from launch.run.assemble import Run, assemble
from launch.run.programs import Programs
from launch.terminal.lines import waiting
from launch.terminal.training import TrainProgress
from launch.training import loop
from launch.training.finish import (
    Life,
    Record,
    about_start,
    complete,
    explain,
    finish,
    scores_of,
    writer_of,
)
from launch.training.folder import keep, owned
from moe import architecture
from moe.training.optimizer import make_schedule
from moe.training.train_state import TrainState
from tasks.batches import Batches
from tasks.store import TokenStore, is_there

if TYPE_CHECKING:
    from launch.evaluation.task_metrics import TaskMetrics


def train(
    config: ResolvedConfig,
    *,
    quiet: bool = False,
    allowed_modules: tuple[str, ...] = (),
    allow_changes: bool = False,
) -> int:
    """Trains until TRAIN_STEPS, from the newest checkpoint on if there is one.

    Args:
        config: configuration of the run.
        quiet: whether results, warnings and errors alone are shown.
        allowed_modules: modules outside `tasks` that may be imported.
        allow_changes: whether a run may go on with another model, or other data.
    Returns:
        The exit code.
    """
    with listening(GOES_ON, quiet=quiet) as signals:
        try:
            return _train(
                config,
                signals,
                allowed_modules,
                quiet=quiet,
                allow_changes=allow_changes,
            )
        except Stopped as stopped:
            if not quiet:
                print(stopped, file=sys.stderr)
            return stopped.code


def _train(
    config: ResolvedConfig,
    signals: Signals,
    allowed_modules: tuple[str, ...],
    *,
    quiet: bool,
    allow_changes: bool,
) -> int:
    """As `train`, in which signals are heard."""
    settings, run = config.settings, assemble(config)
    _refuse_offload_on_cpu(config, run)
    if architecture.has_experts(settings.model) and not quiet:
        for name, fact in describe.sparse_facts(settings, run.mesh):
            print(f"  {name}: {fact}", file=sys.stderr, flush=True)
    model_dir, last = Path(settings.loop.model_dir), settings.train.train_steps
    with (
        owned(model_dir),
        jax.set_mesh(run.mesh),
        _checkpoints(settings.loop) as saved,
        Programs(run) as programs,
    ):
        programs.during = functools.partial(waiting, quiet=quiet)
        store, batches = _data(config, allowed_modules, quiet=quiet)
        measure = _measure(run, store, programs, signals, allowed_modules, quiet=quiet)
        score = _scorer(run, store, programs, signals)
        life = Life(config, run, store, saved, score, measure, signals, quiet)
        now = saving.provenance(config.operative, store.manifest)

        def begin(found: int | None) -> tuple[int | None, TrainState | None]:
            """The state of a step, or a first one; None if the run is complete."""
            if found is None:  # drawing cannot fail, so compiling need not wait for it
                programs.begin()
                return found, _initialised(run, quiet=quiet)
            changed = saved.compare(found, run, now, allow_changes=allow_changes)
            if found >= last:
                complete(life, found)
                return found, None
            _say_changes(changed, found, settings, quiet=quiet)
            with waiting(f"resuming from {saved.path(found)}", quiet=quiet):
                state = saved.restore(found, run, now, allow_changes=allow_changes)
            return found, state

        found, state = from_newest(saved, begin)
        if state is None:
            return EXIT_DONE
        was_scored = found is None or scores_of(model_dir, found) is not None
        programs.begin()
        if together.is_first():
            keep(model_dir, config, found or 0, store.vocabulary)
            about_start(life).save(model_dir)
        with (
            writer_of(model_dir, resume_step=found or 0) as writer,
            TrainProgress(last, start_step=found or 0, quiet=quiet) as progress,
        ):
            programs.during = progress.waiting
            if measure is not None:
                measure.during = progress.waiting
            _check(run, progress, quiet=quiet)
            programs.wait()
            signals.check()  # of several processes one may have been asked meanwhile
            hooks = loop.Hooks(
                train_step=programs.train_step(),
                in_rounds=programs.rounds,
                score=score,
                measure=measure,
                data_facts=_data_facts(batches, store),
                provenance=now,
            )
            state, code = loop.train(
                *(run, state, batches, hooks, saved, writer, progress, signals),
                was_scored=was_scored,
            )
            if code != EXIT_DONE:
                explain(code, saved, quiet=quiet)
                return code
            with progress.waiting("scoring the held-out split"):
                final = life.last_scores(state.params, last)
            writer.write({"step": last, "split": "heldout"} | final)
        signals.check()
        finish(life, state.params, final)
    return EXIT_DONE


def _checkpoints(loop: LoopSettings) -> Checkpoints:
    return Checkpoints(
        loop.model_dir, loop.keep_checkpoints, loop.keep_period_steps, loop.keep_best
    )


def _refuse_offload_on_cpu(config: ResolvedConfig, run: Run) -> None:
    if config.settings.optimizer.offload and run.mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            config.where,
            [
                "OFFLOAD_OPTIMIZER = True: on CPU there is no other memory to keep the "
                "optimizer's state in; set it to False"
            ],
        )


def _check(run: Run, progress: TrainProgress, *, quiet: bool) -> None:
    """Compares compiler and sparse layer with their oracles, unless told not to."""
    if run.settings.loop.self_check == "on":
        compiler_check.check()
        with progress.waiting("comparing the sparse layer with the oracle"):
            checked = self_check.check(run)
        if checked and not quiet:
            print(f"self-check: {checked}", file=sys.stderr)


def _data(
    config: ResolvedConfig, allowed_modules: tuple[str, ...], *, quiet: bool
) -> tuple[TokenStore, Batches]:
    """The store, and what is learnt from it.

    All that can be wrong with the data is said here, before anything is compiled.
    """
    settings = config.settings

    def prepared() -> TokenStore:
        if not is_there(settings.data.store_dir):
            from launch.data import preparing  # with all that makes tokens

            preparing.prepare(config, allowed_modules=allowed_modules, quiet=quiet)
        return opening.open_checked(config)

    store = together.first_alone(
        "preparing the tokens",
        prepared,
        functools.partial(opening.open_checked, config),
    )
    if settings.sample.prompt:  # too long a one is not first said when all is done
        prompts.encode_prompt(settings, store.vocabulary)
    batches = opening.training_batches(store, settings)
    if (words := cut_words(batches)) and together.is_first():
        print(f"  data{words}", file=sys.stderr, flush=True)
    return store, batches


def _measure(
    run: Run,
    store: TokenStore,
    programs: Programs,
    signals: Signals,
    allowed_modules: tuple[str, ...],
    *,
    quiet: bool,
) -> "TaskMetrics | None":
    """What measures by the Tasks' metrics, its examples read; None if nothing does."""
    if not run.settings.loop.task_metrics_period_steps:
        return None
    from launch.evaluation.task_metrics import TaskMetrics  # with drawing and SeqIO

    measure = TaskMetrics(
        run,
        store,
        programs.evaluation,
        allowed_modules=allowed_modules,
        during=functools.partial(waiting, quiet=quiet),
        check=signals.check,
    )
    measure.load()
    return measure


def _scorer(
    run: Run, store: TokenStore, programs: Programs, signals: Signals
) -> Callable[[Any, int], Record]:
    """Held-out scoring, which a signal stops between two batches."""

    def score(params: Any, num_batches: int) -> Record:
        compiled = programs.evaluation()
        return heldout.heldout(run, store, params, compiled, num_batches, signals.check)

    return score


def _initialised(run: Run, *, quiet: bool) -> TrainState:
    with waiting("initialising the parameters", quiet=quiet):
        return jax.block_until_ready(run.init_state())


def _say_changes(
    changed: Sequence[Change], step: int, settings: Settings, *, quiet: bool
) -> None:
    """Says what is not as it was when a checkpoint was made."""
    if not together.is_first():
        return
    if changed and not quiet:
        print(f"  changed since step {step:,}: {told(changed)}", file=sys.stderr)
    steps = {change.macro: change.before for change in changed}.get("TRAIN_STEPS")
    optimizer = settings.optimizer
    if steps is None or optimizer.schedule != "cosine" or optimizer.schedule_steps:
        return
    before, now = (
        float(make_schedule(optimizer, number)(step))
        for number in (int(steps), settings.train.train_steps)
    )
    print(
        f"warning: TRAIN_STEPS {steps} → {settings.train.train_steps} stretches the "
        f"cosine: the learning rate of step {step:,} was {before:.2e} and is now "
        f"{now:.2e}; --gin.SCHEDULE_STEPS={steps} keeps it",
        file=sys.stderr,
    )


def _data_facts(batches: Batches, store: TokenStore) -> Callable[[int], dict[str, Any]]:
    """What a run has read of each Task by the time it comes to a batch."""

    def facts(data_index: int) -> dict[str, Any]:
        found: dict[str, Any] = {"data/read_retries": store.retries}
        for task, so_far in batches.progress(data_index).items():
            found[f"data/rows/{task}"] = so_far.rows
            found[f"data/epochs/{task}"] = so_far.epochs
        return found

    return facts
