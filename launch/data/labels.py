"""Labelled examples, those whose label looks wrong first."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.errors import UsageError
from launch.terminal.lines import waiting
from tasks.errors import StoreError
from tasks.quality.label_noise import Example, Ranking, rank, write
from tasks.settings import DataSettings

_TOP = 5
_TEXT_WIDTH = 60


def review(
    data: DataSettings,
    output: str,
    *,
    split: str,
    limit: int,
    seed: int,
    allowed_modules: tuple[str, ...],
    quiet: bool,
) -> None:
    """Ranks the labelled examples of a Task and writes them for review.

    Args:
        data: which Task.
        output: file that is written.
        split: split to look at.
        limit: examples to write; 0 writes all.
        seed: seed of the cross-validation.
        allowed_modules: modules outside `tasks` that may be imported.
        quiet: whether no progress is shown.
    Raises:
        UsageError: the output is there already, or an option is out of range.
        StoreError: the Task has no labels, or cannot be read or judged.
    """
    if Path(output).exists():
        raise UsageError(
            f"--output={output} is there already, and may hold a review: name a new "
            "file"
        )
    if limit < 0:
        raise UsageError(f"--limit={limit}: cannot be negative; 0 writes all")
    with waiting("reading labelled examples", quiet=quiet):
        examples, unlabelled = labelled_examples(data, split, allowed_modules)
    message = f"judging the labels of {len(examples):,} examples"
    with waiting(message, quiet=quiet):
        ranking = rank(examples, seed=seed)
    written = write(ranking, output, limit)
    print(describe(ranking))
    if unlabelled:
        print(f"{unlabelled:,} examples carry no label and were left out")
    print(f"wrote {written:,} examples to {output}, the worst first")


def labelled_examples(
    data: DataSettings, split: str, allowed_modules: tuple[str, ...]
) -> tuple[list[Example], int]:
    """Reads the examples of the configuration's Task that carry a label.

    The label is that of the document, where its source reads one; otherwise, in a
    Task of inputs and targets, the target: "positive", "entailment".

    Returns:
        The examples, and how many others carry no label.

    Raises:
        StoreError: it is a Mixture, lacks the split, or has no labels.
    """
    from tasks import seqio_tasks  # imports SeqIO, which takes seconds

    found = seqio_tasks.find(data, allowed_modules).tasks
    if len(found) != 1:
        raise StoreError(
            f"MIXTURE_OR_TASK_NAME = {data.mixture_or_task_name!r} is a Mixture, and "
            "each Task has labels of its own: name one of "
            f"{', '.join(map(repr, sorted(found)))}"
        )
    (task,) = found.values()
    if split not in task.splits:
        raise StoreError(
            f"--split={split} is not a split of task {task.name!r}: it has "
            f"{', '.join(map(repr, task.splits))}"
        )
    examples, unlabelled = [], 0
    for example in _examples(task, split, data):
        if example.label:
            examples.append(example)
        else:
            unlabelled += 1
    if not examples:
        raise StoreError(
            f"task {task.name!r} has no labels to judge: none of the {unlabelled:,} "
            f"examples of split {split!r} carries one. Name the field that holds the "
            "label in its source, or make it a Task of inputs and targets whose "
            "targets are the labels"
        )
    return examples, unlabelled


def describe(ranking: Ranking) -> str:
    """Counts of each label, and the examples that are the most suspicious."""
    rows = ranking.table()
    width = max(len("label"), *(len(label) for label, *_ in rows))
    lines = [f"{'label':{width}}  examples  suspicious  mostly suggested instead"]
    lines += [
        f"{label:{width}}  {count:>8,}  {suspicious:>10,}  {instead}".rstrip()
        for label, count, suspicious, instead in rows
    ]
    if ranking.rare:
        names = ", ".join(f"{label!r} ({n})" for label, n in ranking.rare.items())
        lines.append(f"too rare to be judged: {names}")
    lines.append("")
    for suspect in ranking.suspects[:_TOP]:
        example = suspect.example
        text = " ".join(example.text.split())
        if len(text) > _TEXT_WIDTH:
            text = text[: _TEXT_WIDTH - 1] + "…"
        lines.append(
            f"{suspect.rank:>4}  {suspect.score:.4f}  {example.name}: "
            f"{example.label} → {suspect.suggested}?  {text}"
        )
    return "\n".join(lines)


def _examples(task: Any, split: str, data: DataSettings) -> Iterator[Example]:
    """All examples of a split, with the label "" where there is none."""
    from tasks import seqio_tasks
    from tasks.preparation import documents

    shards = range(len(seqio_tasks.shards(task, split)))
    if documents.is_plain(task):
        for shard in shards:
            with seqio_tasks.explained(f"task {task.name!r} in split {split!r}"):
                for found in task.source.documents(split, shard):
                    text = {
                        name: raw.decode(errors="replace")
                        for name, raw in found.features.items()
                    }
                    yield _example(found.name, text, found.label)
        return
    data = dataclasses.replace(data, vocabulary="bytes", bad_utf8="replace")
    for shard in shards:
        for document in documents.read(task, split, shard, data):
            name = document.name.strip("'")  # quoted to stand in messages
            yield _example(name, document.text, "")


def _example(name: str, text: Mapping[str, str], label: str) -> Example:
    """An example whose target is its label, unless it has a label of its own."""
    if "inputs" not in text:
        return Example(name, text["targets"], label.strip())
    return Example(name, text["inputs"], (label or text["targets"]).strip())
