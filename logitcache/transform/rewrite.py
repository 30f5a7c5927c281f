"""Writes selected traces of some shards as shards of another cache, in parallel; cuts their rows if asked to."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa

from logitcache import sparse_rows
from logitcache.cache import shard
from logitcache.cache.reader import Cache
from logitcache.cache.schema import SCHEMA
from logitcache.cache.shard import EncodedTrace, Shard, ShardIndex
from logitcache.cache.shard_files import ShardFiles
from logitcache.cache.writer import CacheWriter
from logitcache.errors import CacheError, InputError, LogitcacheError, ShardCorruptError
from logitcache.identity import Identity
from logitcache.runtime.files import publish
from logitcache.trace import Trace

Each = Callable[..., Iterator[Any]]  # like map, in parallel
_ROWS_A_PROCESS = 1 << 16  # they take about a second, as long as starting a process


@dataclass(frozen=True, slots=True)
class Cut:
    """Cuts the rows of a trace."""

    top_k: int
    top_p: float | None  # None: only top_k cuts
    min_k: int
    pinned: Sequence[int]
    ends: tuple[str, str] | None  # first and last span whose tokens keep their rows; None: all tokens do

    def __call__(self, trace: Trace) -> Trace:
        rows, first = trace.rows, trace.row_start
        if self.ends:
            start, stop = (trace.sections.span(name) for name in self.ends)
            kept = slice(*(min(max(token - first, 0), len(rows)) for token in (start.start, stop.stop)))
            rows, first = rows[kept], first + kept.start
            trace = replace(
                trace, row_start=first, token_logprob=trace.token_logprob[kept], token_rank=trace.token_rank[kept]
            )
        rows = sparse_rows.fold(rows, self.top_k, self.pinned)
        return replace(trace, rows=sparse_rows.trim(rows, top_p=self.top_p, min_k=self.min_k, pinned_ids=self.pinned))


@dataclass(frozen=True, slots=True)
class Piece:
    """Selected traces of a shard."""

    files: ShardFiles
    identity: Identity
    index: ShardIndex
    rows: list[int]
    correct: list[bool | None] | None = None  # new verdicts, one per trace of the shard

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.index.trace_count and self.correct is None

    def open(self) -> Shard:
        return shard.read(self.files, self.index, self.identity)

    def batch(self, opened: Shard) -> pa.RecordBatch:
        """All columns of the shard, with the new verdicts."""
        if self.correct is None:
            return opened.batch
        place = SCHEMA.get_field_index("correct")
        return opened.batch.set_column(place, SCHEMA.field(place), pa.array(self.correct, pa.bool_()))

    def traces(self, opened: Shard) -> Iterator[Trace]:
        """Decodes the selected traces one at a time."""
        for row in self.rows:
            trace = opened.trace(row)
            yield trace if self.correct is None else replace(trace, correct=self.correct[row])


@contextmanager
def processes(workers: int | None, shards: Sequence[ShardIndex]) -> Iterator[Each]:
    """Yields a ``map`` that runs in ``workers`` processes; None chooses by the number of cores and of rows.

    Raises: InputError; LogitcacheError if a process dies.
    """
    if workers is not None and workers < 1:
        raise InputError(f"`workers` {workers}: give at least 1")
    worth = 1 + sum(s.row_count for s in shards) // _ROWS_A_PROCESS
    workers = min(workers or min(os.cpu_count() or 1, worth), len(shards) or 1)
    if workers == 1:
        yield map
        return
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent) as pool:
            yield pool.map
    except BrokenProcessPool as e:
        raise LogitcacheError(
            "a worker process died: it may have run out of memory, or the calling script has no `if __name__ == "
            '"__main__"`; run again with fewer workers, or with 1'
        ) from e


def _end_with_parent() -> None:
    """A killed command leaves no process behind that continues to write."""
    if parent := parent_process():
        Thread(target=lambda: connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()


def write(
    writer: CacheWriter, pieces: Sequence[Piece], each: Each, cut: Cut | None = None, *, join: bool = True
) -> list[ShardIndex]:
    """Writes pieces as shards: first copies complete shards that are not cut byte for byte, then rewrites the others.

    Args:
        join: combine neighbouring pieces while they have no more traces than the largest source shard.
    Raises: ShardCorruptError naming the shard, WriteError.
    """
    whole = [piece for piece in pieces if piece.whole and cut is None]
    for piece, _ in zip(whole, each(_check, whole), strict=True):
        writer.copy_shard(piece.files, piece.index)
    rest = [piece for piece in pieces if not piece.whole or cut is not None]
    groups = _groups(rest) if join else [[piece] for piece in rest]
    make = partial(_rewrite, writer=writer, cut=cut)
    made = list(each(make, groups, range(writer.shards, writer.shards + len(groups))))
    writer.shards += len(made)
    writer.traces += sum(index.trace_count for index in made)
    return [piece.index for piece in whole] + made


def _check(piece: Piece) -> None:
    """Verifies a shard as ``verify`` does."""
    piece.open().check(piece.index)


def check_unused(caches: Sequence[Cache], pieces: Sequence[Piece], each: Each) -> None:
    """Verifies shards none of whose traces was selected: their indexes said so.

    Raises: ShardCorruptError naming the shard.
    """
    used = {(piece.files.location, piece.index.name) for piece in pieces}
    rest = [
        Piece(cache.files, cache.identity, index, [])
        for cache in caches
        for index in cache.shards
        if (cache.location, index.name) not in used
    ]
    for _ in each(_open, rest):
        pass


def _open(piece: Piece) -> None:
    piece.open()


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    most = max((piece.index.trace_count for piece in pieces), default=0)
    groups: list[list[Piece]] = []
    size = most
    for piece in pieces:
        if size + len(piece.rows) > most:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += len(piece.rows)
    return groups


def _rewrite(group: Sequence[Piece], number: int, *, writer: CacheWriter, cut: Cut | None) -> ShardIndex:
    """Writes all traces of a group as one shard, encoding one trace at a time."""
    piece, identity = group[0], writer.identity
    if cut is None and len(group) == 1 and 2 * len(piece.rows) >= piece.index.trace_count:
        return _copy(piece, number, writer.directory)
    encoded = [trace for piece in group for trace in _encoded(piece, cut, identity)]
    # Traces whose rows are not cut keep the provenance of their shard.
    provenance = piece.index.provenance if cut is None and len(group) == 1 else writer.provenance
    return shard.write(writer.directory, number, encoded, identity, provenance)


def _encoded(piece: Piece, cut: Cut | None, identity: Identity) -> Iterator[EncodedTrace]:
    opened = piece.open()
    for trace in piece.traces(opened):
        try:
            yield EncodedTrace.of(cut(trace) if cut else trace, identity)
        except CacheError as e:
            raise ShardCorruptError(f"{opened.place}: trace {trace.trace_id}: {e}") from e


def _copy(piece: Piece, number: int, directory: Path) -> ShardIndex:
    """Copies traces with the bytes of their blocks, and the frequency table of the shard."""
    opened = piece.open()
    batch = piece.batch(opened).take(pa.array(piece.rows, pa.int64()))
    records = batch.drop_columns(["token_logprob", "token_rank", "text", "metadata"]).to_pylist()
    encoded = [EncodedTrace.counted(*pair) for pair in zip(records, piece.traces(opened), strict=True)]
    data = shard.to_bytes(batch, opened.batch.schema.metadata or {})
    made = shard.index_of(number, data, encoded, piece.index.provenance)
    publish(directory / f"{made.name}.arrow", data)
    shard.publish_index(directory, made)
    return made
