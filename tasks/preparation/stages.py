"""The stages of a preparation that workers share, one item of work at a time.

Whoever does an item needs the folder of the preparation and nothing else, so the same
function serves this process, other processes of the machine, and Apache Beam.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from tasks import files, seqio_tasks
from tasks.preparation import assembly, documents, gathering
from tasks.preparation import plan as plans
from tasks.preparation.plan import Plan, Unit
from tasks.preparation.tokenise import (
    Amount,
    Report,
    read_vocabulary,
    tokenise,
    type_of,
)
from tasks.quality import duplicates
from tasks.store import split_path

SIGN, TOKENISE, ASSEMBLE = "sign", "tokenise", "assemble"


def do(work: str, stage: str, item: Mapping[str, Any], report: Report) -> None:
    """Does one item of a stage; what is done already is not done again.

    Args:
        work: folder of the preparation.
        stage: SIGN, TOKENISE or ASSEMBLE.
        item: the fields of a Unit, or those of a Job for ASSEMBLE.
        report: told of what was done since it was last told.
    Raises:
        StoreError: the source, a document or the disk keeps it from being done.
    """
    plan = _plan(work)
    if stage == ASSEMBLE:
        job = assembly.Job(**item)
        dtype = type_of(job.feature, read_vocabulary(work))
        assembly.write(work, plan.data.store_dir, job, dtype)
        return
    unit = Unit(**item)
    task = tasks_of(work).tasks[unit.task]
    if stage == TOKENISE:
        tokenise(work, plan, task, unit, report)
    else:
        assert stage == SIGN, stage
        _sign(work, plan, task, unit, report)


def signatures_path(work: str, unit: Unit) -> str:
    """Returns where the fingerprints of a unit's documents are kept."""
    folder = split_path(files.join(work, "signatures"), unit.task, unit.split)
    return files.join(folder, f"{unit.shard:06}")


@functools.cache
def tasks_of(work: str) -> seqio_tasks.Found:
    """Returns the Tasks of a preparation."""
    plan = _plan(work)
    return seqio_tasks.find(plan.data, plan.allowed_modules)


def _sign(work: str, plan: Plan, task: Any, unit: Unit, report: Report) -> None:
    """Writes what tells duplicates among a unit's documents."""
    path = signatures_path(work, unit)
    if files.read(path) is not None:
        return
    # What cannot be decoded is refused or left out when it is tokenised.
    data = dataclasses.replace(plan.data, bad_utf8="replace")
    records = []
    for document in documents.read(task, unit.split, unit.shard, data):
        text = "\0".join(document.text[feature] for feature in sorted(document.text))
        if document.image:
            text += "\0" + document.image.decode("latin-1")
        records.append(duplicates.fingerprint(text, plan.filters))
        report(Amount(1, 0, len(text.encode())))
    files.write(path, b"".join(records))


def forget() -> None:
    """Drops what is remembered of folders whose plan may have changed."""
    _plan.cache_clear()
    gathering.kept.cache_clear()
    tasks_of.cache_clear()


@functools.cache
def _plan(work: str) -> Plan:
    plan = plans.read(work)
    assert plan is not None, f"{work} holds no plan"
    return plan
