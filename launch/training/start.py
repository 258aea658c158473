"""From a configuration to a trained model and its report."""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from launch.checkpoints import store as saving
from launch.checkpoints.store import Checkpoints
from launch.checkpoints.trained import keep_vocabulary
from launch.config.diff import Change, told
from launch.config.reader import ResolvedConfig
from launch.config.settings import Settings
from launch.data import opening
from launch.data.opening import cut_words
from launch.data.preparing import ensure_store
from launch.errors import EXIT_DONE, EXIT_NON_FINITE, ConfigError, UserError
from launch.evaluation import heldout, sampling
from launch.evaluation.task_metrics import EvalStep, TaskMetrics
from launch.job import together
from launch.records.write import MetricWriter, NoMetrics, read_metrics
from launch.report.about import About
from launch.run import compiler_check, describe, self_check
from launch.run.assemble import Run, assemble
from launch.run.programs import Programs
from launch.terminal.lines import waiting
from launch.terminal.training import TrainProgress
from launch.training import loop
from launch.training.signals import Signals, Stopped, listening
from moe import architecture
from moe.training.optimizer import make_schedule
from moe.training.train_state import TrainState
from tasks.batches import Batches
from tasks.store import TokenStore
from tasks.vocabularies import Vocabulary


class ModelDirError(UserError):
    """The folder of a run cannot be used."""


def train(
    config: ResolvedConfig,
    *,
    quiet: bool = False,
    allowed_modules: tuple[str, ...] = (),
    allow_changes: bool = False,
) -> int:
    """Trains until TRAIN_STEPS, from the newest checkpoint on if there is one.

    Args:
        config: of the run.
        quiet: whether results, warnings and errors alone are shown.
        allowed_modules: modules outside `tasks` that may be imported.
        allow_changes: whether a run may go on with another model, or other data.
    Returns:
        The exit code.
    """
    with listening(quiet=quiet) as signals:
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
    settings = config.settings
    run = assemble(config)
    if settings.optimizer.offload and run.mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            config.where,
            [
                "OFFLOAD_OPTIMIZER = True: on CPU there is no other memory to keep the "
                "optimizer's state in; set it to False"
            ],
        )
    if architecture.has_experts(settings.model) and not quiet:
        for name, fact in describe.sparse_facts(settings, run.mesh):
            print(f"  {name}: {fact}", file=sys.stderr, flush=True)
    model_dir = Path(settings.loop.model_dir)
    with (
        owned(model_dir),
        jax.set_mesh(run.mesh),
        Checkpoints(str(model_dir), settings.loop.keep_checkpoints) as saved,
        Programs(run) as programs,
    ):
        programs.during = functools.partial(waiting, quiet=quiet)
        store, batches, measure = _data(
            config, run, programs, signals, allowed_modules, quiet=quiet
        )
        now = saving.provenance(config.operative, store.manifest)
        found = together.as_first_finds("the newest checkpoint", saved.latest)
        if found is not None and found >= settings.train.train_steps:
            saved.compare(found, run, now, allow_changes=allow_changes)
            return _already_complete(
                config, run, store, saved, found, measure, signals, quiet=quiet
            )
        was_scored = found is None or _scores_of(model_dir, found) is not None
        if found is None:  # drawing cannot fail, so compiling need not wait for it
            programs.begin()
            state = _initialised(run, quiet=quiet)
        else:
            changed = saved.compare(found, run, now, allow_changes=allow_changes)
            _say_changes(changed, found, settings, quiet=quiet)
            with waiting(f"resuming from {saved.path(found)}", quiet=quiet):
                state = saved.restore(found, run, now, allow_changes=allow_changes)
        programs.begin()
        _write_config(model_dir, config, found or 0, store.vocabulary)
        if together.is_first():
            _about(config, run, store).save(model_dir)
        with (
            _writer(model_dir, resume_step=found or 0) as writer,
            TrainProgress(
                settings.train.train_steps, start_step=found or 0, quiet=quiet
            ) as progress,
        ):
            programs.during = measure.during = progress.waiting
            _check(run, progress, quiet=quiet)
            programs.wait()
            signals.check()  # of several processes one may have been asked meanwhile
            hooks = _hooks(run, store, batches, programs, measure, now, signals)
            state, code = loop.train(
                *(run, state, batches, hooks, saved, writer, progress, signals),
                was_scored=was_scored,
            )
            if code != EXIT_DONE:
                _explain(code, saved, quiet=quiet)
                return code
            with progress.waiting("scoring the held-out split"):
                final = hooks.score(state.params, settings.loop.last_eval_batches)
            if settings.loop.task_metrics_period_steps:
                final |= hooks.measure(state.params, settings.train.train_steps)
            writer.write(
                {"step": settings.train.train_steps, "split": "heldout"} | final
            )
        signals.check()
        _finish(config, run, store, saved, state.params, final, quiet=quiet)
    return EXIT_DONE


def _check(run: Run, progress: TrainProgress, *, quiet: bool) -> None:
    """Compares compiler and sparse layer with their oracles, unless told not to."""
    if run.settings.loop.self_check == "on":
        compiler_check.check()
        with progress.waiting("comparing the sparse layer with the oracle"):
            checked = self_check.check(run)
        if checked and not quiet:
            print(f"self-check: {checked}", file=sys.stderr)


def _data(
    config: ResolvedConfig,
    run: Run,
    programs: Programs,
    signals: Signals,
    allowed_modules: tuple[str, ...],
    *,
    quiet: bool,
) -> tuple[TokenStore, Batches, TaskMetrics]:
    """The store, what is learnt from it, and what measures by the Tasks' metrics.

    All that can be wrong with the data is said here, before anything is compiled.
    """
    settings = config.settings
    store = together.first_alone(
        "preparing the tokens",
        functools.partial(
            ensure_store, config, allowed_modules=allowed_modules, quiet=quiet
        ),
        functools.partial(opening.open_checked, config),
    )
    if settings.sample.prompt:  # too long a one is not first said when all is done
        sampling.encode_prompt(settings, store.vocabulary)
    batches = opening.training_batches(store, settings)
    if (words := cut_words(batches)) and together.is_first():
        print(f"  data{words}", file=sys.stderr, flush=True)
    measure = TaskMetrics(
        run,
        store,
        programs.evaluation,
        allowed_modules=allowed_modules,
        during=functools.partial(waiting, quiet=quiet),
        check=signals.check,
    )
    if settings.loop.task_metrics_period_steps:
        measure.load()
    return store, batches, measure


def _writer(model_dir: Path, resume_step: int | None) -> MetricWriter | NoMetrics:
    """Of several processes the first keeps the metrics, which all have."""
    if together.is_first():
        return MetricWriter(model_dir, resume_step=resume_step)
    return NoMetrics()


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


def _hooks(
    run: Run,
    store: TokenStore,
    batches: Batches,
    programs: Programs,
    measure: TaskMetrics,
    provenance: dict[str, Any],
    signals: Signals,
) -> loop.Hooks:
    """What the loop calls between steps."""
    return loop.Hooks(
        train_step=programs.train_step(),
        in_rounds=programs.rounds,
        score=_scorer(run, store, measure.eval_step, signals),
        measure=measure,
        data_facts=_data_facts(batches, store),
        provenance=provenance,
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


def _scorer(
    run: Run, store: TokenStore, compiled: Callable[[], EvalStep], signals: Signals
) -> Any:
    """Held-out scoring, which a signal stops between two batches."""

    def score(params: Any, num_batches: int) -> dict[str, Any]:
        return heldout.heldout(
            run, store, params, compiled(), num_batches, signals.check
        )

    return score


def _already_complete(
    config: ResolvedConfig,
    run: Run,
    store: TokenStore,
    saved: Checkpoints,
    found: int,
    measure: TaskMetrics,
    signals: Signals,
    *,
    quiet: bool,
) -> int:
    """Says what is there; writes the report if the run ended before it could."""
    loop_settings = config.settings.loop
    print(
        f"{loop_settings.model_dir} is complete: step {found:,} of "
        f"{config.settings.train.train_steps:,}. Raise TRAIN_STEPS to go on, or take "
        "another MODEL_DIR to start afresh."
    )
    scores = _scores_of(Path(loop_settings.model_dir), found)
    report = Path(loop_settings.model_dir, "report.html")
    if scores and together.as_first_finds("the report", report.exists):
        _print_scores(scores, store)
        print(f"checkpoint    {saved.path(found)}\nreport        {report}")
        return EXIT_DONE
    params = saved.restore_params(found, run)
    with waiting("scoring the held-out split", quiet=quiet):
        score = _scorer(run, store, measure.eval_step, signals)
        final = score(params, loop_settings.last_eval_batches)
    if loop_settings.task_metrics_period_steps:
        final |= measure(params, found)
    with _writer(Path(loop_settings.model_dir), resume_step=None) as writer:
        writer.write({"step": found, "split": "heldout"} | final)
    signals.check()
    _finish(config, run, store, saved, params, final, quiet=quiet)
    return EXIT_DONE


def _scores_of(model_dir: Path, step: int) -> dict[str, Any] | None:
    """The held-out metrics that were recorded of a step, if they were."""

    def find() -> dict[str, Any] | None:
        for record in read_metrics(model_dir):
            if record["split"] == "heldout" and record["step"] == step:
                return record
        return None

    return together.as_first_finds("the held-out metrics of the newest step", find)


def _finish(
    config: ResolvedConfig,
    run: Run,
    store: TokenStore,
    saved: Checkpoints,
    params: Any,
    final: dict[str, Any],
    *,
    quiet: bool,
) -> None:
    """Draws a sample, writes the report and prints what came out."""
    from launch.report.run import write_report

    settings = config.settings
    sample = None
    if settings.sample.prompt:
        with waiting("drawing a sample", quiet=quiet):
            text = sampling.continue_prompt(run, params, store.vocabulary)
        sample = {"prompt": settings.sample.prompt, "continuation": text}
    if not together.is_first():
        return
    checkpoint = str(saved.path(saved.require(None)))
    with waiting("writing the report", quiet=quiet):
        about = dataclasses.replace(
            _about(config, run, store), sample=sample, checkpoint=checkpoint
        )
        about.save(settings.loop.model_dir)
        report = write_report(settings.loop.model_dir, about)
    _print_scores(final, store)
    if sample:
        print(f"sample        {sample['prompt']}│{sample['continuation']}")
    print(f"checkpoint    {checkpoint}\nreport        {report}")


def _about(config: ResolvedConfig, run: Run, store: TokenStore) -> About:
    """What is known of a run when it starts."""
    settings = config.settings
    return About(
        title=f"Switchyard · {Path(settings.loop.model_dir).name}",
        facts=describe.facts(config, run, store),
        baselines=heldout.baselines(store),
        knobs=[(k.macro, repr(k.value), k.origin) for k in config.knobs],
        command=" ".join(["switchyard", *sys.argv[1:]]),
        manifest=saving.fingerprints(store.manifest) | {"jax": jax.__version__},
        tokens_per_step=settings.train.batch_size * settings.data.tokens_per_row,
    )


def _print_scores(final: dict[str, Any], store: TokenStore) -> None:
    """Held-out loss beside the baselines of the same text."""
    nats = final["loss/nats_per_token"]
    bits = final.get("loss/bits_per_byte")
    by_task = "\n".join([*heldout.by_task(final), ""])
    if bits is None:  # part of the text is predicted: nothing compares with that
        print(f"\nheld out      {nats:.4f} nats per token\n{by_task}")
        return
    known = heldout.baselines(store)
    per_token = nats / bits  # of the same tokens
    rows = [
        ("this model", nats, bits),
        ("unigram", known["unigram"] * per_token, known["unigram"]),
        ("gzip -9", math.nan, known["gzip"]),
        ("xz -9e", math.nan, known["xz"]),
    ]
    print(f"\n{'held out':13} {'nats/token':>10} {'bits/byte':>10}")
    for name, nats, bits in rows:
        shown = "–" if math.isnan(nats) else f"{nats:.4f}"
        print(f"{name:13} {shown:>10} {bits:>10.4f}")
    print(by_task)


def _explain(code: int, saved: Checkpoints, *, quiet: bool) -> None:
    """Says why a run stopped early, and what to do."""
    if code == EXIT_NON_FINITE:
        newest = saved.latest()
        there = "no checkpoint was saved before"
        if newest is not None:
            there = f"the newest checkpoint is of step {newest:,}"
        message = (
            "too many steps in a row were not finite; nothing of them was kept, and "
            f"{there}: lower LEARNING_RATE or set CLIP_NORM"
        )
    else:
        message = f"stopped, and saved step {saved.latest()}; the same command resumes"
    if not quiet or code == EXIT_NON_FINITE:
        print(message, file=sys.stderr)


def _write_config(
    model_dir: Path, config: ResolvedConfig, step: int, vocabulary: Vocabulary
) -> None:
    """Process 0 keeps what others need of the run, wherever they are started.

    The newest configuration, one for each life of the run, and the vocabulary.
    """
    if not together.is_first():
        return
    operative, store_dir = config.operative, config.settings.data.store_dir
    if "://" not in store_dir:
        line = "\nSTORE_DIR = {!r}  # "
        absolute = line.format(os.path.abspath(store_dir))
        operative = operative.replace(line.format(store_dir), absolute)
    with _writing(model_dir):
        keep_vocabulary(model_dir, vocabulary)
        (model_dir / "config.gin").write_text(operative, encoding="utf-8")
        lives = model_dir / "configs"
        lives.mkdir(exist_ok=True)
        number = len(list(lives.glob("*.gin"))) + 1
        name = f"{number:03}_from_step_{step}.gin"
        (lives / name).write_text(operative, encoding="utf-8")


@contextlib.contextmanager
def owned(model_dir: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps a second run out of it.

    Of several processes the first holds it for all.

    Raises:
        ModelDirError: it cannot be written, another run is writing to it, or the
            processes of this one do not share it.
    """
    with contextlib.ExitStack() as held:
        together.first_alone(
            "locking MODEL_DIR",
            functools.partial(_lock, model_dir, held),
            functools.partial(_refuse_unshared, model_dir),
        )
        yield


def _lock(model_dir: Path, held: contextlib.ExitStack) -> None:
    """Makes the folder, and locks it until `held` is left."""
    with _writing(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
        # It may be another run's: nothing is changed before it is locked. Without
        # a buffer, a full disk is noticed here, and not when the file is closed.
        lock = held.enter_context((model_dir / "run.lock").open("ab", buffering=0))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ModelDirError(
                f"another run is writing to {model_dir}: take another MODEL_DIR"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()} {time.time():.0f}\n".encode())


def _refuse_unshared(model_dir: Path) -> None:
    if not (model_dir / "run.lock").is_file():
        raise ModelDirError(
            f"MODEL_DIR = {str(model_dir)!r} is not the folder that process 0 has "
            "made: all processes of a job need one that they share, such as one on NFS"
        )


@contextlib.contextmanager
def _writing(model_dir: Path) -> Iterator[None]:
    """Says in one line what keeps the folder of a run from being written."""
    try:
        yield
    except OSError as error:
        raise ModelDirError(
            f"cannot write to MODEL_DIR = {str(model_dir)!r}: {error.strerror or error}"
        ) from error
