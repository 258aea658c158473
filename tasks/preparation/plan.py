"""What a preparation is going to do, kept where all its workers can read it.

Work is cut into units, each a shard of a split of a Task, and a unit's documents into
parts. A part is finished or not there; so whoever comes back after an interruption, or
works on another machine, sees what is left to do.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import StoreError
from tasks.settings import DataSettings, FilterSettings

PART_BYTES = 16 << 20  # of text; what an interruption may cost
PLAN = "plan.json"
# Knobs that do not decide what is stored.
_FREE = {
    "store_dir",
    "start_token",
    "task_feature_lengths",
    "objective",
    "objective_options",
    "own",
    "packing",
    "prefix_attention",
    "noise_density",
    "entities",
    "image_size",
    "patch_size",
    "image_channels",
    "mean_noise_span_length",
    "mask_token",
    "shuffle",
    "read_retries",
}


@dataclasses.dataclass(frozen=True, order=True)
class Unit:
    """A shard of a split of a Task, or of the text of good quality.

    Attributes:
        task: its name.
        split: its name.
        shard: which of the split's.
    """

    task: str
    split: str
    shard: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a worker needs to know.

    Attributes:
        data: settings of the data.
        filters: which documents of the train split are left out.
        allowed_modules: modules outside `tasks` that may be imported.
        shards: names of the shards of each split of each Task, in stored order.
        rates: weight of each Task in its Mixture.
        features: names of each Task's features.
        state: size and time of change of the files of the sources and of the
            vocabulary that are on this machine.
        part_bytes: amount of text after which a part ends.
    """

    data: DataSettings
    filters: FilterSettings
    allowed_modules: tuple[str, ...]
    shards: Mapping[str, Mapping[str, tuple[str, ...]]]
    rates: Mapping[str, float]
    features: Mapping[str, tuple[str, ...]]
    state: Mapping[str, tuple[int, int]]
    part_bytes: int = PART_BYTES

    def units(self, *splits: str) -> Iterator[Unit]:
        """Yields the units of these splits of all Tasks, or of all splits, in order."""
        for task, of_split in self.shards.items():
            for split in splits or of_split:
                for shard in range(len(of_split[split])):
                    yield Unit(task, split, shard)


def state_of(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Returns size and time of change, in ns, of those names that are local files."""
    found = {}
    for name in names:
        if files.is_local(name) and Path(name).is_file():
            status = Path(name).stat()
            found[name] = (status.st_size, status.st_mtime_ns)
    return found


def write(plan: Plan, work: str) -> None:
    """Writes the plan into the folder of the preparation."""
    files.write(files.join(work, PLAN), json.dumps(dataclasses.asdict(plan)).encode())


def read(work: str) -> Plan | None:
    """Reads the plan of a preparation, or returns None if there is none.

    Raises:
        StoreError: it cannot be read.
    """
    content = files.read(files.join(work, PLAN))
    if content is None:
        return None
    try:
        fields = json.loads(content)
        return Plan(
            data=DataSettings(**fields.pop("data")),
            filters=FilterSettings(**fields.pop("filters")),
            allowed_modules=tuple(fields.pop("allowed_modules")),
            shards={
                task: {split: tuple(names) for split, names in of_split.items()}
                for task, of_split in fields.pop("shards").items()
            },
            features={t: tuple(names) for t, names in fields.pop("features").items()},
            state={name: tuple(s) for name, s in fields.pop("state").items()},
            **fields,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{files.join(work, PLAN)} cannot be read ({error}): delete {work}, and "
            "prepare again"
        ) from None


def differences(before: Plan, now: Plan) -> list[str]:
    """Lists where an unfinished preparation is not the one that is asked for."""
    found = []
    for old, new in ((before.data, now.data), (before.filters, now.filters)):
        found += [
            f"{field.name} was {getattr(old, field.name)!r} and is "
            f"{getattr(new, field.name)!r}"
            for field in dataclasses.fields(old)
            if field.name not in _FREE
            and _plain(getattr(old, field.name)) != _plain(getattr(new, field.name))
        ]
    if found:
        return found
    found += [f"task {t!r} was in it" for t in before.shards if t not in now.shards]
    for task in now.shards:
        if task in before.features and before.features[task] != now.features[task]:
            found.append(f"task {task!r} has other features")
        for split, names in now.shards[task].items():
            if before.shards.get(task, {}).get(split) != names:
                found.append(f"split {split!r} of task {task!r} has other shards")
    found += [
        f"{name} has changed"
        for name, state in now.state.items()
        if before.state.get(name) != state
    ]
    return found[:10]


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
