"""The indexes of a cache's shards: each in its own file, and most of them in a compacted index if there is one."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from logitcache.cache import compact, shard
from logitcache.cache.columns import id_bytes
from logitcache.cache.compact_file import Compacted
from logitcache.cache.shard import ShardIndex
from logitcache.errors import ShardCorruptError


class Indexes(Sequence[ShardIndex]):
    """The indexes of a cache, in the order of their names. Those of a compacted index are made when one is first asked for."""

    def __init__(self, rows: Sequence[ShardIndex | int], compacted: Compacted | None = None) -> None:
        """
        Args:
            rows: an index, or its place in ``compacted``, for each shard.
        """
        self._rows, self._compacted = rows, compacted

    @cached_property
    def _made(self) -> list[ShardIndex]:
        covered = self._compacted.indexes() if self._compacted else []
        return [covered[row] if isinstance(row, int) else row for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> ShardIndex: ...

    @overload
    def __getitem__(self, i: slice) -> list[ShardIndex]: ...

    def __getitem__(self, i: int | slice) -> ShardIndex | list[ShardIndex]:
        return self._made[i]

    def __eq__(self, other: object) -> bool:
        return self._made == list(other) if isinstance(other, list | Indexes) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": self._rows, "_compacted": self._compacted}

    @property
    def trace_counts(self) -> list[int]:
        """Traces of each shard."""
        counts = self._compacted.counts_S.tolist() if self._compacted else []
        return [counts[row] if isinstance(row, int) else row.trace_count for row in self._rows]

    @property
    def id_bytes(self) -> np.ndarray:
        """The ids of all traces, uint8 [N, 16]."""
        return id_bytes(self.column("trace_ids"))

    def column(self, name: str) -> Iterator[Sequence[Any]]:
        """The trace ids, prompt ids or token lengths of all shards, in order, in parts of any length."""
        start, rows = 0, self._rows
        while start < len(rows):
            row, stop = rows[start], start + 1
            if isinstance(row, int):
                while stop < len(rows) and rows[stop] == row + stop - start:
                    stop += 1
                assert self._compacted is not None
                yield self._compacted.column(name, row, row + stop - start - 1)
            else:
                yield getattr(row, name)
            start = stop


def read_indexes(directory: Path, mirrored: str | None = None) -> Indexes:
    """Reads the indexes in CACHE/shards, in the order of their names.

    Args:
        mirrored: the compacted index whose shards all exist, although their own indexes are not in ``directory``.
    Raises: ShardCorruptError, FormatVersionError, UnreadableError.
    """
    # Before the names: a repair removes it before it removes an index.
    compacted = _mirrored(directory.parent, mirrored) if mirrored else compact.read(directory.parent)
    places = {name: i for i, name in enumerate(compacted.names)} if compacted else {}
    names = shard.indexed(directory)
    if mirrored:
        names = sorted({*names, *places})
    return Indexes(
        [
            place if (place := places.get(name)) is not None else shard.read_index(directory / f"{name}.json")
            for name in names
        ],
        compacted,
    )


def _mirrored(cache: Path, name: str) -> Compacted:
    """Without its compacted index a mirror would seem to be a smaller cache."""
    try:
        return compact.read_one(cache, name)
    except FileNotFoundError:
        raise ShardCorruptError(f"{cache}: another process has removed {name} from the mirror; run again") from None
