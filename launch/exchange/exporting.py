"""A run that becomes a folder in the layout of Hugging Face.

Every array of the checkpoint is compared with its digest. One layer of one array is in
memory at a time, or two.
"""

import collections
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from launch.checkpoints.arrays import Arrays
from launch.checkpoints.places import DamagedError, read_manifest
from launch.checkpoints.sums import Digest
from launch.checkpoints.trained import VOCABULARY, vocabulary_of
from launch.config.reader import ResolvedConfig
from launch.exchange.families import FAMILIES, config_of, knobs_of
from launch.exchange.family import Config
from launch.exchange.header import Form
from launch.exchange.importing import CONFIG, read_config
from launch.exchange.matching import ExchangeError, Ours, ours_of
from launch.exchange.rules import Member, Rules, members, put, shape_of, sizes_of
from launch.exchange.same import differences
from launch.exchange.writing import arriving, write_tensors, writing
from tasks import vocabularies

_MOST_DIFFERENCES = 3
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Of the config.json of a model that came in, what goes out as it was.
_OF_NO_MODEL = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "router_aux_loss_coef",
)
_NOT_COPIED = (vocabularies.DESCRIPTION, CONFIG)
_NAMES = {"vocabulary.model": "tokenizer.model"}


class _Piece(NamedTuple):
    ours: Ours
    member: Member


def give(
    path: Path, to: Path, config: ResolvedConfig, dtype: str, family: str | None
) -> Path:
    """Writes the model of a checkpoint as a public one.

    Args:
        path: folder of a step.
        to: folder that is made.
        config: configuration of the run.
        dtype: type of what is written; "same" keeps that of the run.
        family: key of `FAMILIES`; None takes the first that has such models.
    Returns:
        The folder.
    Raises:
        ExchangeError: no family has such a model.
        CheckpointError: the checkpoint cannot be read.
        TensorsError: the folder is there already, or cannot be written.
    """
    name, said = _described(config, family)
    model = config.settings.model
    vocabulary = vocabulary_of(config)
    kept = Path(config.settings.loop.model_dir, VOCABULARY)
    came = read_config(kept) if (kept / CONFIG).is_file() else {}
    said = {
        **said,
        "bos_token_id": None,
        "eos_token_id": vocabulary.eos_id,
        "max_position_embeddings": config.settings.data.length,
        **{word: came[word] for word in _OF_NO_MODEL if word in came},
        "dtype": config.settings.execution.param_dtype if dtype == "same" else dtype,
    }
    manifest = read_manifest(path)
    plan = _planned(config, FAMILIES[name].readings()[0])
    if model.tie_embeddings:
        plan.pop("lm_head.weight", None)
    arrays = _Layers(Arrays(path, manifest), plan)
    forms = {
        theirs: Form(
            arrays.dtype(pieces[0].ours) if dtype == "same" else _DTYPES[dtype],
            _shape(pieces),
        )
        for theirs, pieces in plan.items()
    }
    # What a router adds to scores is read by others in float32 too.
    forms = {
        theirs: Form(_DTYPES[plan[theirs][0].ours.dtype], form.shape)
        if plan[theirs][0].ours.dtype
        else form
        for theirs, form in forms.items()
    }

    scale = model.embed_scale or math.sqrt(model.model_dim)

    def tensor(theirs: str) -> np.ndarray:
        made = np.empty(forms[theirs].shape, forms[theirs].dtype)
        for piece in plan[theirs]:
            part = arrays.read(piece.ours)[piece.member.taken]
            if piece.ours.path == "embedding" and scale != 1.0:
                part = part.astype(np.float32) * np.float32(scale)
            put(part.astype(made.dtype), made, piece.member.dims)
        return made

    with arriving(to) as part:
        with writing(part):
            text = json.dumps(said, indent=2, sort_keys=True)
            (part / CONFIG).write_text(f"{text}\n", encoding="utf-8")
            for file in sorted(kept.iterdir()) if kept.is_dir() else ():
                if file.name not in _NOT_COPIED and file.is_file():
                    shutil.copyfile(file, part / _NAMES.get(file.name, file.name))
        write_tensors(part, forms, tensor)
        arrays.refuse_damaged()
    return to


def _described(config: ResolvedConfig, family: str | None) -> tuple[str, Config]:
    """Finds a family that has such a model, and its config.json."""
    if family is not None and family not in FAMILIES:
        raise ExchangeError(
            f"--family={family} is not known: there are {', '.join(FAMILIES)}"
        )
    settings, lines = config.settings, []
    for name in FAMILIES if family is None else (family,):
        if settings.model.shape != "decoder":
            lines.append(f"{name}: ARCHITECTURE {settings.model.shape!r} → 'decoder'")
            continue
        said = config_of(name, settings.model, settings.router)
        try:
            _, knobs = knobs_of(said, CONFIG)
            if not settings.model.tie_embeddings:  # `give` scales the table
                knobs |= {"EMBED_SCALE": settings.model.embed_scale}
            found = differences(config, knobs)
        except ExchangeError as error:  # that config.json is no model of the family
            found = [" ".join(str(error).split())]
        if not found:
            return name, said
        more = len(found) - _MOST_DIFFERENCES
        found = found[:_MOST_DIFFERENCES] + [f"{more} more"] * (more > 0)
        lines.append(f"{name}: {', '.join(found)}")
    raise ExchangeError(
        "\n  ".join(
            [f"{settings.loop.model_dir} has a model that is none of these:", *lines]
        )
    )


def _planned(config: ResolvedConfig, rules: Rules) -> dict[str, list[_Piece]]:
    """Says of what each of their arrays is made; layer by layer, rule by rule."""
    plan: dict[str, list[_Piece]] = collections.defaultdict(list)

    def order(each: Ours) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", each.prefix)))

    missing = []
    for each in sorted(ours_of(config.settings.layers), key=order):
        if each.rule not in rules:
            missing.append(f"{each.prefix}{each.rule}")
            continue
        for member in members(rules[each.rule], each.shape):
            plan[each.prefix + member.name].append(_Piece(each, member))
    if missing:
        raise ExchangeError(f"nothing is said of {', '.join(missing[:3])}")
    return dict(plan)


def _shape(pieces: Sequence[_Piece]) -> tuple[int, ...]:
    """The shape of one of their arrays, which may be made of several of ours."""
    sizes: dict[str, int] = {}
    for ours, member in pieces:
        taken = np.empty((), np.bool_)
        taken = np.broadcast_to(taken, ours.shape)[member.taken]
        sizes |= sizes_of(member.dims, taken.shape)
    return shape_of(pieces[0].member.dims, sizes)


class _Layers:
    """Layers of the arrays of a checkpoint; what is read is digested once.

    Args:
        arrays: those of the checkpoint.
        plan: what is asked for, in that order.
    """

    def __init__(self, arrays: Arrays, plan: dict[str, list[_Piece]]) -> None:
        self._arrays = arrays
        self._paths = {piece.ours.path for each in plan.values() for piece in each}
        self._last: collections.OrderedDict[tuple[str, int | None], Any] = (
            collections.OrderedDict()
        )
        self._seen: set[tuple[str, int | None]] = set()
        self._digests: dict[str, Digest] = {}
        for path in self._paths:
            if f"params/{path}" not in arrays.saved:
                raise ExchangeError(f"{arrays.path} has no array params/{path}")

    def dtype(self, ours: Ours) -> np.dtype:
        """Returns the type of an array."""
        return _DTYPES[self._arrays.saved[f"params/{ours.path}"]["dtype"]]

    def read(self, ours: Ours) -> np.ndarray:
        """Returns a layer; the last two are remembered."""
        key = (ours.path, ours.layer)
        if key in self._last:
            self._last.move_to_end(key)
            return self._last[key]
        name = f"params/{ours.path}"
        array = self._arrays.opened(name)
        place = tuple(slice(0, size) for size in ours.shape)
        if ours.layer is not None:
            place = (slice(ours.layer, ours.layer + 1), *place)
        values = np.asarray(self._arrays.result(name, array[place].read()))
        if key not in self._seen:
            self._seen.add(key)
            shape = tuple(array.shape)
            self._digests.setdefault(name, Digest(shape)).add(place, values)
        found = values.reshape(ours.shape)
        self._last[key] = found
        if len(self._last) > 2:
            self._last.popitem(last=False)
        return found

    def refuse_damaged(self) -> None:
        """Raises that an array is not what was saved, if one is."""
        for name, digest in self._digests.items():
            if digest.digest() != self._arrays.saved[name]["digest"]:
                raise DamagedError(self._arrays.path, f"{name} is not what was saved")
