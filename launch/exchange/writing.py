"""Tensors into a folder of safetensors, one at a time: all of it, or nothing."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from launch.exchange.header import Form, TensorsError, form_header
from launch.exchange.tensors import INDEX, WHOLE

SHARD_BYTES = 5_000_000_000

_METADATA = {"format": "pt"}  # transformers reads no file without it


@contextlib.contextmanager
def arriving(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, which gets its name when all is written.

    Args:
        folder: path that is not there yet.
    Yields:
        A new folder beside it; it is removed if anything fails.
    Raises:
        TensorsError: it is there already, or cannot be made.
    """
    folder = folder.expanduser().absolute()
    if folder.exists() or folder.is_symlink():
        raise TensorsError(
            f"{folder} is there already: take another folder, or move it away"
        )
    part = folder.with_name(f"{folder.name}.unfinished-{secrets.token_hex(8)}")
    with writing(folder):
        part.mkdir(parents=True)
    try:
        yield part
        with writing(folder):
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one sentence what keeps a file from being written.

    Raises:
        TensorsError: the disk is full, or the like.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise TensorsError(f"cannot write {path}: {why}") from error


def write_tensors(
    folder: Path,
    plan: Mapping[str, Form],
    tensor: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors as `model.safetensors`, or as shards and their index.

    Args:
        folder: existing folder without weights.
        plan: what there is to write, in the order in which it is cut into shards.
        tensor: function of a name to its numbers; asked once for each, shard by shard,
            and in a shard those with the widest numbers first, so that all are aligned.
        shard_bytes: most bytes that the numbers of one file take; a tensor larger than
            that has a file of its own.
    Raises:
        TensorsError: the disk is full, or the like.
    """
    shards = _cut(plan, shard_bytes)
    if len(shards) == 1:
        _write_file(folder / WHOLE, shards[0], tensor)
        return
    file_of: dict[str, str] = {}
    for number, forms in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, forms, tensor)
        file_of |= dict.fromkeys(forms, file)
    total = sum(form.num_bytes for form in plan.values())
    said = {"metadata": {"total_size": total}, "weight_map": file_of}
    text = json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False)
    with _new_file(folder / INDEX) as write:
        write(f"{text}\n".encode())


def _cut(plan: Mapping[str, Form], shard_bytes: int) -> list[dict[str, Form]]:
    """Cuts a plan into what each file holds, in the order of its bytes."""
    shards: list[dict[str, Form]] = [{}]
    size = 0
    for name, form in plan.items():
        if shards[-1] and size + form.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = form
        size += form.num_bytes
    return [
        dict(sorted(shard.items(), key=lambda one: -one[1].dtype.itemsize))
        for shard in shards
    ]


def _write_file(
    path: Path, forms: Mapping[str, Form], tensor: Callable[[str], np.ndarray]
) -> None:
    """Writes tensors in the order of their forms; has one of them at a time."""
    with _new_file(path) as write:
        write(form_header(forms, _METADATA))
        for name, form in forms.items():
            write(_bytes_of(name, form, tensor(name)))


def _bytes_of(name: str, form: Form, value: np.ndarray) -> memoryview:
    """The bytes of a tensor, which are copied only if they do not follow each other."""
    found = Form(value.dtype, value.shape)
    assert found == form, f"{name} is {found}, not {form}"
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """Gives what writes the next bytes of a file, all of which are on the disk then."""
    with writing(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(content: bytes | memoryview) -> None:
        left = memoryview(content)
        with writing(path):
            while left:  # one call writes at most 2 GiB
                left = left[os.write(file, left) :]

    try:
        yield write
        with writing(path):
            os.fsync(file)
    finally:
        with writing(path):
            os.close(file)
