"""The end of a run: its last scores, a sample, the report; or what is left of them."""

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from launch.checkpoints import provenance as saving
from launch.checkpoints.store import Checkpoints
from launch.config.reader import ResolvedConfig
from launch.errors import EXIT_DONE, EXIT_NON_FINITE
from launch.evaluation import heldout
from launch.job import together
from launch.job.signals import Signals, Stopped
from launch.records.lines import newest
from launch.records.write import MetricWriter, NoMetrics
from launch.report.about import About
from launch.run import describe, speed
from launch.run.assemble import Run
from launch.terminal.lines import waiting
from tasks.store import TokenStore

if TYPE_CHECKING:
    from launch.evaluation.task_metrics import TaskMetrics

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Life:
    """One start of a run until its end: what its parts share.

    Attributes:
        config: configuration of the run.
        run: the run, assembled.
        store: its tokens.
        saved: its checkpoints.
        score: function of parameters and a number of batches; returns held-out metrics.
        measure: measures by the Tasks' own metrics; None where TASK_METRICS_PERIOD
            asks for none.
        signals: who may ask it to stop.
        quiet: whether results, warnings and errors alone are shown.
    """

    config: ResolvedConfig
    run: Run
    store: TokenStore
    saved: Checkpoints
    score: Callable[[Any, int], Record]
    measure: "TaskMetrics | None"
    signals: Signals
    quiet: bool

    @property
    def model_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.settings.loop.model_dir)

    def last_scores(self, params: Any, step: int) -> Record:
        """Scores the parameters of the last step."""
        batches = self.config.settings.loop.last_eval_batches
        found = self.score(params, batches)
        return found if self.measure is None else found | self.measure(params, step)


def complete(life: Life, found: int) -> int:
    """Says what is there; writes the report if the run ended before it could."""
    print(
        f"{life.model_dir} is complete: step {found:,} of "
        f"{life.config.settings.train.train_steps:,}. Raise TRAIN_STEPS to go on, or "
        "take another MODEL_DIR to start afresh."
    )
    scores = scores_of(life.model_dir, found)
    report = life.model_dir / "report.html"
    if scores and together.as_first_finds("the report", report.exists):
        _print_scores(scores, life.store)
        _say_what_was_left_out(scores, life)
        print(f"checkpoint    {life.saved.path(found)}\nreport        {report}")
        return EXIT_DONE
    params = life.saved.restore_params(found, life.run)
    final = scores
    if final is None:
        with waiting("scoring the held-out split", quiet=life.quiet):
            final = life.last_scores(params, found)
        with writer_of(life, resume_step=None) as writer:
            writer.write({"step": found, "split": "heldout"} | final)
    life.signals.check()
    finish(life, params, final)
    return EXIT_DONE


def scores_of(model_dir: Path, step: int) -> Record | None:
    """Returns the held-out metrics that were recorded of a step, if they were."""
    return together.as_first_finds(
        f"the held-out metrics of step {step}",
        lambda: newest(model_dir, "heldout", step),
    )


def writer_of(life: Life, resume_step: int | None) -> MetricWriter | NoMetrics:
    """Returns the writer of metrics, which all processes have, and the first keeps."""
    if not together.is_first():
        return NoMetrics()
    return MetricWriter(
        life.model_dir,
        resume_step=resume_step,
        load_period_steps=life.config.settings.loop.load_period_steps,
        derive=speed.derive(life.run),
    )


def finish(life: Life, params: Any, final: Record) -> None:
    """Draws a sample, writes the report and prints what came out."""
    prompt, sample = life.config.settings.sample.prompt, None
    if prompt:
        from launch.evaluation import sampling  # with all of drawing

        with waiting("drawing a sample", quiet=life.quiet):
            text = sampling.continue_prompt(life.run, params, life.store.vocabulary)
        sample = {"prompt": prompt, "continuation": text}
    if not together.is_first():
        return
    checkpoint = str(life.saved.path(life.saved.require(None)))
    report = _report(life, sample=sample, checkpoint=checkpoint)
    _print_scores(final, life.store)
    _say_what_was_left_out(final, life)
    if sample:
        print(f"sample        {sample['prompt']}│{sample['continuation']}")
    print(f"checkpoint    {checkpoint}\nreport        {report}")


def _report(life: Life, **outcome: Any) -> Path | str:
    """Writes the page; a run has learnt what it has, whether or not that works."""
    try:
        with waiting("writing the report", quiet=life.quiet):
            from launch.report.run import write_report  # with matplotlib, a second

            about = dataclasses.replace(about_start(life), **outcome)
            about.save(life.model_dir)
            return write_report(life.model_dir, about)
    except Stopped:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        again = f"switchyard report --model_dir={shlex.quote(str(life.model_dir))}"
        print(
            f"warning: the report could not be written ({why}); the run is complete, "
            f"and this makes it again: {again}",
            file=sys.stderr,
        )
        return "none"


def about_start(life: Life) -> About:
    """Returns what is known of a run when it starts."""
    config, store = life.config, life.store
    train = config.settings.train
    return About(
        title=f"Switchyard · {life.model_dir.name}",
        facts=describe.facts(config, life.run, store),
        baselines=heldout.baselines(store),
        knobs=[(k.macro, repr(k.value), k.origin) for k in config.knobs],
        command=" ".join(["switchyard", *sys.argv[1:]]),
        manifest=saving.fingerprints(store.manifest) | {"jax": jax.__version__},
        tokens_per_step=None  # no axis of steps is one of tokens
        if train.batch_ramp
        else train.batch_size * config.settings.data.tokens_per_row,
    )


def _print_scores(final: Record, store: TokenStore) -> None:
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


def _say_what_was_left_out(final: Record, life: Life) -> None:
    fraction = final.get("eval/scored_fraction", 1.0)
    if fraction < 1:
        number = life.config.settings.loop.last_eval_batches
        print(
            f"of the first {100 * fraction:.3g} % of the held-out rows "
            f"(LAST_EVAL_BATCHES = {number:,} of each Task; 0 scores all)\n"
        )


def explain(code: int, saved: Checkpoints, *, quiet: bool) -> None:
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
