"""A public model that becomes a run: configuration, vocabulary and a checkpoint.

Its arrays are read and written one layer at a time. The checkpoint has no state of the
optimizer: `train` begins one.
"""

import collections
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from launch.checkpoints import copying
from launch.checkpoints.arrays import Index
from launch.checkpoints.places import FORMAT, VOCABULARY, folder_of, sealed
from launch.checkpoints.trained import keep_vocabulary
from launch.checkpoints.writing import manifest_written, writing
from launch.checkpoints.written import Written
from launch.config.edit import with_values
from launch.config.reader import ResolvedConfig
from launch.exchange.families import FAMILIES, family_of, knobs_of
from launch.exchange.family import ExchangeError, Family
from launch.exchange.folder import BESIDE, CONFIG, read_config, tokenizer_of
from launch.exchange.matching import Ours, matched, ours_of, their_shape
from launch.exchange.numbers import Numbers, numbers_of
from launch.exchange.rules import Member, Rule, members, read
from launch.exchange.same import differences
from launch.exchange.tensors import Tensor, open_tensors
from moe.layers import Layers
from partitioning.settings import MeshSettings
from tasks import masked_tokens, vocabularies
from tasks.vocabularies import Vocabulary

_STORE = "MODEL_DIR/store"  # in configs/data/here.gin: that of no run yet
_CHUNK_ELEMENTS = 2**22
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_ZARR = {"float32": "<f4", "int32": "<i4", "bfloat16": "bfloat16"}


class Public(NamedTuple):
    """A public model, found to be what its config.json says.

    Attributes:
        family: key of `FAMILIES`.
        chosen: our arrays, each with the rule by which it is made.
        theirs: its arrays.
        left: kinds of its arrays that are not read.
        dtype: the type of all its arrays; "" if they have several, or fewer bits.
    """

    family: str
    chosen: Sequence[tuple[Ours, Rule]]
    theirs: Numbers
    left: list[str]
    dtype: str


def opened(source: Path, layers: Layers, dtype: np.dtype) -> Public:
    """Opens the files of a public model, and compares all shapes.

    Args:
        source: folder of the model.
        layers: the model that its config.json describes.
        dtype: type of those arrays that are kept in fewer bits.
    Raises:
        ExchangeError: it is not what its config.json says.
        TensorsError: a file of its cannot be read.
    """
    config = read_config(source)
    name = family_of(config, str(source / CONFIG))
    family = FAMILIES[name]
    tensors = _tensors_of(source, family)
    theirs = numbers_of(tensors, config, dtype)
    ours = list(ours_of(layers, family.layers))
    ignored = family.left_out(family.said(config))
    rules, left = matched(ours, family.readings(), theirs, ignored, str(source))
    chosen = list(zip(ours, rules, strict=True))
    _refuse_other_shapes(chosen, theirs)
    _refuse_false_copies(chosen, theirs, family.copies)
    types = {
        tensor.form.dtype.name
        for key, tensor in tensors.items()
        if not key.endswith("correction_bias")  # which is never rounded
    }
    only = types.pop() if len(types) == 1 else ""
    return Public(name, chosen, theirs, left, only if only in _DTYPES else "")


def take_over(
    source: Path, to: Path, config: ResolvedConfig, code: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """Makes a run of a public model.

    Args:
        source: folder with config.json, safetensors and a tokenizer.
        to: folder of the run; there is none yet.
        config: configuration of the run, with the knobs of `knobs_for`.
        code: versions of what makes it, for its manifest.
    Returns:
        The checkpoint, of step 0; and what was left out: kinds of arrays, and a start
        of texts that no piece of the tokenizer is.
    Raises:
        ExchangeError: it is not what its config.json says, or the configuration is of
            another model.
        TensorsError: a file of its cannot be read.
        CheckpointError: there is a run already, or it cannot be written.
    """
    said = read_config(source)
    _, knobs = knobs_of(said, str(source / CONFIG))
    if changed := differences(config, knobs):
        raise ExchangeError(
            f"{config.where} makes another model of {source}: "
            f"{', '.join(changed)}; leave these knobs alone"
        )
    data = config.settings.data
    vocabulary = vocabularies.from_file(
        source / tokenizer_of(source), data.extra_ids, data.eos_token
    )
    try:
        masked_tokens.masking(data, vocabulary)
        vocabularies.start_id(vocabulary, data.start_token)
    except ValueError as error:
        raise ExchangeError(f"{source}: {error}") from error
    if vocabulary.size > config.settings.model.vocab_size:
        extra = f" with EXTRA_IDS = {data.extra_ids}" if data.extra_ids else ""
        raise ExchangeError(
            f"the tokenizer of {source} has {vocabulary.size:,} ids{extra}, and the "
            f"model an embedding of {config.settings.model.vocab_size:,} rows"
        )
    start_id = said.get("bos_token_id")
    start = vocabulary.piece_of(start_id) if type(start_id) is int else ""
    text = _finished(config, to, vocabulary, start or "")
    param_dtype = config.settings.execution.param_dtype
    public = opened(source, config.settings.layers, _DTYPES[param_dtype])
    if (to / "config.gin").exists():
        raise ExchangeError(f"{to} holds a run already: take another folder")
    with copying.arriving(to, 0) as part:
        kept = _written(public, param_dtype, part / "state")
        manifest = {
            "format": FORMAT,
            "step": 0,
            "data_index": 0,
            "skipped_in_a_row": 0,
            "arrays": kept,
            "mesh": dataclasses.asdict(MeshSettings()),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "parents": [],
            "made_of": {
                "path": str(source.absolute()),
                "family": public.family,
                "dtype": public.dtype,
            },
            # Nothing of it was trained here, so that no optimizer has a state of it.
            "config": with_values(text, {"TRAINABLE": (), "FROZEN": ("*",)}),
            "data_fingerprint": "none",
            "vocabulary_fingerprint": vocabulary.fingerprint,
            "hosts": 1,
            "devices": 0,
            "device_kind": "none",
            **code,
        }
        manifest_written(part, sealed(manifest))
        with writing(to):
            keep_vocabulary(to, vocabulary)
            for beside in BESIDE:
                if (source / beside).is_file():
                    shutil.copyfile(source / beside, to / VOCABULARY / beside)
            (to / "config.gin").write_text(text, encoding="utf-8")
    unknown = [f"bos_token_id = {start_id}, which the tokenizer has not"]
    return folder_of(to) / "0", public.left + unknown * (start is None)


def _tensors_of(source: Path, family: Family) -> dict[str, Tensor]:
    """Returns what the files hold, under the names that rules have."""
    found: dict[str, Tensor] = {}
    for name, tensor in open_tensors(source).items():
        known = family.renamed(name)
        if known in found:
            raise ExchangeError(f"{source} has {known} twice, once as {name}")
        found[known] = tensor
    return found


def _finished(
    config: ResolvedConfig, to: Path, vocabulary: Vocabulary, start: str
) -> str:
    """The configuration, with what is known only now."""
    values: dict[str, Any] = {}
    data = config.settings.data
    if data.layout == "decoder" and not data.start_token:
        values["START_TOKEN"] = start
    if vocabulary.kind == "huggingface":
        description = vocabularies.to_files(vocabulary)[vocabularies.DESCRIPTION]
        values["EOS_TOKEN"] = json.loads(description)["eos_token"]
    if data.store_dir == _STORE:
        values["STORE_DIR"] = str(to / "store")
    return with_values(config.operative, values)


def _refuse_other_shapes(chosen: Sequence[tuple[Ours, Rule]], theirs: Numbers) -> None:
    """Raises all shapes that are not what config.json says, before anything is read."""
    pieces: dict[str, list[tuple[Ours, Member]]] = collections.defaultdict(list)
    for each, rule in chosen:
        for member in members(rule, each.shape):
            pieces[each.prefix + member.name].append((each, member))
    lines = [
        f"{name} has the shape {found}, and it says {wanted}"
        for name, of_it in pieces.items()
        if (found := theirs.shape(name)) != (wanted := their_shape(of_it))
    ]
    if lines:
        more = [f"and {len(lines) - 20:,} more"] * (len(lines) > 20)
        raise ExchangeError(
            "\n  ".join([f"{CONFIG} describes other arrays:", *lines[:20], *more])
        )


def _refuse_false_copies(
    chosen: Sequence[tuple[Ours, Rule]],
    theirs: Numbers,
    copies: Mapping[str, str],
) -> None:
    """Raises that an array is not another again, and would be lost."""
    used = {
        each.prefix + member.name
        for each, rule in chosen
        for member in members(rule, each.shape)
    }
    for name, original in copies.items():
        if name not in theirs or name in used:
            continue
        if not np.array_equal(theirs[name], theirs[original]):
            raise ExchangeError(
                f"{CONFIG} makes {name} the same as {original}, and it is another; if "
                'it is an output projection, "tie_word_embeddings" is false'
            )


def _written(public: Public, param_dtype: str, state: Path) -> dict[str, Any]:
    """Writes all arrays of a state without an optimizer; returns what they are."""
    kept: dict[str, Any] = {}
    open_arrays: dict[str, Written] = {}

    def put(
        name: str, shape: tuple[int, ...], dtype: str, place: Index, x: Any
    ) -> None:
        if name not in open_arrays:
            metadata = _metadata(shape, dtype, layered="/layers/" in name)
            open_arrays[name] = Written(state, name, metadata)
        open_arrays[name].add(place, x)
        digest = open_arrays[name].digest()
        kept[name] = {"shape": list(shape), "dtype": dtype, "digest": digest}

    for name in ("step", "data_index", "skipped_steps", "skipped_in_a_row"):
        put(name, (), "int32", (), np.zeros((), np.int32))
    layers = collections.Counter(each.path for each, _ in public.chosen)
    # Tables are large: first, while little else has been in memory.
    for each, rule in sorted(public.chosen, key=lambda one: one[0].layer is not None):
        dtype = each.dtype or param_dtype
        array = read(public.theirs, each.prefix, rule, each.shape)
        shape, place = each.shape, tuple(slice(0, size) for size in each.shape)
        if each.layer is not None:
            shape = (layers[each.path], *shape)
            array, place = array[None], (slice(each.layer, each.layer + 1), *place)
        put(f"params/{each.path}", shape, dtype, place, array)
        del array  # before the next is read
    return kept


def _metadata(shape: tuple[int, ...], dtype: str, *, layered: bool) -> dict[str, Any]:
    """Says how an array is kept: layer by layer, and cut until chunks are small."""
    chunks, inner = [], math.prod(shape)
    for size in shape:
        inner //= size
        chunks.append(min(size, max(1, _CHUNK_ELEMENTS // inner)))
    return {
        "shape": shape,
        "chunks": [1, *chunks[1:]] if layered else chunks,
        "dtype": _ZARR[dtype],
        "compressor": {"id": "zstd", "level": 1},
    }
