"""A shard: an Arrow IPC file of traces, and its index, a JSON file written after it."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache import codec
from logitcache.cache.manifest import FORMAT_VERSION
from logitcache.cache.schema import SCHEMA, SECTION_FIELDS, from_batch, schema_of, to_record
from logitcache.codec.frequency_table import FrequencyTable, build_table
from logitcache.errors import FormatVersionError, LogitcacheError, ShardCorruptError
from logitcache.identity import Identity
from logitcache.runtime.files import publish, publish_json, read_json
from logitcache.sections import SPANS
from logitcache.trace import Trace

DIRECTORY = "shards"
TABLE_KEY = b"logitcache.table"  # in the Arrow schema's metadata
_TABLE_ROWS = 4096  # shards of fewer rows have no table: it takes up to 36 KB and saves about 16 bytes per row


# Fields of an index that have another name in its file.
_ON_DISK = {"trace_count": "rows", "row_count": "taught_rows"}


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Ids, counts and checksum of a shard. A shard without an index is ignored."""

    name: str
    trace_count: int
    bytes: int
    sha256: str
    trace_ids: list[str]
    prompt_ids: list[str]
    token_lengths: list[int]
    row_count: int  # top-k rows: tokens with the teacher's distribution
    entries: int  # ids stored in all rows
    block_bytes: int  # of the top-k blocks
    tail_mass: float  # sum over rows
    section_tokens: dict[str, int]
    verdicts: dict[str, int]  # traces "correct" and "incorrect"
    provenance: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("unit-"))

    def to_json(self) -> dict[str, Any]:
        return {_ON_DISK.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ShardIndex":
        """Raises: ValueError for other fields than those of an index."""
        names = {_ON_DISK.get(f.name, f.name): f.name for f in fields(cls)}
        if found.keys() != names.keys():
            raise ValueError(f"fields {sorted(found)} are not those of a shard index")
        return cls(**{names[name]: value for name, value in found.items()})


@dataclass(frozen=True, slots=True)
class EncodedTrace:
    """A trace ready to be written: its record, and its part of the counts in the index."""

    record: dict[str, Any]
    row_count: int
    entries: int
    tail_mass: float

    @classmethod
    def of(cls, trace: Trace, identity: Identity) -> "EncodedTrace":
        """Encodes a trace; encoded rows take a fifth of the memory."""
        block = codec.encode(trace.rows, exact=identity.exact, pinned=identity.pin_tokens)
        return cls.counted(to_record(trace, block), trace)

    @classmethod
    def counted(cls, record: dict[str, Any], trace: Trace) -> "EncodedTrace":
        """A trace whose record exists already."""
        tail_mass = float(np.exp(trace.log_tail.astype(np.float64)).sum())
        return cls(record, len(trace.rows), len(trace.ids), tail_mass)


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard mapped into memory."""

    path: Path
    batch: pa.RecordBatch
    table: FrequencyTable | None

    def trace(self, row: int) -> Trace:
        """Decodes the trace in record ``row``.

        Raises: ShardCorruptError or FormatVersionError, naming the shard and the trace.
        """
        try:
            return from_batch(self.batch, row, self.table)
        except (LogitcacheError, ValueError) as e:
            kind = FormatVersionError if isinstance(e, FormatVersionError) else ShardCorruptError
            raise kind(f"{self.path}: trace {self.batch.column('trace_id')[row]}: {e}") from e


def write(
    directory: Path, number: int, traces: list[EncodedTrace], identity: Identity, provenance: dict[str, Any]
) -> ShardIndex:
    """Writes shard ``number``: the Arrow file first, then its index.

    Raises: WriteError; the shard is then ignored, since it has no index.
    """
    table = _share_table(traces, identity)
    # Base64: strict readers of Arrow expect metadata to be text.
    records = [t.record for t in traces]
    schema = schema_of({name for record in records for name in record}).with_metadata(
        {TABLE_KEY: base64.b64encode(table.to_bytes())} if table else None
    )
    arrow = pa.Table.from_pylist(records, schema=schema).combine_chunks()
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema) as writer:
        writer.write_table(arrow)
    data = buffer.getbuffer()
    index = index_of(number, data, traces, provenance)
    publish(directory / f"{index.name}.arrow", data)
    publish_index(directory, index)
    return index


def index_of(
    number: int, data: bytes | memoryview, traces: Sequence[EncodedTrace], provenance: dict[str, Any]
) -> ShardIndex:
    """The index of shard ``number`` with the Arrow file ``data``."""
    return ShardIndex(
        name=f"unit-{number:06d}",
        trace_count=len(traces),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        trace_ids=[t.record["trace_id"] for t in traces],
        prompt_ids=[t.record["prompt_id"] for t in traces],
        token_lengths=[len(t.record["token_ids"]) for t in traces],
        row_count=sum(t.row_count for t in traces),
        entries=sum(t.entries for t in traces),
        block_bytes=sum(len(t.record["topk"]) for t in traces),
        tail_mass=sum(t.tail_mass for t in traces),
        section_tokens=_section_tokens([t.record for t in traces]),
        verdicts={
            name: sum(t.record["correct"] is verdict for t in traces)
            for name, verdict in (("correct", True), ("incorrect", False))
        },
        provenance=provenance,
    )


def publish_index(directory: Path, index: ShardIndex) -> None:
    """Writes the index of an Arrow file that is already in ``directory``.

    Raises: WriteError.
    """
    publish_json(directory / f"{index.name}.json", {"format": FORMAT_VERSION} | index.to_json())


def _share_table(traces: list[EncodedTrace], identity: Identity) -> FrequencyTable | None:
    """Encodes the blocks of a shard again, with a table of the frequencies of its own ids, without further loss.

    Measured at k = 64: 116 bytes per row without a table, 104 with a table of other prompts, 101 with the shard's own.
    """
    if sum(t.row_count for t in traces) < _TABLE_ROWS:
        return None
    counts_V = np.zeros(identity.vocab_size, np.int64)
    for trace in traces:  # one trace at a time: a decoded shard of long traces takes gigabytes
        counts_V += np.bincount(codec.decode(trace.record["topk"]).ids, minlength=identity.vocab_size)
    counts_V[identity.pin_tokens] = 0  # stored separately
    table = build_table(counts_V)
    for trace in traces:
        rows = codec.decode(trace.record["topk"])
        trace.record["topk"] = codec.encode(rows, table=table, exact=identity.exact, pinned=identity.pin_tokens)
    return table


def _section_tokens(records: list[dict[str, Any]]) -> dict[str, int]:
    bounds = np.array([[0, *(r["sections"][f] for f in SECTION_FIELDS), len(r["token_ids"])] for r in records])
    return dict(zip(SPANS, np.diff(bounds, axis=1).sum(axis=0).tolist(), strict=True))


def read_index(path: Path) -> ShardIndex:
    """Reads the index of a shard.

    Raises: ShardCorruptError, FormatVersionError.
    """
    entries = read_json(path)
    if entries.pop("format", None) != FORMAT_VERSION:
        raise FormatVersionError(f"{path}: written by a newer logitcache; upgrade with `pip install -U logitcache`")
    try:
        return ShardIndex.from_json(entries)
    except ValueError as e:
        raise ShardCorruptError(f"{path}: {e}") from None


def read(directory: Path, index: ShardIndex, checked: bool = False) -> Shard:
    """Maps a shard into memory and verifies its checksum.

    Args:
        checked: this process has verified it before.
    Raises: ShardCorruptError naming the shard and the way out.
    """
    path = directory / f"{index.name}.arrow"
    way_out = (
        f"`logitcache verify --repair {directory.parent}` sets it aside; then generate its traces again, or copy them"
    )
    try:
        with pa.memory_map(str(path)) as source:  # the buffer stays valid after the file is closed
            data = source.read_buffer()
    except FileNotFoundError:
        raise ShardCorruptError(f"{path} is missing, but its index exists; {way_out}") from None
    if data.size != index.bytes:
        raise ShardCorruptError(f"{path}: {data.size:,} bytes, its index says {index.bytes:,}; {way_out}")
    if not checked and hashlib.sha256(data).hexdigest() != index.sha256:
        raise ShardCorruptError(f"{path}: its bytes do not match the checksum in its index; {way_out}")
    reader = pa.ipc.open_file(pa.BufferReader(data))
    if reader.schema != schema_of(reader.schema.names) or reader.num_record_batches != 1:
        raise ShardCorruptError(
            f"{path}: {reader.num_record_batches} batches of columns {reader.schema.names}, expected one batch of "
            f"{SCHEMA.names}; {way_out}"
        )
    try:
        text = (reader.schema.metadata or {}).get(TABLE_KEY)
        table = FrequencyTable.from_bytes(base64.b64decode(text, validate=True)) if text else None
    except ValueError as e:
        raise ShardCorruptError(f"{path}: its frequency table is not base64 ({e}); {way_out}") from e
    return Shard(path, reader.get_batch(0), table)
