"""Verifies a cache: checksums, structure, and that index, columns and rows agree (FORMAT.md)."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from logitcache.cache import checks, compact, manifest, processes, shard
from logitcache.cache.options import CachePath, Processes
from logitcache.cache.shard import Shard
from logitcache.cache.shard_files import LocalFiles, ShardFiles
from logitcache.errors import CacheError, FormatVersionError, LogitcacheError, UnreadableError, first_line
from logitcache.identity import Identity
from logitcache.runtime.options import Option
from logitcache.storage.location import Location, locate


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where."""

    shard: str
    trace_id: str | None
    what: str
    damaged: bool = True  # proven; False for what could not be read, and for what a newer version wrote

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.shard, self.trace_id and f"trace {self.trace_id}", self.what)))


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What verifying a cache found, and what a repair did."""

    cache: Location
    problems: list[Problem]
    moved: list[Location] = field(default_factory=list)  # damaged files, where they are now
    # A manifest from its second copy, indexes made from their shards.
    restored: list[Location] = field(default_factory=list)
    unindexed: list[str] = field(default_factory=list)  # shards without an index; readers ignore them

    def to_json(self) -> dict[str, Any]:
        """What ``logitcache verify --json`` prints."""
        return {
            "problems": [asdict(p) for p in self.problems],
            "moved": [str(path) for path in self.moved],
            "restored": [str(path) for path in self.restored],
            "unindexed": self.unindexed,
        }


def verify_cache(
    cache: CachePath,
    *,
    repair: Annotated[
        bool,
        Option("Restore what a second copy proves, and move other damaged shards aside, to be generated again."),
    ] = False,
    workers: Processes = None,
) -> VerifyReport:
    """Verifies a cache, and repairs it if asked to.

    Raises: as ``verify`` and ``repair.repair``.
    """
    location = locate(cache)
    if repair:
        from logitcache.cache.repair import repair as repair_cache  # which imports this module

        return repair_cache(location, workers)
    files = stored_files(location)
    return VerifyReport(location, examine(files, read_identity(files), workers).problems, unindexed=files.unindexed())


def verify(cache: str | Location, workers: int | None = None) -> list[Problem]:
    """Reads all of a cache and checks every shard and every trace.

    Checks all that FORMAT.md promises: checksums, columns, each index against its shard, spans, ids below the vocabulary
    size, rows that sum to 1 with their tail, the sampled token's log-probability and rank against its row, metadata, and
    trace ids that occur once. Reads shards in parallel. A process that dies is a problem of the shard that it read.

    Args:
        workers: processes; None: one per core. 1 reads in this process.
    Raises: NotACacheError, FormatVersionError, UnreadableError, and ShardCorruptError for a damaged manifest.
    """
    files = stored_files(locate(cache))
    return examine(files, read_identity(files), workers).problems


def stored_files(location: Location) -> ShardFiles:
    """The files of a cache as they are stored: no copy of a shard in a mirror stands for what the store has."""
    if isinstance(location, Path):
        return LocalFiles(location)
    from logitcache.cache.mirror import Streaming

    files = Streaming(location)
    files.refresh()
    return files


def read_identity(files: ShardFiles) -> Identity:
    """Raises: as ``manifest.read``."""
    with files.naming():
        return manifest.read(files.path)


@dataclass(frozen=True, slots=True)
class Findings:
    """What is wrong with a cache, and the shard of each trace."""

    problems: list[Problem]
    owners: dict[str, str]  # trace id -> shard; of a repeated trace the first that has no problem
    repeats: set[str]  # shards with traces that another shard has


def examine(files: ShardFiles, identity: Identity, workers: int | None) -> Findings:
    """Verifies all of a cache except its manifest."""
    indexes = sorted((files.path / shard.DIRECTORY).glob("unit-*.json"))
    verify_shard = partial(_verify_shard, files=files, identity=identity)
    workers = min(workers or os.cpu_count() or 1, len(indexes) or 1)
    results = (
        list(map(verify_shard, indexes)) if workers == 1 else processes.each(verify_shard, indexes, workers, _died)
    )
    problems = [*_backup_problems(files, identity), *_compact_problems(files)]
    problems += [problem for found, _ in results for problem in found]
    owners: dict[str, str] = {}
    repeats: set[str] = set()
    for path, (_, trace_ids) in sorted(zip(indexes, results, strict=True), key=lambda each: bool(each[1][0])):
        for trace_id in trace_ids:
            if (owner := owners.setdefault(trace_id, path.stem)) != path.stem:
                problems.append(Problem(path.stem, trace_id, f"is already in {owner}"))
                repeats.add(path.stem)
    return Findings(problems, owners, repeats)


def _backup_problems(files: ShardFiles, identity: Identity) -> list[Problem]:
    """The second copy of the manifest MAY be missing: older versions wrote none."""
    try:
        with files.naming():
            found = manifest.read_file(files.path / manifest.BACKUP)
    except FileNotFoundError:
        return []
    except CacheError as e:
        return [problem_of(manifest.BACKUP, None, e)]
    return [] if found == identity else [Problem(manifest.BACKUP, None, f"differs from {manifest.FILE_NAME}")]


def _compact_problems(files: ShardFiles) -> list[Problem]:
    """A compacted index says nothing that the indexes do not say."""
    found = [
        Problem(name, None, what) if isinstance(what, str) else problem_of(name, None, what)
        for name, what in compact.faults(files.path)
    ]
    return [replace(each, what=each.what.replace(str(files.path), str(files.location))) for each in found]


def _verify_shard(path: Path, files: ShardFiles, identity: Identity) -> tuple[list[Problem], list[str]]:
    """What is wrong with a shard, and the trace ids in it."""
    try:
        with files.naming():
            index = shard.read_index(path)
        opened = shard.read(files, index, identity, indexed=False)
        trace_ids = opened.batch.column("trace_id").to_pylist()
        faults = [*checks.index_faults(index, opened.batch), *shard.checksum_faults(opened)]
    except Exception as e:
        return [problem_of(path.stem, None, e)], []
    problems = [Problem(path.stem, None, fault) for fault in faults]
    found, tails = _verify_traces(path.stem, opened, trace_ids)
    if not found:
        found = [Problem(path.stem, None, f) for f in checks.tail_mass_faults(index.tail_mass, tails, index.row_count)]
    return problems + found, trace_ids


def _verify_traces(name: str, opened: Shard, trace_ids: Sequence[str]) -> tuple[list[Problem], float]:
    """What is wrong with the traces of a shard, and the mass of their tails."""
    problems: list[Problem] = []
    tails = 0.0
    for row, trace_id in enumerate(trace_ids):
        try:
            trace = opened.decoded(row)
            problems += [Problem(name, trace_id, fault) for fault in checks.trace_faults(trace, opened.identity)]
            tails += shard.tail_mass(trace)
        except Exception as e:  # whatever it is, it is the trace's
            problems.append(problem_of(name, trace_id, e))
    return problems, tails


def problem_of(name: str, trace_id: str | None, error: Exception) -> Problem:
    """The problem that an error shows; what the system or a newer version keeps from being read is no proof of damage."""
    proven = not isinstance(error, FormatVersionError | UnreadableError | MemoryError | OSError)
    return Problem(name, trace_id, str(error) if isinstance(error, LogitcacheError) else first_line(error), proven)


def _died(path: Path, how: str) -> tuple[list[Problem], list[str]]:
    return [Problem(path.stem, None, f"was not verified: the process that read it died ({how})", damaged=False)], []
