"""Exports a cache as plain Parquet files, for readers that cannot decode top-k blocks."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.cache import shard
from logitcache.cache.manifest import FORMAT_VERSION
from logitcache.cache.reader import Cache
from logitcache.cache.schema import OPTIONAL, SCHEMA
from logitcache.cache.shard import Shard
from logitcache.errors import InputError, WriteError
from logitcache.interop.formats import ExportReport
from logitcache.runtime.files import atomic_directory
from logitcache.sparse_rows import SparseRows
from logitcache.storage.location import Location, is_inside

PLAIN = [field for field in SCHEMA if field.name != "topk"]
# The decoded block of a trace: one list element per row, with the list of its entries.
ROWS = [
    pa.field("ids", pa.list_(pa.list_(pa.int32())), nullable=False),
    pa.field("logprobs", pa.list_(pa.list_(pa.float32())), nullable=False, metadata={"unit": "nats"}),
    pa.field("tail", pa.list_(pa.float32()), nullable=False, metadata={"unit": "log of the mass outside ids, nats"}),
]
IDENTITY_KEY = "logitcache.identity"  # in the schema's metadata, JSON
_GROUP_BYTES = 64 << 20  # of a row group before compression; memory holds one row group and one trace


def export_parquet(cache: Location, out: Path) -> ExportReport:
    """Writes each shard of ``cache`` as one Parquet file, compressed with zstd.

    A file has the plain columns of a shard, and ``ids``, ``logprobs`` (nats) and ``tail`` (log of the mass outside the ids,
    nats) as lists with one element per row.

    The identity is JSON in the schema's metadata. Before compression, a row group has 64 MB or up to one trace more. Memory
    use is a few row groups: 220 MB for a shard of 64 traces of 4,000 rows at k = 64.

    Args:
        out: a new directory outside the cache, written atomically.
    Raises: InputError if ``out`` is inside the cache, NotACacheError if it is not empty, CacheBusyError if another process
        is writing it, CacheError if the cache cannot be read, WriteError if ``out`` cannot be written.
    """
    opened = Cache.open(cache)
    about = {IDENTITY_KEY: json.dumps(asdict(opened.identity)), "logitcache.format": str(FORMAT_VERSION)}
    schema = pa.schema([*PLAIN, *ROWS, *_optional(opened)], metadata=about)
    if is_inside(out, cache):
        raise InputError(f"{out} lies in the cache {cache}; give `out` a directory outside it")
    size = 0
    with atomic_directory(out) as part:
        for index in opened.shards:
            source = shard.read(opened.files, index, opened.identity)
            try:
                size += _write(part / f"{index.name}.parquet", source, schema)
            except OSError as e:
                raise WriteError(f"{out}: {e.strerror or e}; nothing was written; fix the cause and run again") from e
    return ExportReport(out, len(opened.shards), len(opened), sum(s.row_count for s in opened.shards), size)


def _optional(cache: Cache) -> list[pa.Field]:
    """The optional columns that some shard has: all files of an export have the same columns."""
    names = {name for i in range(len(cache.shards)) for name in cache.shard(i).batch.schema.names}
    return [field for field in OPTIONAL if field.name in names]


def _write(path: Path, source: Shard, schema: pa.Schema) -> int:
    """Writes a shard as one file; returns its size in bytes."""
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for batch in _groups(source, schema):
                writer.write_batch(batch, row_group_size=batch.num_rows)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _groups(source: Shard, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The traces of a shard in batches of one row group each."""
    start, size, waiting = 0, 0, []
    for i in range(source.batch.num_rows):
        waiting.append(source.trace(i).rows)
        size += waiting[-1].ids.nbytes + waiting[-1].logprobs.nbytes + waiting[-1].log_tail.nbytes
        if size >= _GROUP_BYTES or i + 1 == source.batch.num_rows:
            plain = source.batch.slice(start, len(waiting))
            arrays = dict(zip(plain.schema.names, plain.columns, strict=True))
            arrays |= zip((field.name for field in ROWS), _lists(waiting), strict=True)
            nulls = (pa.nulls(plain.num_rows, field.type) for field in schema)
            columns = [arrays.get(field.name, empty) for field, empty in zip(schema, nulls, strict=True)]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
            start, size, waiting = i + 1, 0, []


def _lists(traces: list[SparseRows]) -> list[pa.Array]:
    """The columns ``ids``, ``logprobs`` and ``tail`` of some traces, without copying per row."""
    rows = SparseRows.concatenate(traces)
    # A group of 64 MB and one trace: entries stay far below the 2^31 that Arrow's offsets count.
    trace_offsets = pa.array(np.cumsum([0, *map(len, traces)]), pa.int32())
    row_offsets = pa.array(rows.offsets, pa.int32())
    return [
        pa.ListArray.from_arrays(trace_offsets, pa.ListArray.from_arrays(row_offsets, rows.ids)),
        pa.ListArray.from_arrays(trace_offsets, pa.ListArray.from_arrays(row_offsets, rows.logprobs)),
        pa.ListArray.from_arrays(trace_offsets, rows.log_tail),
    ]
