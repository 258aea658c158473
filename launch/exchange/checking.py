"""Whether a run and a public model, or two of either, make the same of some tokens.

A public model is computed by `transformers`, where it is installed; else its arrays are
read by our rules, and computed as a run is; or what is known of it is its fingerprint,
which whoever wrote it has left beside it.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import MANIFEST, read_manifest
from launch.checkpoints.there import There
from launch.config import reader
from launch.config.reader import ResolvedConfig
from launch.exchange import importing, observing, seen
from launch.exchange.families import FAMILIES, family_of
from launch.exchange.family import ExchangeError
from launch.exchange.folder import CONFIG, knobs_for, read_config
from launch.exchange.rules import read
from launch.exchange.seen import Difference, Seen
from launch.exchange.tensors import open_tensors

ALLOWED = 1e-4  # over the largest number
_ROUNDED = np.dtype(ml_dtypes.bfloat16)
_NEVER_ROUNDED = ("selection_bias", "correction_bias")
_ROOM = 1.5  # memory that transformers needs, over the bytes of a model in float32


class Side(NamedTuple):
    """One of two models that are compared.

    Attributes:
        seen: what it makes of the tokens.
        by: what has computed it.
        why: why not by `transformers`; "" if by it, or if it is a run.
    """

    seen: Seen
    by: str
    why: str = ""


def of_run(
    config: ResolvedConfig, step: int | None = None, *, rounds: bool = False
) -> Side:
    """Computes what a checkpoint of a run makes of the tokens.

    Args:
        config: configuration of the run.
        step: the checkpoint's; None takes the newest.
        rounds: whether parameters are rounded to bfloat16 first.
    Raises:
        ExchangeError: its routers do not choose token by token.
        CheckpointError: it cannot be read.
    """
    folder = Path(config.settings.loop.model_dir)
    _refuse_others(config, folder)
    layers, there = config.settings.layers, There(folder)
    tokens = seen.tokens_for(layers.stacks, config.settings.model.vocab_size)
    with there.held(there.step(step)) as (path, _):
        arrays = Arrays(path, read_manifest(path))

        def array(name: str, place: int | None) -> np.ndarray:
            at = f"params/{name}"
            found = arrays.opened(at)
            if place is not None:  # one of all layers, if they share it
                found = found[min(place, found.shape[0] - 1)]
            values = np.asarray(arrays.result(at, found.read()))
            return _as_kept(values, rounds=rounds and not at.endswith(_NEVER_ROUNDED))

        made = observing.observe(layers, array, tokens)
    return Side(made, f"step {path.name} of {folder}")


def of_public(folder: Path, free: int | None, *, rounds: bool = False) -> Side:
    """Computes what a public model makes of the tokens, by what is installed.

    Args:
        folder: that of the model.
        free: bytes of memory that `transformers` may have; None if nobody knows.
        rounds: whether parameters are rounded to bfloat16 first.
    Raises:
        ExchangeError: it is not what its config.json says.
        TensorsError: a file of its cannot be read.
    """
    why = _why_not_transformers(folder, free)
    if not why:
        try:
            return by_transformers(folder, rounds=rounds)
        except ExchangeError as error:
            why = str(error)
    return by_rules(folder, rounds=rounds)._replace(why=why)


def by_transformers(folder: Path, *, rounds: bool = False) -> Side:
    """Lets `transformers` compute what a public model makes of the tokens.

    Args:
        folder: that of the model.
        rounds: whether parameters are rounded to bfloat16 first.
    Raises:
        ExchangeError: it cannot.
    """
    from launch.exchange import theirs

    said = read_config(folder)
    family = FAMILIES[family_of(said, str(folder / CONFIG))]
    architecture = (said.get("architectures") or [family.architecture])[0]
    tokens = seen.tokens_for(family.layers, family.said(said)["vocab_size"])
    try:
        given = folder, str(architecture), family, tokens
        made = theirs.observe(*given, rounds=rounds)
    except Exception as error:  # whatever another package raises
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExchangeError(
            f"transformers {theirs.VERSION} cannot: {type(error).__name__}: {reason}"
        ) from error
    return Side(made, f"transformers {theirs.VERSION}")


def by_rules(folder: Path, *, rounds: bool = False) -> Side:
    """Computes what a public model makes of the tokens, its arrays read by our rules.

    Args:
        folder: that of the model.
        rounds: whether parameters are rounded to bfloat16 first.
    Raises:
        ExchangeError: it is not what its config.json says.
        TensorsError: a file of its cannot be read.
    """
    data, knobs = knobs_for(folder, Path("unused"))
    bindings = [f"{macro}={value!r}" for macro, value in knobs.items()]
    settings = reader.read(["hardware/here.gin", data], bindings).settings
    public = importing.opened(folder, settings.layers, np.dtype(np.float32))
    chosen = {(each.path, each.layer): (each, rule) for each, rule in public.chosen}

    def array(name: str, place: int | None) -> np.ndarray:
        each, rule = chosen[name, place]
        found = read(public.theirs, each.prefix, rule, each.shape)
        return _as_kept(found, rounds=rounds and not name.endswith(_NEVER_ROUNDED))

    tokens = seen.tokens_for(settings.layers.stacks, settings.model.vocab_size)
    made = observing.observe(settings.layers, array, tokens)
    return Side(made, f"{folder} as it is read here")


def by_fingerprint(folder: Path) -> Side | None:
    """Returns what a public model is known to make of the tokens, if it is known.

    Raises:
        ExchangeError: the fingerprint is damaged.
    """
    made = seen.kept(folder)
    return None if made is None else Side(made, f"the fingerprint in {folder}")


def elsewhere(
    folder: Path, free: int | None, *, rounds: bool
) -> tuple[Side | None, str]:
    """Returns what somebody else makes of the tokens with a public model.

    Args:
        folder: that of the model.
        free: bytes of memory that `transformers` may have; None if nobody knows.
        rounds: whether parameters are rounded to bfloat16 first.
    Returns:
        It, by `transformers`, else by its fingerprint, else None; and why it is None.
    Raises:
        ExchangeError: the fingerprint is damaged.
    """
    why = _why_not_transformers(folder, free)
    if not why:
        try:
            return by_transformers(folder, rounds=rounds), ""
        except ExchangeError as error:
            why = str(error)
    made = by_fingerprint(folder)
    if made is not None and rounds and not is_rounded(folder):
        return None, f"{why}; and {made.by} is of numbers that are not rounded"
    return None if made is None else made._replace(why=why), why


def compared(one: Side, other: Side) -> Difference:
    """Compares what is right with what may be wrong.

    Raises:
        ExchangeError: they are other models.
    """
    try:
        return seen.difference(one.seen, other.seen, ALLOWED)
    except ExchangeError as error:
        raise ExchangeError(f"{one.by} and {other.by}: {error}") from error


def is_rounded(folder: Path) -> bool:
    """Whether no parameter of a model needs more than bfloat16.

    Args:
        folder: that of a public model, or of a step of a run.
    """
    if (folder / MANIFEST).is_file():
        arrays = read_manifest(folder)["arrays"]
        types = {
            name: said["dtype"]
            for name, said in arrays.items()
            if name.startswith("params/")
        }
    else:
        found = open_tensors(folder)
        types = {name: tensor.form.dtype.name for name, tensor in found.items()}
    return not any(
        kind in ("float32", "float64", "float16")
        for name, kind in types.items()
        if not name.endswith(_NEVER_ROUNDED)
    )


def _as_kept(values: np.ndarray, *, rounds: bool) -> np.ndarray:
    """Returns numbers in float32, as the rounded ones of a file are."""
    return np.asarray(values.astype(_ROUNDED) if rounds else values, np.float32)


def _why_not_transformers(folder: Path, free: int | None) -> str:
    """Says what keeps `transformers` from computing a model; "" if nothing does."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'switchyard[convert]'"
    elements = sum(
        int(np.prod(one.form.shape, dtype=np.int64))
        for one in open_tensors(folder).values()
    )
    needed = int(_ROOM * 4 * elements)
    if free is not None and needed > free:
        return f"transformers needs {needed:,} bytes of memory, and {free:,} are free"
    return ""


def _refuse_others(config: ResolvedConfig, folder: Path) -> None:
    """Refuses what is not computed token by token."""
    lines = [
        f"ROUTER {place.sublayer.settings.router.family!r}"
        for place in config.settings.layers.sparse()
        if place.sublayer.settings.router.family not in ("token_choice", "hashed")
    ]
    if config.settings.model.image_size:
        lines.append(f"IMAGE_SIZE {config.settings.model.image_size}")
    if lines:
        raise ExchangeError(
            f"{folder} has {', '.join(dict.fromkeys(lines))}: what it makes of a token "
            "depends on more than the tokens before it, so it is not compared"
        )
