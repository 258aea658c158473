"""Who does the items of a stage: this process, several, or Apache Beam.

An item is done whole or in part, and taken up where it was left, so it does not matter
who does it, or how often.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from tasks.errors import StoreError
from tasks.preparation import stages
from tasks.preparation.tokenise import Amount, Report

Item = Mapping[str, Any]


class WorkerLostError(StoreError):
    """A worker ended in the middle; what it had finished is there."""


class Engine(Protocol):
    """What does all items of a stage, and raises the first StoreError of any."""

    def __call__(
        self, work: str, stage: str, items: Sequence[Item], report: Report
    ) -> None:
        """Returns when every item is done."""


def in_this_process(
    work: str, stage: str, items: Sequence[Item], report: Report
) -> None:
    """Does one item after the other."""
    for item in items:
        stages.do(work, stage, item, report)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Processes of this machine, each of which takes the next item when it is free.

    Attributes:
        number: most processes at a time.
    """

    number: int

    def __call__(
        self, work: str, stage: str, items: Sequence[Item], report: Report
    ) -> None:
        """Returns when every item is done.

        Raises:
            StoreError: the first fault of any; the other processes are stopped.
        """
        orders: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            orders.put(item)
        reports: queue.SimpleQueue[Amount | BaseException | None] = queue.SimpleQueue()
        number = min(self.number, len(items))
        if number < 2:
            in_this_process(work, stage, items, report)
            return
        with contextlib.ExitStack() as stack:
            for _ in range(number):
                process = stack.enter_context(_process(work, stage))
                thread = threading.Thread(
                    target=_drive, args=(process, orders, reports), daemon=True
                )
                thread.start()
            while number:
                said = reports.get()
                if isinstance(said, BaseException):
                    raise said
                if said is None:
                    number -= 1
                else:
                    report(said)


@dataclasses.dataclass(frozen=True)
class Beam:
    """An Apache Beam runner, whose workers must reach the folders by the same paths.

    Attributes:
        runner: such as "DirectRunner", "FlinkRunner" or "DataflowRunner".
        options: flags for Beam, such as ("--region=europe-west4",).
    """

    runner: str
    options: tuple[str, ...] = ()

    def __call__(
        self, work: str, stage: str, items: Sequence[Item], report: Report
    ) -> None:
        """Returns when every item is done; what was done is reported at the end.

        Raises:
            StoreError: the pipeline failed, or Beam is not installed.
        """
        del report  # what was done is in the parts
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions
        except ImportError as error:
            raise StoreError(
                f"--runner needs Apache Beam ({error}): pip install 'switchyard[data]'"
            ) from None
        if self.runner == "DirectRunner":  # logs what it raises, with a stack
            logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        options = PipelineOptions([f"--runner={self.runner}", *self.options])
        try:
            with beam.Pipeline(options=options) as pipeline:
                _ = (
                    pipeline
                    | beam.Create([json.dumps(item) for item in items])
                    | beam.Reshuffle()
                    | beam.Map(_do_for_beam, work, stage, os.getcwd(), sys.path)
                )
        except Exception as error:  # Beam wraps what a worker raised
            raise StoreError(_innermost(error)) from error


def _do_for_beam(
    item: str, work: str, stage: str, folder: str, path: Sequence[str]
) -> None:
    """Does an item in a worker of Beam."""
    if os.path.isdir(folder):
        os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]
    stages.do(work, stage, json.loads(item), lambda amount: None)


def _innermost(error: BaseException) -> str:
    """What the worker said, out of the layers that Beam puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "StoreError: " in line:
            return line.partition("StoreError: ")[2].partition(" [while running")[0]
    return f"the Beam pipeline failed: {lines[-1] if lines else type(error).__name__}"


@contextlib.contextmanager
def _process(work: str, stage: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that takes items as lines of JSON, and answers with such lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tasks.preparation.worker", work, stage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _drive(
    process: subprocess.Popen[str],
    orders: "queue.SimpleQueue[Item]",
    reports: "queue.SimpleQueue[Amount | BaseException | None]",
) -> None:
    """Hands items to a worker until there are none, and passes on what it says."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while True:
            item = orders.get_nowait()
            with contextlib.suppress(
                BrokenPipeError
            ):  # it ended; then so do its answers
                process.stdin.write(json.dumps(item) + "\n")
                process.stdin.flush()
            if not _until_done(process.stdout, reports.put):
                raise WorkerLostError(
                    f"the worker of {json.dumps(item)} ended with code "
                    f"{process.wait()}: run the same command again to go on; if memory "
                    "ran out, with fewer --num_workers"
                )
    except queue.Empty:
        reports.put(None)
    except Exception as error:  # else nobody would hear of it
        reports.put(error)


def _until_done(lines: Any, report: Callable[[Amount], None]) -> bool:
    """Passes on what a worker says of one item; False if it stops in the middle."""
    for line in lines:
        try:
            said = json.loads(line)
        except ValueError:  # cut off, since it was killed while it said it
            return False
        if "error" in said:
            raise StoreError(said["error"])
        if "done" in said:
            return True
        report(Amount(**said))
    return False
