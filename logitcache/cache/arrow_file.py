"""Reads the Arrow file of a shard so that no byte of it is trusted.

Arrow checks little of a file unless it is asked to, and expands compressed buffers before anything can be checked. So the
footer and the header of the record batch, which are FlatBuffers, are first read here: a file with compressed buffers,
dictionaries, several batches or swapped bytes is refused. Then Arrow reads it and validates it completely.
"""

import struct
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from logitcache.cache.schema import accepts
from logitcache.errors import ShardCorruptError

_MAGIC = b"ARROW1"
_RECORD_BATCH = 3  # of the union MessageHeader
_BLOCK = struct.Struct("<qi4xq")  # offset, bytes of the header, bytes of the buffers


def read(
    data: pa.Buffer, *, accepts: Callable[[pa.Schema], bool] = accepts, validated: bool = False
) -> tuple[pa.RecordBatch, memoryview]:
    """The record batch of a shard's file, and its bytes there: header and buffers.

    Args:
        accepts: whether the file may have this schema.
        validated: this process has validated it before.
    Raises: ShardCorruptError for another file, without naming it; MemoryError.
    """
    try:
        start, stop = message_span(memoryview(data))
        reader = pa.ipc.open_file(pa.BufferReader(data))
        if not accepts(reader.schema):
            raise ShardCorruptError(
                f"its columns are {', '.join(reader.schema.names)}, which such a file does not have"
            )
        batch = reader.get_batch(0)
        if not validated:
            batch.validate(full=True)
            for field, column in zip(batch.schema, batch.columns, strict=True):
                if (column.null_count and not field.nullable) or _inner_nulls(column):
                    raise ShardCorruptError(f"column {field.name}: a value is null")
    except (pa.ArrowException, struct.error, OSError, OverflowError, UnicodeDecodeError) as e:
        if isinstance(e, MemoryError):
            raise
        raise ShardCorruptError(f"not a valid Arrow file ({(str(e) or type(e).__name__).splitlines()[0]})") from e
    return batch, memoryview(data)[start:stop]


def message_span(data: memoryview) -> tuple[int, int]:
    """Where the only record batch of a file begins and ends.

    Raises: ShardCorruptError for a file whose footer or batch header is not what a shard has.
    """
    end = len(data) - 10
    if end < 8 or data[:6] != _MAGIC or data[-6:] != _MAGIC:
        raise ShardCorruptError("not an Arrow file")
    size = _number("<i", data, end)
    if not 4 <= size <= end - 8:
        raise ShardCorruptError("the footer of the Arrow file does not fit into it")
    footer = data[end - size : end]
    root = _number("<I", footer, 0)
    schema, dictionaries, batches = (_follow(footer, root, field) for field in (1, 2, 3))
    if schema is None or ((order := _field(footer, schema, 0)) and _number("<h", footer, order)):
        raise ShardCorruptError("an Arrow file of swapped bytes")
    if dictionaries is not None and _number("<I", footer, dictionaries):
        raise ShardCorruptError("an Arrow file with dictionaries")
    if batches is None or _number("<I", footer, batches) != 1:
        raise ShardCorruptError("an Arrow file that does not have one record batch")
    offset, header, body = _BLOCK.unpack(_slice(footer, batches + 4, _BLOCK.size))
    if offset < 8 or header < 8 or body < 0 or offset + header + body > end - size:
        raise ShardCorruptError("the record batch of the Arrow file does not fit into it")
    if _number("<I", data, offset) != 0xFFFFFFFF:
        raise ShardCorruptError("an Arrow file of an old version")
    message = data[offset + 8 : offset + header]
    root = _number("<I", message, 0)
    kind, batch = _field(message, root, 1), _follow(message, root, 2)
    if kind is None or batch is None or message[kind] != _RECORD_BATCH:
        raise ShardCorruptError("the footer of the Arrow file names something else as its record batch")
    if _field(message, batch, 3) is not None:
        raise ShardCorruptError("compressed buffers: the Arrow files of a cache have none")
    return offset, offset + header + body


def _inner_nulls(column: Any) -> bool:
    """Whether a list or a struct of the column contains a null."""
    if pa.types.is_struct(column.type):
        children = [column.field(i) for i in range(column.type.num_fields)]
    elif pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        children = [column.values]
    else:
        return False
    return any(child.null_count or _inner_nulls(child) for child in children)


# FlatBuffers: a table begins with the distance back to its vtable, which has the place of each field in the table.


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a field of a table is; None if the table does not have it."""
    vtable = table - _number("<i", data, table)
    place = 4 + 2 * number
    if place + 2 > _number("<H", data, vtable) or not (offset := _number("<H", data, vtable + place)):
        return None
    _slice(data, table + offset, 1)
    return table + offset


def _follow(data: memoryview, table: int, number: int) -> int | None:
    """Where the table or vector is that a field refers to."""
    place = _field(data, table, number)
    return None if place is None else place + _number("<I", data, place)


def _number(kind: str, data: memoryview, place: int) -> int:
    return struct.unpack(kind, _slice(data, place, struct.calcsize(kind)))[0]


def _slice(data: memoryview, place: int, size: int) -> memoryview:
    if not 0 <= place <= len(data) - size:
        raise ShardCorruptError("the metadata of the Arrow file refers to places outside it")
    return data[place : place + size]
