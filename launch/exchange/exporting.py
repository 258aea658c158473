"""A run that becomes a folder in the layout of Hugging Face.

Every array of the checkpoint is compared with its digest. One layer of one array is in
memory at a time, or two.
"""

import collections
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from launch.checkpoints.arrays import Arrays, cut
from launch.checkpoints.places import VOCABULARY, DamagedError, read_manifest
from launch.checkpoints.sums import Digest
from launch.checkpoints.trained import vocabulary_of
from launch.config.reader import ResolvedConfig
from launch.exchange.families import FAMILIES, config_of, knobs_of
from launch.exchange.family import Config, ExchangeError, Family
from launch.exchange.folder import CONFIG, read_config
from launch.exchange.header import Form
from launch.exchange.matching import Ours, ours_of, their_shape
from launch.exchange.rules import Member, members, put
from launch.exchange.same import differences
from launch.exchange.seen import Seen, keep
from launch.exchange.writing import arriving, write_tensors, writing
from tasks import vocabularies

_MOST_DIFFERENCES = 3
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Of the config.json of a model that came in, what goes out as it was.
_OF_NO_MODEL = (
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "router_aux_loss_coef",
)
_NOT_COPIED = (vocabularies.DESCRIPTION, CONFIG)
_Pieces = list[tuple[Ours, Member]]
_SENTENCEPIECE = "vocabulary.model"  # as a run keeps it


def give(
    path: Path,
    to: Path,
    config: ResolvedConfig,
    dtype: str,
    family: str | None,
    observe: Callable[[], Seen] | None,
) -> Path:
    """Writes the model of a checkpoint as a public one.

    Args:
        path: folder of a step.
        to: folder that is made.
        config: configuration of the run.
        dtype: type of what is written.
        family: key of `FAMILIES`; None takes the first that has such models.
        observe: function that says what the model makes of tokens, which is kept as
            its fingerprint; None keeps none.
    Returns:
        The folder.
    Raises:
        ExchangeError: no family has such a model.
        CheckpointError: the checkpoint cannot be read.
        TensorsError: the folder is there already, or cannot be written.
    """
    vocabulary, start = vocabulary_of(config), config.settings.data.start_token
    kept = Path(config.settings.loop.model_dir, VOCABULARY)
    came = read_config(kept) if (kept / CONFIG).is_file() else {}
    name, said, scale = _described(config, family, came.get("model_type"))
    said = {
        "eos_token_id": vocabulary.eos_id,
        "max_position_embeddings": config.settings.data.length,
        **said,
        **{word: came[word] for word in _OF_NO_MODEL if word in came},
        "bos_token_id": vocabularies.start_id(vocabulary, start) if start else None,
        "dtype": dtype,
    }
    manifest = read_manifest(path)
    plan = _planned(config, FAMILIES[name])
    arrays = _Layers(Arrays(path, manifest), plan)
    forms = {
        theirs: Form(_DTYPES[pieces[0][0].dtype or dtype], their_shape(pieces))
        for theirs, pieces in plan.items()
    }

    def tensor(theirs: str) -> np.ndarray:
        made = np.empty(forms[theirs].shape, forms[theirs].dtype)
        for ours, member in plan[theirs]:
            part = arrays.read(ours)[member.taken]
            if ours.path == "embedding" and scale != 1.0:
                part = part.astype(np.float32) * np.float32(scale)
            put(part, made, member.dims)
        return made

    with arriving(to) as part:
        with writing(part):
            text = json.dumps(said, indent=2, sort_keys=True)
            (part / CONFIG).write_text(f"{text}\n", encoding="utf-8")
            for file in sorted(kept.iterdir()) if kept.is_dir() else ():
                if file.name not in _NOT_COPIED and file.is_file():
                    is_model = file.name == _SENTENCEPIECE
                    as_theirs = FAMILIES[name].sentencepiece if is_model else file.name
                    shutil.copyfile(file, part / as_theirs)
        write_tensors(part, forms, tensor)
        arrays.refuse_damaged()
        if observe is not None:
            keep(part, observe())
    return to


def dtype_of(path: Path, config: ResolvedConfig) -> str:
    """Returns the type that a checkpoint goes out in, unless told otherwise.

    It is the run's; or, of a model that came in and was not trained, that in which it
    came.
    """
    came = read_manifest(path).get("made_of", {})
    return str(came.get("dtype") or config.settings.execution.param_dtype)


def _described(
    config: ResolvedConfig, family: str | None, first: object
) -> tuple[str, Config, float]:
    """Finds a family that has such a model.

    Args:
        config: configuration of the run.
        family: the one to take; None tries all.
        first: the one to try first.
    Returns:
        It; its config.json; and the factor that its embedding has in itself, and ours
        beside it.
    """
    if family is not None and family not in FAMILIES:
        raise ExchangeError(
            f"--family={family} is not known: there are {', '.join(FAMILIES)}"
        )
    settings, lines = config.settings, []
    model, stacks = settings.model, settings.layers.stacks
    all_families = sorted(FAMILIES, key=lambda name: name != first)
    for name in all_families if family is None else (family,):
        if set(stacks) != set(FAMILIES[name].layers):
            shape = "_".join(FAMILIES[name].layers)
            lines.append(f"{name}: ARCHITECTURE {model.shape!r} → {shape!r}")
            continue
        said = config_of(name, model, settings.router)
        try:
            _, knobs = knobs_of(said, CONFIG)
            # `give` scales the table. If that is the head too, logits are larger so.
            ours = model.embed_scale or math.sqrt(model.model_dim)
            scale = ours / knobs["EMBED_SCALE"]
            knobs |= {"EMBED_SCALE": model.embed_scale}
            if model.tie_embeddings:
                wanted = knobs.get("LOGIT_SCALE", 1.0) * scale
                same = math.isclose(wanted, model.logit_scale, rel_tol=1e-6)
                knobs |= {"LOGIT_SCALE": model.logit_scale if same else wanted}
            found = differences(config, knobs)
        except ExchangeError as error:  # that config.json is no model of the family
            found = [" ".join(str(error).split())]
        if not found:
            return name, said, scale
        more = len(found) - _MOST_DIFFERENCES
        found = found[:_MOST_DIFFERENCES] + [f"{more} more"] * (more > 0)
        lines.append(f"{name}: {', '.join(found)}")
    raise ExchangeError(
        "\n  ".join(
            [f"{settings.loop.model_dir} has a model that is none of these:", *lines]
        )
    )


def _planned(config: ResolvedConfig, family: Family) -> dict[str, _Pieces]:
    """Says of what each of their arrays is made; layer by layer, rule by rule."""
    plan: dict[str, _Pieces] = collections.defaultdict(list)

    def order(each: Ours) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", each.prefix)))

    missing = []
    rules = family.readings()[0]
    for each in sorted(ours_of(config.settings.layers, family.layers), key=order):
        if (rule := each.rule_in(rules)) is None:
            missing.append(f"{each.prefix}{each.rule}")
            continue
        for member in members(rule, each.shape):
            plan[each.prefix + member.name].append((each, member))
    if missing:
        raise ExchangeError(f"nothing is said of {', '.join(missing[:3])}")
    return dict(plan)


class _Layers:
    """Layers of the arrays of a checkpoint; what is read is digested.

    Args:
        arrays: those of the checkpoint.
        plan: what is asked for: a layer is read once, and kept as long as it is needed.
    """

    def __init__(self, arrays: Arrays, plan: dict[str, _Pieces]) -> None:
        self._arrays = arrays
        self._kept: dict[tuple[str, int | None], np.ndarray] = {}
        self._left = collections.Counter(
            (ours.path, ours.layer) for each in plan.values() for ours, _ in each
        )
        self._digests: dict[str, Digest] = {}
        layers = {
            (ours.path, ours.layer): ours for each in plan.values() for ours, _ in each
        }
        number = collections.Counter(path for path, _ in layers)
        for ours in layers.values():
            said = arrays.saved.get(f"params/{ours.path}", {}).get("shape")
            stacked = [] if ours.layer is None else [number[ours.path]]
            if said != [*stacked, *ours.shape]:
                raise ExchangeError(
                    f"params/{ours.path} of {arrays.path} has the shape {said}, and by "
                    f"config.gin {[*stacked, *ours.shape]}"
                )

    def read(self, ours: Ours) -> np.ndarray:
        """Returns a layer."""
        key = (ours.path, ours.layer)
        found = self._kept.pop(key) if key in self._kept else self._read(ours)
        self._left[key] -= 1
        if self._left[key]:
            self._kept[key] = found
        return found

    def _read(self, ours: Ours) -> np.ndarray:
        name = f"params/{ours.path}"
        array = self._arrays.opened(name)
        place = tuple(slice(0, size) for size in ours.shape)
        if ours.layer is not None:
            place = (slice(ours.layer, ours.layer + 1), *place)
        shape = tuple(array.shape)
        digest = self._digests.setdefault(name, Digest(shape))
        values = np.empty(ours.shape, array.dtype.numpy_dtype)
        whole = values if ours.layer is None else values[None]
        chunk = array.spec().to_json()["metadata"]["chunks"]
        for part in cut(whole.shape, chunk):
            there = tuple(
                slice(first.start + own.start, first.start + own.stop)
                for first, own in zip(place, part, strict=True)
            )
            read = np.asarray(self._arrays.result(name, array[there].read()))
            digest.add(there, read)
            whole[part] = read
        return values

    def refuse_damaged(self) -> None:
        """Raises that an array is not what was saved, if one is."""
        for name, digest in self._digests.items():
            if digest.digest() != self._arrays.saved[name]["digest"]:
                raise DamagedError(self._arrays.path, f"{name} is not what was saved")
