"""What a safetensors file says of itself: types, shapes, and where each tensor lies.

A file is the length of a header (8 bytes, little-endian), the header (JSON), and the
bytes of all tensors, row-major and little-endian, one after the other. Whatever the
header says is checked before any of it is believed.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from launch.errors import UserError, is_utf8

LENGTH_BYTES = 8
MOST_HEADER_BYTES = 100_000_000  # as others read; it bounds our memory too
METADATA = "__metadata__"  # a name that is no tensor's

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

_MOST_RANK, _MOST_NUMBER = 64, 2**63 - 1  # of an array of NumPy
_MOST_SHOWN = 150  # characters of a name in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _MOST_SHOWN


class TensorsError(UserError):
    """Weights that cannot be read or written; the message says which, and why."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a tensor is without its numbers.

    Attributes:
        dtype: one of `DTYPES`.
        shape: sizes of its dims, row-major.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        form: what it is.
        begin: its first byte, counted from the end of the header.
    """

    form: Form
    begin: int


def parse(content: bytes, data_bytes: int, file: str) -> dict[str, Place]:
    """Reads a header, and checks that it accounts for every byte after it, once.

    Args:
        content: the header without its length.
        data_bytes: size of the rest of the file.
        file: its name, for an error.
    Returns:
        Where each tensor lies, in the order of the header.
    Raises:
        TensorsError: the header is not what it should be.
    """
    said = parsed_json(content, f"the header of {file}")
    metadata = said.pop(METADATA, None)
    if metadata is not None and not _is_text_by_name(metadata):
        raise TensorsError(
            f"{file} has {METADATA} {shown(metadata)}: it is an object of text"
        )
    places = {name: _place(name, item, file) for name, item in said.items()}
    _check_cover(places, data_bytes, file)
    return places


def form_header(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> bytes:
    """Returns the beginning of a file, up to the first tensor, which is aligned.

    Args:
        forms: what the file holds, in the order of its bytes.
        metadata: kept as it is.
    """
    said: dict[str, Any] = {METADATA: dict(metadata)}
    begin = 0
    for name, form in forms.items():
        assert name != METADATA
        assert name not in said
        end = begin + form.num_bytes
        said[name] = {
            "dtype": NAME_OF[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    content = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % LENGTH_BYTES)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def parsed_json(content: bytes, where: str) -> dict[str, Any]:
    """Reads a JSON object, in which no name may stand twice.

    Args:
        content: its text.
        where: what holds it, for an error.
    Raises:
        TensorsError: it is none.
    """

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:  # the second would hide the first
                raise TensorsError(f"{where} has the name {shown(name)} twice")
            made[name] = value
        return made

    try:
        said = json.loads(content.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        why = str(error)[:100]  # it may quote the whole file
        raise TensorsError(f"{where} is not JSON: {why}") from error
    if not isinstance(said, dict):
        raise TensorsError(f"{where} is {shown(said)} and not a JSON object")
    return said


def shown(value: Any) -> str:
    """Shows a part of a file in a message: never long, and on one line."""
    if isinstance(value, str) and len(value) <= _MOST_SHOWN:
        return ascii(value)
    return _SHORT.repr(value).encode("ascii", "backslashreplace").decode()


def _is_text_by_name(said: Any) -> bool:
    return isinstance(said, dict) and all(isinstance(one, str) for one in said.values())


def _place(name: str, said: Any, file: str) -> Place:
    """Reads what a header says of one tensor; its bytes fit its shape."""
    of = f"tensor {shown(name)}"
    if not is_utf8(name):
        raise TensorsError(f"{file} names {of}, which is no text")
    if not isinstance(said, dict):
        raise TensorsError(f"{file} says {shown(said)} of {of}: it is a JSON object")
    known = said.get("dtype")
    if not isinstance(known, str) or known not in DTYPES:
        raise TensorsError(
            f"{file} holds {of} as {shown(known)}: types that are read are "
            f"{', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[known], _counts(said.get("shape"))
    offsets = _counts(said.get("data_offsets"))
    if shape is None or len(shape) > _MOST_RANK:
        raise TensorsError(
            f"{file} gives {of} the shape {shown(said.get('shape'))}: it is a list of "
            f"at most {_MOST_RANK} numbers from 0 on"
        )
    if math.prod(dim for dim in shape if dim) * dtype.itemsize > _MOST_NUMBER:
        raise TensorsError(
            f"{file} gives {of} the shape {shape}, which no memory can hold"
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise TensorsError(
            f"{file} has {of} at {shown(said.get('data_offsets'))}: it is where its "
            "bytes begin and end"
        )
    form, (begin, end) = Form(dtype, shape), offsets
    if end - begin != form.num_bytes:
        raise TensorsError(
            f"{file} has {of} in {end - begin:,} bytes, and {known} of shape "
            f"{list(shape)} takes {form.num_bytes:,}"
        )
    return Place(form, begin)


def _counts(said: Any) -> tuple[int, ...] | None:
    """Reads a list of numbers that may count bytes; None if it is something else."""
    if isinstance(said, list) and all(
        type(one) is int and 0 <= one <= _MOST_NUMBER for one in said
    ):
        return tuple(said)
    return None


def _check_cover(places: Mapping[str, Place], data_bytes: int, file: str) -> None:
    """Refuses bytes that are of two tensors, of none, or not there."""
    end, before = 0, ""
    for name, place in sorted(places.items(), key=_begin_and_size):
        begin = f"{file} has tensor {shown(name)} at byte {place.begin:,} of its data"
        if place.begin < end:
            raise TensorsError(
                f"{begin}, within tensor {shown(before)}, which ends at {end:,}"
            )
        if place.begin > end:
            raise TensorsError(
                f"{begin}, and the {place.begin - end:,} bytes before it are of none"
            )
        end, before = place.begin + place.form.num_bytes, name
    if end > data_bytes:
        raise TensorsError(
            f"{file} is cut short: tensor {shown(before)} ends at byte {end:,} of its "
            f"data, of which {data_bytes:,} are there"
        )
    if end < data_bytes:
        raise TensorsError(
            f"{file} goes on for {data_bytes - end:,} bytes after its last tensor"
        )


def _begin_and_size(one: tuple[str, Place]) -> tuple[int, int]:
    """Orders tensors by their bytes; an empty one stands before what follows it."""
    return one[1].begin, one[1].form.num_bytes
