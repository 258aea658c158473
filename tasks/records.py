"""Reads documents from files of records: JSON lines and Parquet.

`Fields` says which field of a record becomes what. See `tasks.sources` for shards, and
`tasks.examples` for files of tf.Examples.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tasks.errors import StoreError
from tasks.sources import Document, Shard, encoded, lines
from tasks.streams import opened

_ROWS_AT_ONCE = 128


@dataclasses.dataclass(frozen=True)
class Fields:
    """Which fields of a record are read, and what they become.

    A field within a field is named with a dot, `"meta.language"`. Numbers become
    their digits, and null becomes empty.

    Attributes:
        features: the field of each feature, `{"targets": "text"}`.
        language: that all documents are in.
        language_field: says the language of each.
        label_field: says the label of each.
    """

    features: Mapping[str, str]
    language: str = ""
    language_field: str = ""
    label_field: str = ""

    def __post_init__(self):
        if self.language and self.language_field:
            raise StoreError(
                f"language = {self.language!r} and language_field = "
                f"{self.language_field!r}: give one of them"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the features, then of the language and of the label."""
        more = (self.language_field, self.label_field)
        return (*self.features.values(), *(name for name in more if name))

    def document(self, values: Iterable[bytes], name: str) -> Document:
        """Returns the document of the values of `names`."""
        values = iter(values)
        texts = dict(zip(self.features, values, strict=False))
        language, label = self.language, ""
        if self.language_field:
            language = next(values).decode(errors="replace")
        if self.label_field:
            label = next(values).decode(errors="replace")
        return Document(texts, name, language, label)


def read_json_lines(shard: Shard, fields: Fields) -> Iterator[Document]:
    """Yields the record of each line as a document; blank lines are passed over.

    A line that is not UTF-8, and an escape that stands for half a character, keep
    their faulty bytes.

    Raises:
        StoreError: a line is no JSON object, or lacks a field; file and line are named.
    """
    names = fields.names
    for path, begin, line in lines(shard):
        try:
            record = _parsed(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__} is no object")
            values = [_as_bytes(_value(record, name)) for name in names]
        except (ValueError, RecursionError) as error:
            if not line.strip():
                continue
            number = _line_number(path, begin)
            why = str(error)
            if isinstance(error, json.JSONDecodeError):
                why = (
                    f"{error.msg.removesuffix(' at')}, from character "
                    f"{error.pos + 1:,} on: this is no JSON"
                )
            raise StoreError(f"{path}, line {number:,}: {why}") from None
        yield fields.document(values, f"{path}@{begin}")


def read_parquet(shard: Shard, fields: Fields) -> Iterator[Document]:
    """Yields the rows of those row groups that begin in the shard.

    Raises:
        StoreError: it is no Parquet file, or it lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in shard.paths:
        with opened(path, decompress=False) as file:
            try:
                table = pq.ParquetFile(file, buffer_size=1 << 20)
                yield from _rows(table, path, shard, fields)
            except pa.ArrowException as error:
                reason = str(error).partition("\n")[0][:200]
                raise StoreError(
                    f"{path} cannot be read as Parquet: {reason}"
                ) from None


def _parsed(line: bytes) -> Any:
    """A line of JSON; a number that Python refuses to convert stays its digits."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode(errors="surrogateescape")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # only thousands of digits; looking at each number takes time
        return json.loads(text, parse_int=_number)


def _number(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def _value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field, or of a field within a field."""
    if name in record:
        return record[name]
    value: Any = record
    outer: list[str] = []
    for part in name.split("."):
        if not isinstance(value, dict):
            kind = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(no_fields(name, outer, kind))
        if part not in value:
            raise ValueError(missing(name, value, outer))
        value = value[part]
        outer.append(part)
    return value


def missing(name: str, there: Iterable[str], outer: Sequence[str] = ()) -> str:
    """Says which level of a field is missing, and what is there in its place.

    Args:
        name: that was asked for, with dots between the levels.
        there: names at the level that lacks one.
        outer: levels above it.
    """
    names = ", ".join(map(repr, sorted(there))) or "none at all"
    if not outer:
        return f"there is no field {name.split('.')[0]!r}{_of(name)} among {names}"
    part = name.split(".")[len(outer)]
    return f"field {'.'.join(outer)!r} has no field {part!r}{_of(name)} among {names}"


def no_fields(name: str, outer: Sequence[str], kind: str) -> str:
    """Says that a level of a field, of another kind, holds no fields."""
    part = name.split(".")[len(outer)]
    return f"field {'.'.join(outer)!r} is {kind}, and has no field {part!r}{_of(name)}"


def _of(name: str) -> str:
    return f" of {name!r}" if "." in name else ""


def _as_bytes(value: Any) -> bytes:
    if value is None:
        return b""
    if isinstance(value, list | dict):
        raise ValueError(f"a {type(value).__name__} cannot be text: {str(value)[:60]}")
    return encoded(value if isinstance(value, str) else json.dumps(value))


def _line_number(path: str, begin: int) -> int:
    """Counts the lines up to a byte, once there is an error to report."""
    number = 1
    with opened(path) as file:
        while begin > 0 and (part := file.read(min(begin, 1 << 20))):
            number += part.count(b"\n")
            begin -= len(part)
    return number


def _rows(table: Any, path: str, shard: Shard, fields: Fields) -> Iterator[Document]:
    """The rows of those row groups of a file that begin in the shard."""
    for name in fields.names:
        if fault := _column_fault(table.schema_arrow, name):
            raise StoreError(f"{path}: {fault}")
    row = 0
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        begin = _first_byte(group)
        if begin >= shard.start and (shard.stop is None or begin < shard.stop):
            batches = table.iter_batches(
                batch_size=_ROWS_AT_ONCE,
                row_groups=[number],
                columns=list(fields.names),
                use_threads=False,
            )
            place = row
            for batch in batches:
                columns = [_column(batch, name, path) for name in fields.names]
                for values in zip(*columns, strict=True):
                    yield fields.document(values, f"{path}:{place}")
                    place += 1
        row += group.num_rows


def _column_fault(schema: Any, name: str) -> str:
    """Why a schema has no column, or no column within a column, of a name; or ""."""
    import pyarrow as pa

    if name in schema.names:
        return ""
    fields, outer = {field.name: field.type for field in schema}, []
    for part in name.split("."):
        if outer:
            kind = fields[outer[-1]]
            if not pa.types.is_struct(kind):
                return no_fields(name, outer, f"of type {kind}")
            fields = {field.name: field.type for field in kind}
        if part not in fields:
            return missing(name, fields, outer)
        outer.append(part)
    return ""


def _first_byte(group: Any) -> int:
    column = group.column(0)
    dictionary = column.dictionary_page_offset if column.has_dictionary_page else None
    return dictionary or column.data_page_offset


def _column(batch: Any, name: str, path: str) -> list[bytes]:
    """The values of a column as bytes: those of text as they are, unchecked."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in batch.schema.names:
        column = batch.column(name)
    else:
        outer, *inner = name.split(".")
        column = pc.struct_field(batch.column(outer), inner)
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
    try:
        if not _is_text(column.type):
            column = column.cast(pa.string())
        values = column.cast(pa.large_binary()).to_pylist()
    except pa.ArrowException:
        raise StoreError(
            f"{path}: field {name!r} is of type {kind}, and cannot be text"
        ) from None
    return [b"" if value is None else value for value in values]


def _is_text(kind: Any) -> bool:
    """Whether a column holds bytes, which nobody needs to look at here."""
    import pyarrow.types as types

    return any(
        is_kind(kind)
        for is_kind in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
        )
    )
