"""The Tasks' own metric functions, on what a model predicts for held-out examples."""

import contextlib
import dataclasses
import functools
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch.config.settings import Settings
from launch.evaluation.continuing import continuation, padded, until_end
from launch.evaluation.heldout import EvalStep
from launch.run.assemble import Run
from launch.terminal.lines import waiting
from partitioning import rules
from tasks import files, layouts, scoring
from tasks.errors import StoreError
from tasks.scoring import ScoredTask
from tasks.store import TokenStore
from tasks.vocabularies import start_id

Waiting = Callable[[str], contextlib.AbstractContextManager]


class TaskMetrics:
    """Predicts, scores and measures; keeps what is compiled and read between calls.

    Each example is predicted once. Every process runs every batch, of the global number
    of examples, and computes the same metrics from the same outputs; process 0 writes
    the predictions.

    Args:
        run: the assembled run.
        store: its data.
        eval_step: returns the compiled scoring of one batch.
        allowed_modules: modules outside `tasks` that may be imported.
        during: shows a message while something is done.
        check: called before every batch; what it raises ends the measuring.
    """

    def __init__(
        self,
        run: Run,
        store: TokenStore,
        eval_step: Callable[[], EvalStep],
        *,
        allowed_modules: tuple[str, ...] = (),
        during: Waiting = waiting,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = run
        self._store = store
        self.eval_step = eval_step
        self._allowed_modules = allowed_modules
        self.during = during
        self._check = check
        self.notes: list[str] = []  # what was left out at the last call
        self.paths: list[str] = []  # where its predictions are

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """Measures parameters on all held-out examples.

        Args:
            params: on the run's mesh.
            step: train steps that led to the parameters; names the files of
                predictions.
        Returns:
            `metric/TASK/NAME` for each number.
        Raises:
            StoreError: a Task cannot be run, or its metric function raised.
        """
        found: dict[str, float] = {}
        self.notes, self.paths = [], []
        for task in self._tasks:
            self.notes += task.notes
            if not task.examples:
                continue
            number = f"{len(task.examples):,} examples of {task.name}"
            predicted = None
            with self.during(f"scoring {number}"):
                score_N = self._scores(params, task)
            if task.predicts:
                with self.during(f"predicting {number}"):
                    predicted = self._predictions(params, task)
            path = predictions_path(self._run, task.name, step)
            self.paths.append(path)
            measured = _together(
                functools.partial(_measure, task, predicted, score_N, path),
                f"cannot measure task {task.name!r}",
            )
            for name, value in measured.items():
                if value is None:
                    self.notes.append(
                        f"metric {name!r} of task {task.name!r} is no number"
                    )
                else:
                    found[f"metric/{task.name}/{name}"] = value
        return found

    def load(self) -> None:
        """Reads the examples now, and not at the first call.

        Raises:
            StoreError: a Task cannot be run, or gives other examples than the store.
        """
        _ = self._tasks

    @functools.cached_property
    def _tasks(self) -> list[ScoredTask]:
        """The examples, the same on every process, or one error on all of them."""
        read = functools.partial(
            scoring.load, self._store, self._run.settings.data, self._allowed_modules
        )
        with self.during("reading the held-out examples"):
            tasks = _together(read, "cannot read the held-out examples")
        digest = zlib.crc32(repr([_sizes(task) for task in tasks]).encode())
        if len({int(other) for other in _on_all_processes(digest)}) > 1:
            raise StoreError(
                "the processes read different held-out examples: give them the same "
                "sources and the same code"
            )
        return tasks

    def _scores(self, params: Any, task: ScoredTask) -> np.ndarray:
        """Log-likelihood of each example's targets, given its inputs."""
        data, rows = self._run.settings.data, self._run.settings.train.batch_size
        eval_step, scores = self.eval_step(), []
        start = start_id(self._store.vocabulary, data.start_token)
        for some in _cut(list(zip(task.inputs, task.targets, strict=True)), rows):
            self._check()
            pairs = [[pair] for pair in some] + [[]] * (rows - len(some))
            batch = layouts.started(layouts.of_pairs(pairs, data), start)
            placed = {k: self._place(v, ("batch", "length")) for k, v in batch.items()}
            _, nats_BL = jax.device_get(eval_step(params, placed))
            scores.append(-nats_BL[: len(some)].sum(axis=1, dtype=np.float64))
        return np.concatenate(scores)

    def _predictions(self, params: Any, task: ScoredTask) -> list[list[int]]:
        """The likeliest token, one after the other, up to an end; or the best beam."""
        settings, vocabulary = self._run.settings, self._store.vocabulary
        room = settings.data.task_feature_lengths["inputs"]
        rows = settings.train.batch_size // settings.train.microbatches
        found: list[list[int]] = []
        for some in _cut(task.inputs, rows):
            self._check()
            length_B = np.full(rows, -1, np.int32)
            length_B[: len(some)] = [len(ids) for ids in some]
            prompts = [*some, *[()] * (rows - len(some))]
            token_BT = self._follow(
                params,
                self._place(padded(prompts, room), ("batch", None)),
                self._place(length_B, ("batch",)),
                jax.random.key(0),  # nothing is drawn at random
            )
            drawn = np.asarray(jax.device_get(token_BT))[: len(some)].tolist()
            found += [until_end(ids, vocabulary) for ids in drawn]
        return found

    @functools.cached_property
    def _follow(self) -> Callable[..., jax.Array]:
        """Greedy decoding, or beam search; compiled at the first call."""
        settings = self._run.settings
        return continuation(
            self._run,
            self._store.vocabulary,
            dataclasses.replace(settings.sample, temperature=0.0),
            settings.data.task_feature_lengths["targets"],
        )

    def _place(self, array: np.ndarray, axes: tuple[str | None, ...]) -> jax.Array:
        """Puts an array, whole on every host, on the devices."""
        return jax.make_array_from_callback(
            array.shape, rules.sharding(self._run.mesh, axes), array.__getitem__
        )


def _measure(
    task: ScoredTask,
    predicted: list[list[int]] | None,
    score_N: np.ndarray,
    path: str,
) -> dict[str, float | None]:
    """Runs a Task's metric functions; process 0 keeps what was predicted."""
    found = task.metrics(predicted, score_N)
    if jax.process_index() == 0:
        records = task.records(predicted, score_N)
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        files.write(path, "".join(lines).encode())
    return found


def are_wanted(
    asked: str | None, settings: Settings, allowed_modules: tuple[str, ...]
) -> bool:
    """Whether to run the Tasks' metrics: by default where they can be run.

    That is where targets are predicted from inputs, and the Tasks' code may be run.

    Args:
        asked: "on" or "off"; None where nothing was asked.
        settings: settings of the run.
        allowed_modules: modules outside `tasks` that may be imported.
    """
    if asked is not None:
        return asked == "on"
    if settings.data.objective != "seq2seq":
        return False
    module = settings.data.mixture_or_task_module
    may_run = module.startswith("tasks.") or bool(allowed_modules)
    if not may_run:
        print(
            f"note: the Tasks' metrics run the code of {module}: add --allow_module",
            file=sys.stderr,
        )
    return may_run


def predictions_path(run: Run, task: str, step: int) -> str:
    """Returns where the predictions of a step are kept."""
    folder = files.join(run.settings.loop.model_dir, "predictions")
    name, beams = task.replace("/", "_").replace(":", "_"), ""
    if run.settings.sample.num_beams > 1:  # greedy predictions stay beside
        beams = f"-{run.settings.sample.num_beams}_beams"
    return files.join(folder, f"{name}-{step}{beams}.jsonl")


def _cut(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _sizes(task: ScoredTask) -> tuple[str, list[tuple[int, int]]]:
    """What decides how many batches a Task has and what is in them."""
    pairs = zip(task.inputs, task.targets, strict=True)
    return task.name, [
        (zlib.crc32(i.tobytes()), zlib.crc32(t.tobytes())) for i, t in pairs
    ]


def _together(work: Callable[[], Any], fault: str) -> Any:
    """Does work that runs nothing on devices; fails on all processes if on one.

    The others would else wait for that one in what they run next.
    """
    error, result = None, None
    try:
        result = work()
    except StoreError as raised:
        error = raised
    failed = _on_all_processes(int(error is not None))
    if error is not None:
        raise error
    if failed.any():
        raise StoreError(
            f"process {int(np.argmax(failed))} {fault}; its own message says why"
        )
    return result


def _on_all_processes(number: int) -> np.ndarray:
    """Gathers a number below 2³² from each process."""
    if jax.process_count() == 1:
        return np.asarray([number], np.uint32)
    return multihost_utils.process_allgather(np.asarray(number, np.uint32)).reshape(-1)
