"""Verifies a cache on disk: checksums, columns, counts, ids and probabilities."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from logitcache.cache import manifest, shard
from logitcache.cache.options import CachePath, Processes
from logitcache.cache.workers import Worker
from logitcache.errors import LogitcacheError
from logitcache.identity import Identity
from logitcache.runtime.options import Option
from logitcache.trace import Trace

SET_ASIDE = "set-aside"
_MASS_SLACK = 1e-4  # of a row's kept mass and tail together


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    shard: str
    trace_id: str | None
    what: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.shard, self.trace_id and f"trace {self.trace_id}", self.what)))


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verifying a cache found, and which files a repair moved."""

    cache: Path
    problems: list[Problem]
    moved: list[Path]

    def to_json(self) -> dict[str, Any]:
        """What ``logitcache verify --json`` prints."""
        return {"problems": [asdict(p) for p in self.problems], "moved": [str(path) for path in self.moved]}


def verify_cache(
    cache: CachePath,
    *,
    repair: Annotated[bool, Option("Move damaged shards aside, so that their traces can be generated again.")] = False,
    workers: Processes = None,
) -> VerifyReport:
    """Verifies a cache, and moves damaged shards to CACHE/set-aside if asked to.

    Raises: as ``verify`` and ``set_aside_damage``.
    """
    cache = Path(cache)  # callers may pass text
    if repair:
        return set_aside_damage(cache, workers)
    return VerifyReport(cache, verify(cache, workers), [])


def verify(cache: Path, workers: int | None = None) -> list[Problem]:
    """Reads all of a cache and checks every shard and every trace.

    Checks checksums, columns, counts, spans, ids below the vocabulary size, rows that sum to 1 with their tail, and trace
    ids that occur once. Reads shards in parallel.

    Args:
        workers: processes; None: one per core.
    Raises: NotACacheError, FormatVersionError, and ShardCorruptError for a damaged manifest.
    """
    identity = manifest.read(cache)
    indexes = sorted((cache / shard.DIRECTORY).glob("unit-*.json"))
    check = partial(_verify_shard, identity=identity)
    workers = min(workers or os.cpu_count() or 1, len(indexes) or 1)
    if workers == 1:
        results = list(map(check, indexes))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            results = list(pool.map(check, indexes))
    problems = list(chain.from_iterable(found for found, _ in results))
    owners: dict[str, str] = {}  # trace id -> the first shard that holds it
    for path, (_, trace_ids) in zip(indexes, results, strict=True):
        for t in trace_ids:
            if t in owners:
                problems.append(Problem(path.stem, t, f"is already in {owners[t]}"))
            owners.setdefault(t, path.stem)
    return problems


def set_aside_damage(cache: Path, workers: int | None = None) -> VerifyReport:
    """Verifies a cache and moves shards with problems to CACHE/set-aside, so that their traces can be generated again.

    Raises: CacheBusyError while another process writes to the cache; as ``verify``.
    """
    with Worker().alone(cache):
        problems, moved = verify(cache, workers), []
        for name in sorted({problem.shard for problem in problems}):
            # The index first: a shard without an index is ignored, even if this is interrupted.
            for suffix in (".json", ".arrow"):
                path = cache / shard.DIRECTORY / f"{name}{suffix}"
                if path.exists():
                    moved.append(path.rename(_free(cache / SET_ASIDE / path.name)))
    return VerifyReport(cache, problems, moved)


def _free(path: Path) -> Path:
    """``path``, or the first ``NAME.N`` that is free."""
    path.parent.mkdir(exist_ok=True)
    names = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


def _verify_shard(path: Path, identity: Identity) -> tuple[list[Problem], list[str]]:
    """What is wrong with a shard, and the trace ids in it."""
    try:
        index = shard.read_index(path)
        opened = shard.read(path.parent, index)
    except LogitcacheError as e:
        return [Problem(path.stem, None, str(e))], []
    except Exception as e:  # Arrow's errors, for bytes that match their checksum but are not valid
        return [Problem(path.stem, None, f"cannot be read: {e}")], []
    columns = {name: opened.batch.column(name).to_pylist() for name in ("trace_id", "prompt_id")}
    problems = [
        Problem(index.name, None, f"its index lists other {name}s than the shard")
        for name, listed in (("trace_id", index.trace_ids), ("prompt_id", index.prompt_ids))
        if listed != columns[name]
    ]
    if len(index.token_lengths) != index.trace_count or index.trace_count != opened.batch.num_rows:
        problems.append(
            Problem(index.name, None, f"{opened.batch.num_rows} traces, the index says {index.trace_count}")
        )
        return problems, columns["trace_id"]
    for row, trace_id in enumerate(columns["trace_id"]):
        try:
            faults = list(_faults(opened.trace(row), index.token_lengths[row], identity))
        except (LogitcacheError, ValueError) as e:
            faults = [str(e.__cause__ or e)]  # the cause: Problem names shard and trace already
        problems += [Problem(index.name, trace_id, what) for what in faults]
    return problems, columns["trace_id"]


def _faults(trace: Trace, length: int, identity: Identity) -> Iterator[str]:
    """What is wrong with a trace."""
    rows, tokens = trace.rows, trace.token_ids
    if len(tokens) != length:
        yield f"column token_ids: {len(tokens)} tokens, the index says {length}"
    end = trace.row_start + len(rows)
    if end > len(tokens) or (end < len(tokens) and not identity.derived):  # a slice may have cut the last rows
        yield f"column topk: {len(rows)} rows from token {trace.row_start} on do not end at token {len(tokens)}"
    for name in ("token_logprob", "token_rank"):
        if len(getattr(trace, name)) != len(rows):
            yield f"column {name}: {len(getattr(trace, name))} values for {len(rows)} rows"
    for name, ids in (("token_ids", tokens), ("topk", rows.ids)):
        if len(ids) and not 0 <= ids.min() <= ids.max() < identity.vocab_size:
            yield f"column {name}: ids from {ids.min()} to {ids.max()}, the vocabulary size is {identity.vocab_size}"
    if len(rows):
        if rows.counts.max() > (kept := identity.top_k + len(identity.pin_tokens)):
            yield f"column topk: a row of {rows.counts.max()} ids, the cache stores at most {kept}"
        for pin in identity.pin_tokens:
            if (held := np.count_nonzero(rows.ids == pin)) != len(rows):
                yield f"column topk: pinned id {pin} is in {held} of {len(rows)} rows, expected all"
        key_N = (np.repeat(np.arange(len(rows)), rows.counts) << 32) + rows.ids
        K = rows.counts[0] if (rows.counts == rows.counts[0]).all() else len(key_N)
        key_N = np.sort(key_N.reshape(-1, K)).ravel()  # rows of equal length are sorted separately: six times as fast
        if len(repeats := np.flatnonzero(key_N[1:] == key_N[:-1])):
            row, repeated = divmod(int(key_N[repeats[0]]), 1 << 32)
            yield f"column topk: row {row} contains id {repeated} twice"
        mass = np.add.reduceat(np.exp(rows.logprobs.astype(np.float64)), rows.offsets[:-1]) + np.exp(rows.log_tail)
        worst = int(np.abs(mass - 1).argmax())
        if not abs(mass[worst] - 1) <= _MASS_SLACK:
            yield f"column topk: row {worst} and its tail sum to {mass[worst]:.6f}"
