"""A shard: an Arrow IPC file of traces, and its index, a JSON file written after it."""

import base64
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from logitcache import codec
from logitcache.cache import arrow_file, checks
from logitcache.cache.columns import Column
from logitcache.cache.manifest import FORMAT_VERSION
from logitcache.cache.schema import SECTION_FIELDS, from_batch, metadata_of, schema_of, to_record
from logitcache.cache.shard_files import DIRECTORY, ShardFiles
from logitcache.cache.shard_files import unindexed as unindexed
from logitcache.cache.validate import check_index, reading
from logitcache.codec.frequency_table import FrequencyTable, build_table
from logitcache.errors import (
    CacheError,
    FormatVersionError,
    LogitcacheError,
    ShardCorruptError,
    UnreadableError,
    first_line,
)
from logitcache.identity import Identity
from logitcache.runtime.files import publish, read_json, to_json_bytes
from logitcache.runtime.regular_files import open_regular
from logitcache.sections import SPANS, Sections
from logitcache.storage.location import Location
from logitcache.trace import Trace

TABLE_KEY, SHA256_KEY = b"logitcache.table", b"logitcache.sha256"  # in the Arrow schema's metadata
OTHER_BYTES = "its bytes do not match the checksum in its index"
_TABLE_ROWS = 4096  # shards of fewer rows have no table: it takes up to 36 KB and saves about 16 bytes per row


# Fields of an index that have another name in its file.
_ON_DISK = {"trace_count": "rows", "row_count": "taught_rows"}
_NOT_IN_PYTHON = frozenset(_ON_DISK.values())


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Ids, counts and checksum of a shard. A shard without an index is ignored."""

    name: str
    trace_count: int
    bytes: int
    sha256: str
    trace_ids: Sequence[str]  # lists, or columns of a compacted index that equal them
    prompt_ids: Sequence[str]
    token_lengths: Sequence[int]
    row_count: int  # top-k rows: tokens with the teacher's distribution
    entries: int  # ids stored in all rows
    block_bytes: int  # of the top-k blocks
    tail_mass: float  # sum over rows
    section_tokens: dict[str, int]
    verdicts: dict[str, int]  # traces "correct" and "incorrect"
    provenance: Mapping[str, Any]

    @property
    def number(self) -> int:
        return number_of(self.name)

    @property
    def compacted(self) -> bool:
        """Whether it was read from a compacted index."""
        return isinstance(self.trace_ids, Column)

    def to_json(self) -> dict[str, Any]:
        return {_ON_DISK.get(f.name, f.name): _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "ShardIndex":
        renamed = {here: found[there] for here, there in _ON_DISK.items()}
        return cls(**renamed, **{name: value for name, value in found.items() if name not in _NOT_IN_PYTHON})


def _plain(value: Any) -> Any:
    """A list or a dict instead of what only behaves like one."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class EncodedTrace:
    """A trace ready to be written: its record, and its part of the counts in the index."""

    record: dict[str, Any]
    row_count: int
    entries: int
    tail_mass: float

    @property
    def bytes(self) -> int:
        """About what the trace takes in a shard, before the shard's frequency table makes it smaller."""
        record = self.record
        return len(record["topk"]) + 4 * len(record["token_ids"]) + 8 * self.row_count + len(record["text"])

    @classmethod
    def of(cls, trace: Trace, identity: Identity) -> "EncodedTrace":
        """Encodes a trace; encoded rows take a fifth of the memory."""
        block = codec.encode(trace.rows, exact=identity.exact, pinned=identity.pin_tokens)
        return cls.counted(to_record(trace, block), trace)

    @classmethod
    def counted(cls, record: dict[str, Any], trace: Trace) -> "EncodedTrace":
        """A trace whose record exists already."""
        return cls(record, len(trace.rows), len(trace.ids), tail_mass(trace))


def tail_mass(trace: Trace) -> float:
    """Probability mass outside the kept ids, summed over rows."""
    return float(np.exp(trace.log_tail.astype(np.float64)).sum())


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard mapped into memory."""

    place: str  # of its file, for messages: a path or a URL
    batch: pa.RecordBatch
    message: memoryview  # the bytes of the batch in the file
    table: FrequencyTable | None
    identity: Identity
    valid: bytearray  # of each record: 1 if this process has checked it

    def trace(self, row: int) -> Trace:
        """Decodes the trace in record ``row``; checks it the first time.

        Raises: ShardCorruptError, FormatVersionError or UnreadableError, naming the shard and the trace.
        """
        with self._naming(row):
            if self.valid[row]:
                return from_batch(self.batch, row, self.table)
            trace = self.decoded(row)
            checks.raise_first(checks.trace_faults(trace, self.identity))
        self.valid[row] = 1
        return trace

    def check(self, index: ShardIndex) -> None:
        """Checks all traces, and the sums in the index that the plain columns do not give.

        Raises: as ``trace``.
        """
        tails = sum(tail_mass(self.trace(row)) for row in range(self.batch.num_rows))
        if (fault := next(checks.tail_mass_faults(index.tail_mass, tails, index.row_count), None)) is not None:
            raise ShardCorruptError(f"{self.place}: {fault}")

    def decoded(self, row: int) -> Trace:
        """The trace in record ``row``, of which only the header of the block is checked.

        Raises: whatever the content of a forged record may cause.
        """
        block, rows = self.batch.column("topk")[row], self.batch.column("token_logprob")[row]
        checks.raise_first(checks.block_faults(memoryview(block.as_buffer()), len(rows), self.identity))
        return from_batch(self.batch, row, self.table)

    def tokens(self, row: int) -> tuple[np.ndarray, Sections]:
        """Token ids, int32 [L], and sections of the trace in record ``row``.

        Raises: as ``trace``.
        """
        with self._naming(row):
            token_ids = self.batch.column("token_ids")[row].values.to_numpy()
            checks.raise_first(checks.token_faults(token_ids, self.identity))
            return token_ids, Sections(**self.batch.column("sections")[row].as_py(), length=len(token_ids))

    def metadata(self, row: int) -> dict[str, Any]:
        """Raises: as ``trace``."""
        with self._naming(row):
            return metadata_of(self.batch.column("metadata")[row].as_py())

    @contextmanager
    def _naming(self, row: int) -> Iterator[None]:
        """Whatever a trace causes is the fault of that trace, and names it."""
        try:
            yield
        except Exception as e:
            kind = FormatVersionError if isinstance(e, FormatVersionError) else ShardCorruptError
            kind = UnreadableError if isinstance(e, MemoryError) else kind
            what = str(e) if isinstance(e, LogitcacheError | ValueError) else first_line(e)
            raise kind(f"{self.place}: trace {self.batch.column('trace_id')[row]}: {what}") from e


def name_of(number: int) -> str:
    return f"unit-{number:06d}"


def number_of(name: str) -> int:
    return int(name.removeprefix("unit-"))


def write(
    directory: Path, number: int, traces: list[EncodedTrace], identity: Identity, provenance: Mapping[str, Any]
) -> ShardIndex:
    """Writes shard ``number``: the Arrow file first, then its index.

    Raises: WriteError; the shard is then ignored, since it has no index.
    """
    data, index = build(number, traces, identity, provenance)
    publish(directory / f"{index.name}.arrow", data)
    publish_index(directory, index)
    return index


def build(
    number: int, traces: list[EncodedTrace], identity: Identity, provenance: Mapping[str, Any]
) -> tuple[memoryview, ShardIndex]:
    """The Arrow file of shard ``number``, and its index."""
    table = _share_table(traces, identity)
    records = [t.record for t in traces]
    arrow = pa.Table.from_pylist(records, schema=schema_of({name for record in records for name in record}))
    batch = arrow.combine_chunks().to_batches()[0]
    # Base64: strict readers of Arrow expect metadata to be text.
    data = to_bytes(batch, {TABLE_KEY: base64.b64encode(table.to_bytes())} if table else {})
    return data, index_of(number, data, traces, provenance)


def to_bytes(batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> memoryview:
    """The Arrow file of a batch. Its metadata gets the checksum of the batch, so that the file proves itself."""
    checksum = hashlib.sha256(batch.serialize()).hexdigest().encode()
    schema = batch.schema.with_metadata(metadata | {SHA256_KEY: checksum})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return buffer.getbuffer()


def index_of(
    number: int, data: bytes | memoryview, traces: Sequence[EncodedTrace], provenance: Mapping[str, Any]
) -> ShardIndex:
    """The index of shard ``number`` with the Arrow file ``data``."""
    return ShardIndex(
        name=name_of(number),
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
    publish(directory / f"{index.name}.json", index_bytes(index))


def index_bytes(index: ShardIndex) -> bytes:
    """The file of an index.

    Raises: WriteError for an index that is too large.
    """
    return to_json_bytes(index.name, {"format": FORMAT_VERSION} | index.to_json())


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

    Raises: ShardCorruptError, FormatVersionError, UnreadableError.
    """
    with reading(path):
        found = read_json(path)
    if type(version := found.get("format")) is not int or version > FORMAT_VERSION:
        raise FormatVersionError(f"{path}: written by a newer logitcache; upgrade with `pip install -U logitcache`")
    try:
        check_index(found)
        if found["name"] != path.stem:
            raise ShardCorruptError(f"it is the index of {found['name']}")
    except CacheError as e:
        raise type(e)(f"{path}: {e}") from None
    del found["format"]
    return ShardIndex.from_json(found)


def read(
    files: ShardFiles, index: ShardIndex, identity: Identity, valid: bytearray | None = None, *, indexed: bool = True
) -> Shard:
    """Maps a shard into memory, and checks it completely except for its traces, which are checked when they are read.

    Args:
        indexed: whether to compare the index with the shard.
        valid: None: this process reads the shard for the first time. Otherwise the ``Shard.valid`` of an earlier time.
    Raises: ShardCorruptError naming the shard and the way out, UnreadableError, FormatVersionError; of a cache in an object
        store also as ``Store.get``.
    """
    try:
        return _read(files, index, identity, valid, indexed)
    except ShardCorruptError:
        if not files.renew(index):
            raise
    return _read(files, index, identity, valid, indexed)


def _read(files: ShardFiles, index: ShardIndex, identity: Identity, valid: bytearray | None, indexed: bool) -> Shard:
    place, out = place_of(files.location, index.name), way_out(files.location)
    try:
        with reading(place), files.open(index) as file:
            data = _map(file)
    except FileNotFoundError:
        raise ShardCorruptError(f"{place} is missing, but its index exists; {out}") from None
    try:
        if data.size != index.bytes:
            raise ShardCorruptError(f"{data.size:,} bytes, its index says {index.bytes:,}")
        if valid is None and hashlib.sha256(data).hexdigest() != index.sha256:
            raise ShardCorruptError(OTHER_BYTES)
        opened = _open(place, data, identity, valid)
        if valid is None and indexed:
            checks.raise_first(checks.index_faults(index, opened.batch))
    except ShardCorruptError as e:
        raise ShardCorruptError(f"{place}: {e}; {out}") from e
    return opened


def read_alone(directory: Path, name: str, identity: Identity, provenance: dict[str, Any]) -> tuple[ShardIndex, bool]:
    """Makes the index of a shard whose own is missing or damaged, after checking all traces.

    Returns: the index, and whether the traces match the checksum in the shard; False if it has none.
    Raises: as ``read``.
    """
    path = directory / f"{name}.arrow"
    try:
        with reading(path), open_regular(path) as file:
            data = _map(file)
    except FileNotFoundError:
        raise ShardCorruptError(f"{path} is missing") from None
    try:
        opened = _open(str(path), data, identity, None)
        checks.raise_first(checksum_faults(opened))
        batch = opened.batch
        index = ShardIndex(
            name=name,
            trace_count=batch.num_rows,
            bytes=data.size,
            sha256=hashlib.sha256(data).hexdigest(),
            trace_ids=batch.column("trace_id").to_pylist(),
            prompt_ids=batch.column("prompt_id").to_pylist(),
            **checks.column_facts(batch),
            tail_mass=sum(tail_mass(opened.trace(row)) for row in range(batch.num_rows)),
            provenance=provenance,
        )
        check_index({"format": FORMAT_VERSION} | index.to_json())
    except ShardCorruptError as e:
        raise ShardCorruptError(f"{path}: {e}") from e
    return index, SHA256_KEY in (batch.schema.metadata or {})


def checksum_faults(opened: Shard) -> Iterator[str]:
    """A checksum of the traces in the shard itself that they do not match. Shards of older versions have none."""
    own = (opened.batch.schema.metadata or {}).get(SHA256_KEY)
    if own is not None and own != hashlib.sha256(opened.message).hexdigest().encode():
        yield "its traces do not match the checksum in its schema"


def indexed(directory: Path) -> list[str]:
    """Names of the shards in CACHE/shards that have an index, in order.

    Raises: UnreadableError.
    """
    try:
        with reading(directory):
            names = os.listdir(directory)  # faster than a glob: a cache may have 100,000
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(n.removesuffix(".json") for n in names if n.startswith("unit-") and n.endswith(".json"))


def place_of(location: Location, name: str) -> str:
    """The path or URL of a shard's Arrow file, for messages."""
    return f"{location}/{DIRECTORY}/{name}.arrow"


def way_out(location: Location) -> str:
    """What to do about a damaged shard."""
    return f"`logitcache verify --repair {location}` sets it aside; then generate its traces again, or copy them"


def _map(file: BinaryIO) -> pa.Buffer:
    """The bytes of a file, mapped into memory. They stay valid after the file is closed, and after it is deleted."""
    with pa.memory_map(f"/dev/fd/{file.fileno()}") as source:
        return source.read_buffer()


def _open(place: str, data: pa.Buffer, identity: Identity, valid: bytearray | None) -> Shard:
    """Raises: ShardCorruptError, without the path."""
    try:
        with reading(place):
            batch, message = arrow_file.read(data, validated=valid is not None)
            text = (batch.schema.metadata or {}).get(TABLE_KEY)
            table = FrequencyTable.from_bytes(base64.b64decode(text, validate=True)) if text else None
    except ValueError as e:
        raise ShardCorruptError(f"its frequency table is not base64 ({e})") from e
    if table is not None and len(table.class_V) != identity.vocab_size:
        raise ShardCorruptError(
            f"its frequency table has {len(table.class_V)} ids, the vocabulary {identity.vocab_size}"
        )
    return Shard(place, batch, message, table, identity, bytearray(batch.num_rows) if valid is None else valid)
