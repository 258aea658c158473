"""From a configuration to a trained model and its report."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from launch.records import goodput
from launch.records.events import read as events_of
from launch.records.goodput import Clock
from launch.run import compiler_check, describe, self_check
from launch.run.assemble import Run, assemble
from launch.run.programs import Programs
from launch.terminal.lines import waiting
from launch.training import folder, loop, memory
from launch.training.books import Books, opened
from launch.training.finish import (
    Life,
    Record,
    about_start,
    complete,
    explain,
    finish,
    scores_of,
)
from launch.training.folder import keep, owned
from moe import architecture
from moe.training.optimizer import make_schedule
from moe.training.train_state import TrainState
from tasks.batches import Batches
from tasks.store import TokenStore, is_there

if TYPE_CHECKING:
    from launch.checkpoints.beginning import Source
    from launch.evaluation.task_metrics import TaskMetrics


class _Begun(NamedTuple):
    """What a life of a run goes on from.

    Attributes:
        step: step of the checkpoint; None if there is none.
        state: state of that step, or a first one; None if the run is complete.
        changed: knobs that are not as they were.
        kept: what the checkpoint kept for `loop`.
        source: what it begins with of another run; None if it draws all, or goes on.
    """

    step: int | None
    state: TrainState | None
    changed: Sequence[Change] = ()
    kept: Mapping[str, Any] | None = None
    source: "Source | None" = None


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
            loop_settings = config.settings.loop
            grace_seconds = loop_settings.grace_seconds
            folder.has_stopped(Path(loop_settings.model_dir), signals, grace_seconds)
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
    if not quiet:
        facts = describe.trained_facts(settings)
        if architecture.has_experts(settings.model):
            facts += describe.sparse_facts(settings, run.mesh)
        for name, fact in facts:
            print(f"  {name}: {fact}", file=sys.stderr, flush=True)
    model_dir, last = Path(settings.loop.model_dir), settings.train.train_steps
    with (
        memory.explained(run),
        owned(model_dir) as still_ours,
        jax.set_mesh(run.mesh),
        _checkpoints(settings.loop) as saved,
        Programs(run) as programs,
    ):
        programs.during = functools.partial(waiting, quiet=quiet)
        folder.be_ready_to_stop(model_dir, signals, settings.loop.grace_seconds)
        store, batches = _data(config, allowed_modules, quiet=quiet)
        measure = _measure(run, store, programs, signals, allowed_modules, quiet=quiet)
        score = _scorer(run, store, programs, signals)
        clock = Clock()
        life = Life(config, run, store, saved, score, measure, signals, quiet)
        now = saving.provenance(config.operative, store.manifest)

        def begin(found: int | None) -> _Begun:
            """The state of a step, or a first one; None if the run is complete."""
            if found is None:
                source = _source(config, now, allow_changes=allow_changes)
                if source is None:  # drawing cannot fail: compiling need not wait
                    programs.begin()
                state = _initialised(run, source, quiet=quiet)
                return _Begun(found, state, source=source)
            changed = saved.compare(found, run, now, allow_changes=allow_changes)
            if found >= last:
                complete(life, found)
                return _Begun(found, None)
            _say_changes(changed, found, settings, quiet=quiet)
            with (
                waiting(f"resuming from {saved.path(found)}", quiet=quiet),
                clock.of("restore"),
            ):
                state = saved.restore(found, run, now, allow_changes=allow_changes)
            kept = saved.manifest(found).get("watch")
            return _Begun(found, state, changed, kept)

        begun = from_newest(saved, begin)
        if begun.state is None:
            return EXIT_DONE
        now |= _told(begun, saved)
        programs.begin(int(begun.state.data_index))
        if together.is_first():
            keep(model_dir, config, begun.step or 0, store.vocabulary)
            about_start(life).save(model_dir)
        hooks = functools.partial(
            loop.Hooks,
            score=score,
            measure=measure,
            data_facts=_data_facts(batches, store),
            go_back=functools.partial(
                _newest, run, saved, now, itertools.count(1), begun.source
            ),
            provenance=now,
            still_ours=still_ours,
            prepare=programs.prepare,
        )
        return _learn(life, begun, begun.state, batches, programs, hooks, clock)


def _learn(
    life: Life,
    begun: _Begun,
    state: TrainState,
    batches: Batches,
    programs: Programs,
    hooks: Callable[..., loop.Hooks],
    clock: Clock,
) -> int:
    """Takes the steps that are left, scores the last, and finishes the run."""
    run, saved, signals, quiet = life.run, life.saved, life.signals, life.quiet
    grace_seconds = run.settings.loop.grace_seconds
    last, found = run.settings.train.train_steps, begun.step
    was_scored = found is None or scores_of(life.model_dir, found) is not None
    with opened(life, found, last, clock, begun.changed) as books:
        programs.during = books.waiting("compile")
        if life.measure is not None:
            life.measure.during = books.progress.waiting
        if begun.source is not None:
            part = begun.source.part
            facts = {"path": str(part.path), "digest": part.digest}
            books.note("taken", 0, **facts, parameters=part.counts())
        _check(run, books, quiet=quiet)
        programs.wait()
        signals.check()  # of several processes one may have been asked meanwhile
        state, code = loop.train(
            *(run, state, batches),
            hooks(train_step=programs.train_step(), in_rounds=programs.rounds),
            *(saved, books, signals),
            kept=begun.kept,
            was_scored=was_scored,
        )
        if code != EXIT_DONE:
            folder.has_stopped(life.model_dir, signals, grace_seconds)
            books.note("stop", int(state.step), code=code)
            explain(code, saved, quiet=quiet)
            return code
        with books.waiting("score")("scoring the held-out split"):
            final = life.last_scores(state.params, last)
        books.writer.write({"step": last, "split": "heldout"} | final)
        books.note("done", last)
    signals.check()
    finish(life, state.params, final)
    if together.is_first() and not quiet:
        events, _ = events_of(life.model_dir)
        print(f"goodput       {goodput.words(goodput.of_events(events))}")
    return EXIT_DONE


def _checkpoints(loop: LoopSettings) -> Checkpoints:
    return Checkpoints(
        loop.model_dir,
        loop.keep_checkpoints,
        loop.keep_period_steps,
        loop.keep_best,
        bucket=loop.checkpoint_dir,
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


def _check(run: Run, books: Books, *, quiet: bool) -> None:
    """Compares compiler and sparse layer with their oracles, unless told not to."""
    if run.settings.loop.self_check == "on":
        compiler_check.check()
        with books.waiting("check")("comparing the sparse layer with the oracle"):
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


def _newest(
    run: Run,
    saved: Checkpoints,
    now: Record,
    numbers: Iterator[int],
    source: "Source | None" = None,
) -> tuple[TrainState, Mapping[str, Any] | None]:
    """The state of the newest checkpoint, and what it kept; else that of the start."""
    what = f"the checkpoint of rollback {next(numbers)}"  # said once in a job
    found = together.as_first_finds(what, saved.latest)
    if found is None:
        return _first(run, source), None
    state = saved.restore(found, run, now, allow_changes=True)
    return state, saved.manifest(found).get("watch")


def _initialised(run: Run, source: "Source | None", *, quiet: bool) -> TrainState:
    what = "initialising the parameters"
    if source is not None:
        source.say(quiet=quiet)
        what = f"taking parameters of {source.part.path}"
    with waiting(what, quiet=quiet):
        return jax.block_until_ready(_first(run, source))


def _first(run: Run, source: "Source | None") -> TrainState:
    return run.init_state() if source is None else source.first_state(run)


def _source(
    config: ResolvedConfig, now: Record, *, allow_changes: bool
) -> "Source | None":
    """What a new run takes of another; all that does not fit is said here."""
    if not config.settings.loop.start_from:
        return None
    from launch.checkpoints import beginning  # which few runs need

    vocabulary = now["vocabulary_fingerprint"]
    return beginning.source_of(config, vocabulary, allow_changes=allow_changes)


def _told(begun: _Begun, saved: Checkpoints) -> Record:
    """What checkpoints say of where the run began: of this start, or of the first."""
    if begun.source is not None:
        return begun.source.told(saved)
    said = {} if begun.step is None else saved.manifest(begun.step)
    return {name: said[name] for name in ("start_from",) if name in said}


def _say_changes(
    changed: Sequence[Change], step: int, settings: Settings, *, quiet: bool
) -> None:
    """Says what is not as it was when a checkpoint was made."""
    if not together.is_first():
        return
    if changed and not quiet:
        print(f"  changed since step {step:,}: {told(changed)}", file=sys.stderr)
    macros = {change.macro: change.before for change in changed}
    asked = macros.keys() & {"START_FROM", "START_PATTERNS"}
    if asked and settings.loop.start_from:
        print(
            "warning: START_FROM says how a run begins: this one goes on from its own "
            f"step {step:,}, and takes nothing from there",
            file=sys.stderr,
        )
    steps = macros.get("TRAIN_STEPS")
    optimizer = settings.optimizer
    falls = {"cosine": "cosine", "wsd": "schedule"}.get(optimizer.schedule)
    if steps is None or falls is None or optimizer.schedule_steps:
        return
    before, now = (
        float(make_schedule(optimizer, number)(step))
        for number in (int(steps), settings.train.train_steps)
    )
    if falls == "schedule" and before == now:
        return
    print(
        f"warning: TRAIN_STEPS {steps} → {settings.train.train_steps} stretches the "
        f"{falls}: the learning rate of step {step:,} was {before:.2e} and is now "
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
