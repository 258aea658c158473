"""What a run takes from another run's checkpoint, and what becomes of each parameter.

All of it is known from two configurations and a manifest: no device is asked.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from launch.checkpoints.listing import columns
from launch.checkpoints.names import named_arrays
from launch.config import reader
from launch.config.diff import changes, is_of_model, told, values
from launch.config.places import sections
from launch.config.reader import ResolvedConfig
from launch.errors import ConfigError
from moe.layers import Layers
from moe.model import inventory
from moe.model.parameters import Spec
from moe.training.trained import is_trained, matches, unmatched

PARAMS = "params/"  # begins the names of parameters in a checkpoint
_ORDER = ("loaded", "new", "ignored")
_MOST = 20  # lines of arrays in an error


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of a parameter.

    Attributes:
        name: path, such as "decoder/layers/0/0/sparse/router".
        what: "loaded" from the other checkpoint; "new", as it was drawn; or "ignored",
            which the other checkpoint alone has.
        size: numbers in it.
        note: what else there is to say.
    """

    name: str
    what: Literal["loaded", "new", "ignored"]
    size: int
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """What a run begins with of another run's checkpoint.

    Attributes:
        path: the checkpoint.
        step: its step.
        digest: that of its manifest, which has one of every array.
        patterns: those of the parameters that are taken.
        fates: one of each parameter, those of the run first.
        warnings: what a user may not have meant.
    """

    path: Path
    step: int
    digest: str
    patterns: tuple[str, ...]
    fates: tuple[Fate, ...]
    warnings: tuple[str, ...]

    @property
    def loaded(self) -> list[str]:
        """Names of the parameters that are taken."""
        return [fate.name for fate in self.fates if fate.what == "loaded"]

    def origin(self) -> dict[str, Any]:
        """Returns what every checkpoint of the run keeps of where it began."""
        return {
            "path": str(self.path),
            "step": self.step,
            "digest": self.digest,
            "patterns": list(self.patterns),
        }

    def counts(self) -> dict[str, int]:
        """Returns how many numbers are loaded, new and ignored."""
        found: Counter[str] = Counter(loaded=0, new=0, ignored=0)
        for fate in self.fates:
            found[fate.what] += fate.size
        return dict(found)

    def lines(self) -> list[str]:
        """Lists the fates, one line for each kind of array."""
        kinds: dict[tuple[str, str, str], list[int]] = {}
        for fate in self.fates:
            kind = fate.what, re.sub(r"/\d+(?=/)", "/*", fate.name), fate.note
            kinds.setdefault(kind, []).append(fate.size)
        rows = [("", "arrays", "parameters", "", "")]
        rows += [
            (what, f"{len(sizes):,}", f"{sum(sizes):,}", name, note)
            for (what, name, note), sizes in sorted(
                kinds.items(), key=lambda kind: _ORDER.index(kind[0][0])
            )
        ]
        counts = self.counts()
        whole = counts["loaded"] + counts["new"]
        return [
            f"START_FROM: {self.path}",
            *(f"  {line}" for line in columns(rows, right=(1, 2))),
            f"  loaded {counts['loaded']:,} of {whole:,} parameters, {counts['new']:,} "
            f"are new; {counts['ignored']:,} of the checkpoint are ignored",
        ]


def part_of(
    config: ResolvedConfig,
    path: Path,
    manifest: Mapping[str, Any],
    vocabulary: str | None,
    *,
    allow_changes: bool = False,
) -> Part:
    """Finds what a run takes from a checkpoint by START_PATTERNS.

    Args:
        config: configuration of the run.
        path: the checkpoint.
        manifest: what it says about itself.
        vocabulary: fingerprint of the run's vocabulary; None if it is not known yet.
        allow_changes: whether embeddings may be those of another vocabulary.
    Raises:
        ConfigError: all that does not fit, or that could not have been meant.
    """
    settings = config.settings
    patterns, layers = settings.loop.start_patterns, settings.layers
    specs: dict[str, Spec] = named_arrays(inventory.specs(layers))
    saved = {
        name.removeprefix(PARAMS): array
        for name, array in manifest["arrays"].items()
        if name.startswith(PARAMS)
    }
    faults = unmatched("START_PATTERNS", patterns, specs.keys())
    faults += unmatched("START_PATTERNS", patterns, saved.keys(), f" of {path}")

    param_dtype = settings.execution.param_dtype
    fates, other_shapes = [], []
    for name, spec in specs.items():
        fate = _fate(name, spec, saved.get(name), patterns, param_dtype)
        fates.append(fate)
        if fate.what == "loaded" and saved[name]["shape"] != list(spec.shape):
            other_shapes.append(
                f"{name} is {list(spec.shape)} here and {saved[name]['shape']} in "
                f"{path}: make the models alike, or leave it out of START_PATTERNS = "
                f"{patterns}, so that it is drawn"
            )
    fates += [
        Fate(name, "ignored", math.prod(array["shape"]))
        for name, array in saved.items()
        if name not in specs
    ]
    faults += _listed(other_shapes)
    taken = {fate.name for fate in fates if fate.what == "loaded"}
    if not taken and not faults:
        faults.append(
            f"START_PATTERNS = {patterns}: {path} has no parameter of a name that is "
            "one of this run's too; `switchyard checkpoint inspect` lists them"
        )
    if not other_shapes:
        faults += _listed(_of_other_layers(taken, layers, manifest["config"], path))
    warnings = []
    of_words = [n for n in taken if "vocab" in specs[n].axes]
    if of_words and vocabulary not in (None, manifest["vocabulary_fingerprint"]):
        words = (
            f"{' and '.join(sorted(of_words))} of {path} are of another vocabulary, "
            f"{manifest['vocabulary_fingerprint']}, than this run's, {vocabulary}"
        )
        if allow_changes:
            warnings.append(words)
        else:
            faults.append(
                f"{words}: set VOCABULARY and EXTRA_IDS as there, leave them out of "
                f"START_PATTERNS = {patterns}, or add --allow_changes"
            )
    more = _untrained(config, specs, taken)
    faults += more[0]
    if faults:
        raise ConfigError(config.where, faults)
    warnings += more[1]
    found = changes(manifest["config"], config.operative)
    if other := [change for change in found if is_of_model(change.macro)]:
        warnings.append(f"{path} is of another model: {told(other)}")
    return Part(
        path=path,
        step=int(manifest["step"]),
        digest=manifest.get("manifest_digest", ""),
        patterns=patterns,
        fates=tuple(fates),
        warnings=tuple(warnings),
    )


def _fate(
    name: str,
    spec: Spec,
    saved: Mapping[str, Any] | None,
    patterns: tuple[str, ...],
    param_dtype: str,
) -> Fate:
    """What becomes of a parameter of the run."""
    size, dtype = math.prod(spec.shape), spec.dtype or param_dtype
    if saved is None:
        return Fate(name, "new", size)
    if not any(matches(name, pattern) for pattern in patterns):
        return Fate(name, "new", size, "the checkpoint's is left out by START_PATTERNS")
    other = "" if saved["dtype"] == dtype else f"{saved['dtype']} → {dtype}"
    return Fate(name, "loaded", size, other)


def _listed(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - _MOST:,} more arrays"] * (len(lines) > _MOST)
    return [*lines[:_MOST], *more]


# ------------------------------------------------------------------ what is not meant


def _untrained(
    config: ResolvedConfig, specs: Mapping[str, Spec], taken: set[str]
) -> tuple[list[str], list[str]]:
    """Names what is drawn at random and stays so: faults, and warnings.

    Experts and routers that never learn cannot have been meant. What does not start at
    random, such as scales of 1, does no harm.
    """
    optimizer = config.settings.optimizer
    names = [
        name
        for name, spec in specs.items()
        if name not in taken and spec.stddev and not is_trained(name, optimizer)
    ]
    sparse = [name for name in names if "/sparse/" in name]
    others = [name for name in names if "/sparse/" not in name]
    way_out = (
        f"START_FROM has none of them that START_PATTERNS = "
        f"{config.settings.loop.start_patterns} matches, and TRAINABLE = "
        f"{optimizer.trainable} and FROZEN = {optimizer.frozen} leave them as drawn"
    )
    faults, warnings = [], []
    if sparse:
        faults.append(f"experts untrained: {', '.join(sparse)}: {way_out}")
    if others:
        warnings.append(f"random and untrained: {', '.join(others)}: {way_out}")
    return faults, warnings


def _of_other_layers(taken: set[str], ours: Layers, text: str, path: Path) -> list[str]:
    """Names arrays of one name and shape that are of other layers of the model.

    Args:
        taken: names of the parameters that are taken.
        ours: layers of the run.
        text: the configuration that the checkpoint was made with.
        path: the checkpoint.
    """
    try:  # a checkpoint of another version may have knobs that are gone
        given = values(text, list(sections()))
        read = reader.read([], [f"{macro}={value!r}" for macro, value in given.items()])
        theirs = dict(_numbers(read.settings.layers))
    except ConfigError:
        return []
    return [
        f"{prefix} is of layers {_few(numbers)} here and {_few(theirs[prefix])} in "
        f"{path}: make the models alike, or leave it out of START_PATTERNS"
        for prefix, numbers in _numbers(ours)
        if any(name.startswith(prefix) for name in taken)
        and theirs.get(prefix, numbers) != numbers
    ]


def _numbers(layers: Layers) -> Iterator[tuple[str, range]]:
    """Where arrays of each block are in the tree, and which layers they are of."""
    ahead = {} if layers.ahead is None else {"ahead": layers.ahead}
    for name, stack in (layers.stacks | ahead).items():
        for number, segment in enumerate(stack.segments):
            for place in range(len(segment.blocks)):
                yield f"{name}/layers/{number}/{place}/", segment.numbers(place)


def _few(numbers: range) -> str:
    return ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
