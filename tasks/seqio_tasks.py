"""Finds the SeqIO Tasks that the settings name, and runs them.

SeqIO and TensorFlow are imported when a function here is called, and kept away from
accelerators.
"""

import contextlib
import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import StoreError
from tasks.quiet import quiet_stderr
from tasks.settings import DataSettings

TEXT = ("targets",)
PAIRS = ("inputs", "targets")
CAPTIONS = ("images", "targets")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a name in the settings stands for.

    Attributes:
        tasks: each Task by its name; one, or those of a Mixture.
        rates: weight of each Task in the Mixture; 1 for a Task alone.
    """

    tasks: dict[str, Any]
    rates: dict[str, float]


def import_seqio() -> Any:
    """Imports SeqIO, with TensorFlow silent and away from accelerators.

    Raises:
        StoreError: it is not installed.
    """
    variable = "TF_CPP_MIN_LOG_LEVEL"
    before = os.environ.get(variable)
    os.environ.setdefault(variable, "3")
    try:
        with quiet_stderr():
            import seqio
            import tensorflow as tf

            # Looks for accelerators, loudly. Refused where somebody has used
            # TensorFlow in this process already.
            with contextlib.suppress(RuntimeError):
                tf.config.set_visible_devices([], "GPU")
    except ImportError as error:
        raise StoreError(
            f"this needs SeqIO and TensorFlow ({error}): install them with pip install "
            "'switchyard[data]', or prepare on another machine and copy STORE_DIR here"
        ) from None
    finally:
        if before is None:
            del os.environ[variable]
    return seqio


def find(data: DataSettings, allowed_modules: tuple[str, ...] = ()) -> Found:
    """Returns the Tasks that MIXTURE_OR_TASK_NAME stands for, checked.

    Args:
        data: names them, their module and their splits.
        allowed_modules: modules outside `tasks` that may be imported.
    Raises:
        StoreError: there is no such Task, or it lacks what the settings ask for.
    """
    seqio = import_seqio()
    import_module(data.mixture_or_task_module, allowed_modules)
    name = data.mixture_or_task_name
    if name in seqio.MixtureRegistry.names():
        mixture = seqio.MixtureRegistry.get(name)
        tasks = {task.name: task for task in mixture.tasks}
        with explained(f"the rates of mixture {name!r}"):
            rates = {t: float(mixture.get_rate(task)) for t, task in tasks.items()}
        found = Found(tasks, rates)
    else:
        found = Found({name: task_named(name, data)}, {name: 1.0})
    if faults := [f for task in found.tasks.values() for f in _faults(task, data)]:
        raise StoreError("; ".join(faults))
    return found


def task_named(
    name: str, data: DataSettings, macro: str = "MIXTURE_OR_TASK_NAME"
) -> Any:
    """Returns a registered Task.

    Args:
        name: key of the Task in SeqIO's registry.
        data: names the module that should register it.
        macro: that named it.

    Raises:
        StoreError: there is none of this name.
    """
    seqio = import_seqio()
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in seqio.TaskRegistry.names():
        near = difflib.get_close_matches(name, known, n=3) or known[:10]
        raise StoreError(
            f"{macro} = {name!r} is not registered by "
            f"MIXTURE_OR_TASK_MODULE = {data.mixture_or_task_module!r}: "
            f"nearest are {', '.join(map(repr, near)) or 'none at all'}"
        )
    return seqio.TaskRegistry.get(name)


def import_module(module: str, allowed_modules: tuple[str, ...]) -> None:
    """Imports a module that is ours or was allowed by name: importing runs code.

    Raises:
        StoreError: it is neither, or it cannot be imported.
    """
    if hidden := _hidden_by_ours(module):
        raise StoreError(
            f"MIXTURE_OR_TASK_MODULE = {module!r}: Switchyard has a package of the "
            f"name `tasks`, which hides your {hidden}: give that another name, such as "
            "my_tasks"
        )
    if not module.startswith("tasks.") and module not in allowed_modules:
        raise StoreError(
            f"MIXTURE_OR_TASK_MODULE = {module!r} is not one of Switchyard's own, and "
            "importing it runs its code: if you trust it, add --allow_module to the "
            "command"
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise StoreError(
            f"MIXTURE_OR_TASK_MODULE = {module!r} cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _hidden_by_ours(module: str) -> str:
    """What lies in the working directory under the name of this package, if asked for.

    T5X's users call their module of Tasks so.
    """
    names = module.split(".")
    ours = Path(__file__).parent
    there = ours.joinpath(*names[1:])
    known = there.with_suffix(".py").exists() or there.is_dir() or module in sys.modules
    if names[0] != "tasks" or (known and names[1:]):
        return ""
    if Path("tasks.py").exists():
        return "tasks.py"
    return (
        "tasks/" if Path("tasks").is_dir() and Path("tasks").resolve() != ours else ""
    )


def features(task: Any) -> tuple[str, ...]:
    """Returns the features of a Task in the order in which they are stored."""
    return tuple(sorted(task.output_features))


def shards(task: Any, split: str) -> tuple[str, ...]:
    """Returns the names of the shards of a split, in stored order.

    Raises:
        StoreError: whatever the source raises.
    """
    with explained(f"task {task.name!r} in split {split!r}"):
        return tuple(map(str, task.source.list_shards(split))) or (split,)


def source_files(task: Any, split: str) -> tuple[str, ...]:
    """Returns the files that a split is read from, as far as its source says so.

    Raises:
        StoreError: whatever the source raises.
    """
    with explained(f"task {task.name!r} in split {split!r}"):
        ask = getattr(task.source, "files", task.source.list_shards)
        return tuple(map(str, ask(split)))


def examples(
    seqio: Any, task: Any, split: str, shard: int, num_shards: int, skip: int = 0
) -> Iterator[dict[str, Any]]:
    """Runs a Task over one shard of a split, in the source's order.

    Args:
        seqio: the module.
        task: the Task.
        split: name of a split of its source.
        shard: which of `num_shards`.
        num_shards: as `shards` counts them.
        skip: examples at the beginning that are passed over.
    Yields:
        Each example as NumPy arrays and bytes.
    Raises:
        StoreError: whatever the Task's own code raises.
    """
    with explained(f"task {task.name!r} in split {split!r}"):
        info = seqio.ShardInfo(shard, num_shards) if num_shards > 1 else None
        dataset = task.get_dataset(
            # Rows of other lengths may be cut from the same store.
            sequence_length=None,
            split=split,
            shuffle=False,
            num_epochs=1,
            seed=shard,  # what is random differs from shard to shard
            shard_info=info,
            try_in_mem_cache=False,
        )
        raising = getattr(task.source, "raising", contextlib.nullcontext)
        with raising():
            yield from dataset.skip(skip).as_numpy_iterator()


def reading_bytes(seqio: Any, task: Any) -> Any:
    """Returns a copy of a Task that tokenises with SeqIO's byte vocabulary.

    From its ids the text comes back exactly, for a vocabulary that SeqIO lacks.
    """
    alphabet = seqio.ByteVocabulary()
    return task.replace(
        output_features={
            name: dataclasses.replace(feature, vocabulary=alphabet)
            for name, feature in task.output_features.items()
        }
    )


def as_bytes(ids: np.ndarray, where: str) -> bytes:
    """Returns the text whose bytes a Task of `reading_bytes` tokenised.

    Raises:
        StoreError: the ids are no bytes, so the Task tokenises by itself.
    """
    refuse_what_is_no_row(ids, where)
    if len(ids) and ids[-1] == 1:  # the end that some Tasks append
        ids = ids[:-1]
    if len(ids) and not 3 <= ids.min() <= ids.max() < 259:
        raise StoreError(
            f"{where} is not plain text: its ids reach from {ids.min()} to "
            f"{ids.max()}, so the Task tokenises by itself. Set VOCABULARY = 'task' to "
            "keep its tokens"
        )
    return (ids - 3).astype(np.uint8).tobytes()


def refuse_what_is_no_row(ids: Any, where: str) -> None:
    """What comes out of a Task must be token ids, one after the other.

    Raises:
        StoreError: it is something else, such as text or rows of ids.
    """
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu":
        return
    what = type(ids).__name__
    if isinstance(ids, np.ndarray):
        what = f"{ids.dtype}{list(ids.shape)}"
    said = " ".join(str(ids)[:60].split())
    raise StoreError(
        f"{where} is {what} ({said}), and not one row of token ids: a field that is "
        "learnt must be a single text, which the Task's last preprocessor tokenises"
    )


def _faults(task: Any, data: DataSettings) -> list[str]:
    """What a Task lacks for the settings."""
    found = []
    if features(task) not in (TEXT, PAIRS, CAPTIONS):
        found.append(
            f"task {task.name!r} has the features {list(features(task))}, but a store "
            "keeps 'targets', or 'inputs' and 'targets', or 'images' and 'targets': "
            "rename or join them in the Task"
        )
    if features(task) == CAPTIONS and data.vocabulary == "task":
        found.append(
            f"VOCABULARY = 'task': task {task.name!r} has images, which no vocabulary "
            "is for: set one of the other vocabularies"
        )
    for macro, split in (
        ("TRAIN_SPLIT", data.train_split),
        ("HELDOUT_SPLIT", data.heldout_split),
    ):
        if split not in task.splits:
            names = ", ".join(map(repr, task.splits))
            found.append(
                f"{macro} = {split!r} is not a split of task {task.name!r}, which has "
                f"{names}: name one that every Task has, give this Task one, or leave "
                "it out"
            )
    return found


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Says in one line what a user's own code raised."""
    try:
        yield
    except GeneratorExit:
        raise
    except StoreError as error:
        raise StoreError(f"{what}: {error}") from error
    except Exception as error:  # whatever it is
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if "'NoneType' object" in said:
            said += (
                ". Preprocessors get sequence_length=None: tokens are stored whole, "
                "and cut when they are read"
            )
        raise StoreError(f"{what} failed: {said}") from error
