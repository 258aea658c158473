"""Reads documents from files of tf.Examples: TFRecord and ArrayRecord."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from tasks.errors import StoreError
from tasks.records import Fields, missing
from tasks.sources import Document, Shard
from tasks.streams import opened, tensorflow

_CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, its bits reversed
_MASK = 0xA282EAD8  # what TFRecord adds to a checksum


def read_tf_records(shard: Shard, fields: Fields) -> Iterator[Document]:
    """Yields the tf.Examples of TFRecord files, which may be `.gz`.

    Raises:
        StoreError: a file is damaged, a record is no tf.Example or lacks a field.
    """
    tf = tensorflow()
    for path in shard.paths:
        if path.endswith(".gz"):  # of which TensorFlow does not notice the end
            with opened(path) as file:
                yield from _examples(_framed(file, path), path, fields)
            continue
        records = tf.data.TFRecordDataset(path)
        try:
            yield from _examples(records.as_numpy_iterator(), path, fields)
        except tf.errors.OpError as error:
            reason = str(error).partition("\n")[0][:200]
            raise StoreError(f"{path} cannot be read as TFRecord: {reason}") from None


def read_array_records(shard: Shard, fields: Fields) -> Iterator[Document]:
    """Yields the tf.Examples of ArrayRecord files.

    Raises:
        StoreError: a file is damaged, a record is no tf.Example or lacks a field.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    for path in shard.paths:
        if not os.path.isfile(path):
            raise StoreError(
                f"{path}: ArrayRecord files are read from local disks only"
            )
        try:
            reader = ArrayRecordReader(path)
            records = (reader.read() for _ in range(reader.num_records()))
            yield from _examples(records, path, fields)
            reader.close()  # tells of damage that no record lies in
        except (RuntimeError, IndexError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise StoreError(
                f"{path} cannot be read as ArrayRecord: {reason}"
            ) from None


def _framed(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The records of a TFRecord file: each between its length and a checksum.

    That of the length tells what is no TFRecord file; content that was compressed has a
    checksum already.
    """
    number = 0
    while head := file.read(12):
        size = int.from_bytes(head[:8], "little")
        if int.from_bytes(head[8:], "little") != _masked(_crc32c(head[:8])):
            raise StoreError(
                f"{path} cannot be read as TFRecord: record {number:,} has no valid "
                "length"
            )
        record = file.read(size + 4)
        if len(record) < size + 4:
            raise StoreError(
                f"{path} cannot be read as TFRecord: it ends within record {number:,}"
            )
        yield record[:-4]
        number += 1


def _crc32c(content: bytes) -> int:
    checksum = 0xFFFFFFFF
    for byte in content:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum >> 1) ^ (_CASTAGNOLI if checksum & 1 else 0)
    return checksum ^ 0xFFFFFFFF


def _masked(checksum: int) -> int:
    """A checksum as TFRecord stores it: turned by 15 bits, and something added."""
    return (((checksum >> 15) | (checksum << 17)) + _MASK) & 0xFFFFFFFF


def _examples(
    records: Iterable[bytes], path: str, fields: Fields
) -> Iterator[Document]:
    """Serialised tf.Examples as documents."""
    tf = tensorflow()
    from google.protobuf.message import DecodeError

    for number, record in enumerate(records):
        where = f"{path}:{number}"
        try:
            values = tf.train.Example.FromString(record).features.feature
        except DecodeError:
            raise StoreError(f"{where} is no tf.Example") from None
        try:
            found = [_first(values, name) for name in fields.names]
        except ValueError as error:
            raise StoreError(f"{where}: {error}") from None
        yield fields.document(found, where)


def _first(values: Any, name: str) -> bytes:
    if name not in values:
        raise ValueError(missing(name, values))
    kind = values[name].WhichOneof("kind")
    held = getattr(values[name], kind).value if kind else ()
    if len(held) > 1:
        raise ValueError(f"field {name!r} holds {len(held):,} values, and not one text")
    if not held:
        return b""
    return held[0] if kind == "bytes_list" else str(held[0]).encode()
