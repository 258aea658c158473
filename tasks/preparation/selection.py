"""Which documents of the train splits are left out: what is decided before any is.

A worker that tokenises needs only the results: a classifier of quality, and for each
document whether it repeats another.
"""

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks import files, seqio_tasks
from tasks.errors import StoreError
from tasks.preparation import documents, stages, tokenise
from tasks.preparation.engines import Engine
from tasks.preparation.plan import Plan, Unit
from tasks.preparation.tokenise import Amount, Report, classifier_path
from tasks.quality import classifier as quality
from tasks.quality import duplicates
from tasks.seqio_tasks import Found

_SAMPLED_BYTES = 256 << 20  # of text that is read to learn from, at most


def train_classifier(
    work: str, plan: Plan, found: Found, report: Report
) -> Mapping[str, Any]:
    """Trains the quality classifier if one is asked for; returns its report."""
    if not plan.filters.quality_task:
        return {}
    report_path = files.join(work, "quality.json")
    if (told := files.read(report_path)) is None:
        name, split = plan.filters.quality_task, plan.data.train_split
        good = seqio_tasks.task_named(name, plan.data, "QUALITY_TASK")
        if split not in good.splits:
            raise StoreError(
                f"QUALITY_TASK = {name!r} has no split {split!r} (TRAIN_SPLIT)"
            )
        wanted, tasks = plan.filters.quality_sample, list(found.tasks.values())
        samples = [
            quality.sample(sampled_texts(of, plan, report, wanted), wanted, seed=0)
            for of in ([good], tasks)
        ]
        classifier, learnt = quality.train(*samples, seed=0)
        files.write(classifier_path(work), classifier.to_bytes())
        alpha = plan.filters.quality_pareto
        result = learnt.to_json(alpha)
        with tempfile.TemporaryDirectory() as folder:
            figure = Path(folder, "scores.png")
            quality.draw_scores(learnt, figure, alpha=alpha)
            files.write(figure_path(work), figure.read_bytes())
        told = json.dumps(result).encode()
        files.write(report_path, told)
    return json.loads(told)


def figure_path(folder: str) -> str:
    """Returns where the figure of the scores is, in a preparation and in a store."""
    return files.join(folder, "quality.png")


def find_duplicates(work: str, plan: Plan, engine: Engine, report: Report) -> None:
    """Decides which documents of the train splits repeat an earlier one.

    Held-out documents count as earlier, so that what is scored is not learnt.
    """
    done_path = files.join(work, "duplicates", "done")
    if plan.filters.duplicates == "keep" or files.read(done_path) is not None:
        return
    held, train = plan.data.heldout_split, plan.data.train_split
    units = [*plan.units(held), *plan.units(train)]
    engine(work, stages.SIGN, list(map(dataclasses.asdict, units)), report)
    records, ends = _signatures(work, plan, units)
    found = duplicates.find(records, plan.filters)
    flags = np.where(
        found.leave_out,
        np.where(found.equal, tokenise.EXACT, tokenise.NEAR),
        tokenise.KEEP,
    ).astype(np.uint8)
    for unit, of_unit in zip(units, np.split(flags, ends), strict=True):
        files.write(tokenise.decisions_path(work, unit), of_unit.tobytes())
    files.write(done_path, b"")


def _signatures(
    work: str, plan: Plan, units: Sequence[Unit]
) -> tuple[np.ndarray, np.ndarray]:
    """What tells duplicates, of all units in order, and where all but the last end."""
    contents = list(
        files.read_many([stages.signatures_path(work, unit) for unit in units])
    )
    dtype = duplicates.record_type(plan.filters)
    ends = np.cumsum([len(content or b"") // dtype.itemsize for content in contents])
    records = np.empty(ends[-1], dtype)
    for place, end in enumerate(ends.tolist()):
        content, contents[place] = contents[place], None  # held once, not twice
        assert content is not None, "every unit was signed"
        of_unit = np.frombuffer(content, dtype)
        records[end - len(of_unit) : end] = of_unit
    return records, ends[:-1]


def sampled_texts(
    tasks: Sequence[Any], plan: Plan, report: Report, most_documents: int | None = None
) -> Iterator[str]:
    """Yields texts of the train splits, as much of each shard as of any other.

    Args:
        tasks: SeqIO Tasks.
        plan: description of the preparation.
        report: told of what was read.
        most_documents: limit for all shards together; None is no limit.
    """
    units = [
        (task, shard)
        for task in tasks
        for shard in range(len(seqio_tasks.shards(task, plan.data.train_split)))
    ]
    most_bytes = _SAMPLED_BYTES // len(units)
    of_each = None if most_documents is None else -(-most_documents // len(units))
    for task, shard in units:
        read_bytes = 0
        found = documents.read(task, plan.data.train_split, shard, plan.data)
        for document in itertools.islice(found, of_each):
            if document.fault == "bad_utf8":
                continue
            yield from document.text.values()
            size = sum(len(text.encode()) for text in document.text.values())
            report(Amount(1, 0, size))
            read_bytes += size
            if read_bytes >= most_bytes:
                break
