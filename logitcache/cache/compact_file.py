"""The Arrow file of a compacted index: a row per shard, with all that its index says and the hash of the index's own file."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.cache import arrow_file
from logitcache.cache.columns import Column, Numbers, Texts, TraceIds
from logitcache.cache.shard import ShardIndex, number_of
from logitcache.cache.validate import FREE, UNIT
from logitcache.errors import ShardCorruptError
from logitcache.runtime.files import plain_json
from logitcache.sections import SPANS

# S shards; N traces of all shards.

_COUNTS = ("bytes", "taught_rows", "entries", "block_bytes")
LISTS = ("trace_ids", "prompt_ids", "token_lengths")
_VERDICTS = ("correct", "incorrect")


def _object(names: Sequence[str]) -> pa.DataType:
    return pa.struct([(name, pa.int64()) for name in names])


SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "name": pa.string(),
            "index_sha256": pa.binary(32),
            "sha256": pa.binary(32),
            "trace_ids": pa.list_(pa.binary(16)),
            "prompt_ids": pa.list_(pa.large_string()),
            "token_lengths": pa.list_(pa.int32()),
            **dict.fromkeys(_COUNTS, pa.int64()),
            "tail_mass": pa.float64(),
            "section_tokens": _object(SPANS),
            "verdicts": _object(_VERDICTS),
            "provenance": pa.large_string(),
        }.items()
    ]
)


class Provenance(Mapping[str, Any]):
    """The provenance of a shard, parsed when it is asked for: a cache has many, and few are read."""

    __slots__ = ("name", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def _parsed(self) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            if FREE.holds(found := plain_json(self.text)):
                return found
        raise ShardCorruptError(f"{self.name}: provenance in the compacted index is not {FREE.what}")

    def __getitem__(self, key: str) -> Any:
        return self._parsed()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed())

    def __len__(self) -> int:
        return len(self._parsed())

    def __eq__(self, other: object) -> bool:
        return self._parsed() == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


class Compacted:
    """The indexes of S shards, as columns whose content has been checked. Can be pickled."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        """Raises: ShardCorruptError."""
        self.batch = batch
        self.names: list[str] = batch.column("name").to_pylist()
        lists = [batch.column(name) for name in LISTS]
        ids, prompts, lengths = (each.values for each in lists)
        self.ids_N16 = np.frombuffer(ids.buffers()[1] or b"", np.uint8, 16 * len(ids), 16 * ids.offset).reshape(-1, 16)
        self.prompts, self.lengths_N = prompts, lengths.to_numpy()
        self.bounds = [each.offsets.to_numpy() for each in lists]  # where each shard begins, and where the last ends
        self.counts_S = np.diff(self.bounds[0])  # traces
        self._lists: dict[str, tuple[type[Column[Any]], Any, np.ndarray]] = {
            "trace_ids": (TraceIds, self.ids_N16, self.bounds[0]),
            "prompt_ids": (Texts, self.prompts, self.bounds[1]),
            "token_lengths": (Numbers, self.lengths_N, self.bounds[2]),
        }
        self._check()

    def _check(self) -> None:
        """Checks what is checked of an index, except its provenance, which is checked when it is read."""
        if not all(map(UNIT.holds, self.names)) or self.names != sorted(set(self.names)):
            raise ShardCorruptError(f"names are not {UNIT.what}, each once, in ascending order")
        self._refuse(self.counts_S < 1, "has no traces")
        for bounds in self.bounds[1:]:
            self._refuse(np.diff(bounds) != self.counts_S, "does not have one prompt id and one length for each trace")
        if self.lengths_N.min(initial=0) < 0:
            raise ShardCorruptError("token_lengths has a number below 0")
        for name in (*_COUNTS, "tail_mass"):
            numbers_S = self._numbers(name)
            self._refuse(~(np.isfinite(numbers_S) & (numbers_S >= 0)), f"{name} is not a number of at least 0")
        ends_N = np.concatenate([[0], np.cumsum(self.lengths_N, dtype=np.int64)])
        tokens_S = np.diff(ends_N[self.bounds[2]])
        self._refuse(self._numbers("taught_rows") > tokens_S, "has more rows than tokens")
        self._refuse(self._numbers("tail_mass") > self._numbers("taught_rows"), "has tails of more mass than rows")
        self._refuse(self._numbers("block_bytes") > self._numbers("bytes"), "has larger blocks than its file")
        self._refuse(self._rest("section_tokens", tokens_S) != 0, "section_tokens do not add up")
        self._rest("verdicts", self.counts_S)

    def __reduce__(self) -> tuple[Any, ...]:
        return Compacted, (self.batch,)  # of which the rest are views

    def _numbers(self, name: str) -> np.ndarray:
        return self.batch.column(name).to_numpy()

    def _rest(self, name: str, total_S: np.ndarray) -> np.ndarray:
        """What the counts of an object leave of a total, int64 [S]. Raises: ShardCorruptError if they are more."""
        counts, rest_S = self.batch.column(name), total_S.astype(np.int64)
        for i in range(counts.type.num_fields):
            count_S = counts.field(i).to_numpy()
            self._refuse((count_S < 0) | (count_S > rest_S), f"{name} do not add up")
            rest_S -= count_S  # cannot overflow
        return rest_S

    def _refuse(self, wrong_S: np.ndarray, what: str) -> None:
        if wrong_S.any():
            raise ShardCorruptError(f"{self.names[int(wrong_S.argmax())]}: {what}")

    @property
    def highest(self) -> int:
        """The highest number of a shard."""
        return max(map(number_of, self.names))

    @property
    def hashes(self) -> list[str]:
        """SHA-256 of the file of each index, in hexadecimal."""
        return [each.hex() for each in self.batch.column("index_sha256").to_pylist()]

    def column(self, name: str, first: int, last: int) -> Column[Any]:
        """The trace ids, prompt ids or token lengths of the shards at the places from ``first`` to ``last``."""
        make, whole, bounds = self._lists[name]
        return make(whole, int(bounds[first]), int(bounds[last + 1]))

    def indexes(self) -> list[ShardIndex]:
        """Makes the indexes, in the order of their names."""
        rest = [
            name for name in SCHEMA.names if name not in ("index_sha256", "trace_ids", "prompt_ids", "token_lengths")
        ]
        columns = {name: self.batch.column(name).to_pylist() for name in rest}
        columns["rows"] = self.counts_S.tolist()
        columns["sha256"] = [each.hex() for each in columns["sha256"]]
        columns["provenance"] = list(map(Provenance, self.names, columns["provenance"]))
        for name, (make, whole, bounds) in self._lists.items():
            columns[name] = [make(whole, start, stop) for start, stop in pairwise(bounds.tolist())]
        rows = zip(*columns.values(), strict=True)
        return [ShardIndex.from_json(dict(zip(columns, row, strict=True))) for row in rows]


def to_bytes(indexes: Sequence[ShardIndex], hashes: Sequence[str]) -> memoryview:
    """The Arrow file of these indexes, in the order of their names.

    Args:
        hashes: SHA-256 of the file of each index, in hexadecimal.
    """
    records = list(map(_record, indexes, hashes))
    columns = [pa.array([r[field.name] for r in records], field.type) for field in SCHEMA]
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
    return buffer.getbuffer()


def _record(index: ShardIndex, index_sha256: str) -> dict[str, Any]:
    fields = index.to_json()
    return fields | {
        "index_sha256": bytes.fromhex(index_sha256),
        "sha256": bytes.fromhex(fields["sha256"]),
        "trace_ids": list(map(bytes.fromhex, fields["trace_ids"])),
        "provenance": json.dumps(fields["provenance"], ensure_ascii=False),
    }


def from_bytes(data: pa.Buffer) -> Compacted:
    """Reads the file of a compacted index.

    Raises: ShardCorruptError, without naming the file; MemoryError.
    """
    return Compacted(arrow_file.read(data, accepts=lambda schema: schema.equals(SCHEMA))[0])
