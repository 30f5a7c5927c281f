"""Repairs a cache: restores what a second copy proves, and moves what is proven damaged to CACHE/set-aside.

What an error of the system kept from being read, and what a newer version wrote, stays where it is. Nothing is deleted.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, cast

import logitcache
from logitcache.cache import compact, manifest, shard
from logitcache.cache.shard import ShardIndex
from logitcache.cache.shard_files import LocalFiles, ShardFiles
from logitcache.cache.validate import COMPACTED, FREE, reading
from logitcache.cache.verify import Problem, VerifyReport, examine, problem_of
from logitcache.cache.workers import Worker
from logitcache.errors import (
    FormatVersionError,
    NotACacheError,
    ShardCorruptError,
    UnreadableError,
    WriteError,
)
from logitcache.identity import Identity
from logitcache.runtime.files import MAX_JSON, publish, read_json
from logitcache.runtime.regular_files import open_regular
from logitcache.storage.location import Location, Url

SET_ASIDE = "set-aside"
_NOT_DAMAGE = (UnreadableError, FormatVersionError)
_CHECKSUM = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')


def repair(location: Location, workers: int | None = None) -> VerifyReport:
    """Verifies a cache and repairs what it can.

    A damaged manifest is restored from its second copy. A missing or damaged index of a whole shard is made again from the
    shard. Other damaged shards are moved to CACHE/set-aside, so that their traces can be generated again.

    Raises: CacheBusyError while another process writes to the cache; WriteError; ShardCorruptError for a damaged manifest
        without a second copy; as ``verify``.
    """
    if isinstance(location, Url):
        from logitcache.cache.repair_stored import repair_stored  # which imports this module

        return repair_stored(location, workers)
    cache = location
    if not any((cache / name).exists() for name in (manifest.FILE_NAME, manifest.BACKUP)):
        manifest.read(cache)  # says what is missing; a lock would make the directory
    with Worker().alone(cache):
        return repaired(LocalFiles(cache), lambda _: None, workers)


def repaired(files: ShardFiles, bring: Callable[[Iterable[str]], None], workers: int | None) -> VerifyReport:
    """Repairs the files in ``files.path``, which no other process writes.

    Args:
        bring: puts the Arrow files of these shards there, as they are.
    Raises: as ``repair``.
    """
    cache = files.path
    repairs = _Repairs(cache)
    repairs.restore_manifest()
    identity = manifest.read(cache)
    found = examine(files, identity, workers)
    repairs.problems += found.problems
    repairs.restore_backup(found.problems)
    directory = cache / shard.DIRECTORY
    owners = found.owners
    damaged = {p.shard for p in found.problems if p.damaged and p.shard != manifest.BACKUP}
    if damaged:  # before an index changes; it is only a copy
        repairs.moved += set_compacted_aside(cache)
    shards = sorted(name for name in damaged if not COMPACTED.holds(name))
    bring(shards)
    for name in shards:
        others = {t for t, owner in owners.items() if owner != name}
        try:
            index = None if name in found.repeats else _remade(directory, name, identity, others)
        except _NOT_DAMAGE as e:  # a damaged index, and a shard of which nothing is proven
            repairs.problems.append(problem_of(name, None, e))
            continue
        owners = {t: owner for t, owner in owners.items() if owner != name}
        # The index first: a shard without an index is ignored, even if this is interrupted.
        repairs.set_aside(directory / f"{name}.json")
        if index is None:
            repairs.set_aside(directory / f"{name}.arrow")
            continue
        shard.publish_index(directory, index)
        repairs.restored.append(directory / f"{name}.json")
        owners |= dict.fromkeys(index.trace_ids, name)
    for name in shard.unindexed(directory):
        try:
            index = _adopt(directory, name, identity, set(owners))
        except _NOT_DAMAGE as e:
            repairs.problems.append(problem_of(name, None, e))
            continue
        if index is not None:
            repairs.restored.append(directory / f"{name}.json")
            owners |= dict.fromkeys(index.trace_ids, name)
    unindexed = shard.unindexed(directory)
    return VerifyReport(cache, repairs.problems, repairs.moved, repairs.restored, unindexed)


def adopt(cache: Path, identity: Identity, present: Iterable[str], mine: Callable[[str], bool]) -> list[ShardIndex]:
    """Makes the missing indexes of whole shards, which a kill or a full disk between shard and index left.

    Args:
        present: ids of traces that the cache has; a shard with one of them stays without an index.
        mine: which shards to take, by name.
    Returns: the new indexes.
    Raises: UnreadableError, FormatVersionError.
    """
    directory, adopted, known = cache / shard.DIRECTORY, [], set(present)
    for name in filter(mine, shard.unindexed(directory)):
        if (index := _adopt(directory, name, identity, known)) is not None:
            adopted.append(index)
            known.update(index.trace_ids)
    return adopted


def _adopt(directory: Path, name: str, identity: Identity, others: set[str]) -> ShardIndex | None:
    """Makes and publishes the index of a shard as ``_remade`` does."""
    if (index := _remade(directory, name, identity, others)) is not None:
        if index.number <= compact.highest(directory.parent):  # readers of an object store look above it only
            set_compacted_aside(directory.parent)
        shard.publish_index(directory, index)
    return index


class _Repairs:
    """What a repair did to the files of a cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.problems: list[Problem] = []
        self.moved: list[Location] = []
        self.restored: list[Location] = []

    def set_aside(self, path: Path) -> None:
        if path.exists():
            self.moved.append(set_aside(self.cache, path))

    def restore_manifest(self) -> None:
        """Raises: NotACacheError or ShardCorruptError if neither copy is valid; UnreadableError, FormatVersionError."""
        path, backup = self.cache / manifest.FILE_NAME, self.cache / manifest.BACKUP
        try:
            manifest.read(self.cache)
            return
        except (NotACacheError, ShardCorruptError) as e:
            what, error = "damaged" if path.exists() else "missing", e
        try:
            manifest.read_file(backup)
        except FileNotFoundError:
            raise type(error)(
                f"{path} is {what}, and there is no {manifest.BACKUP}: older versions wrote none; copy {path.name} from "
                "another copy of this cache"
            ) from None
        except ShardCorruptError as e:
            raise ShardCorruptError(f"{path} is {what}, and so is its second copy: {e}") from None
        self.problems.append(Problem(manifest.FILE_NAME, None, what))
        self.set_aside(path)
        self._copy(backup, path)

    def restore_backup(self, problems: list[Problem]) -> None:
        """Writes the second copy of a valid manifest if it is missing or damaged."""
        path = self.cache / manifest.BACKUP
        if any(p.shard == manifest.BACKUP and p.damaged for p in problems):
            self.set_aside(path)
        if not path.exists():
            self._copy(self.cache / manifest.FILE_NAME, path)

    def _copy(self, source: Path, target: Path) -> None:
        with reading(source), open_regular(source) as file:
            publish(target, file.read())
        self.restored.append(target)


def set_aside(cache: Path, path: Path) -> Path:
    """Moves a file to CACHE/set-aside, under its name or the first ``NAME.N`` that is free; returns where it is.

    Raises: WriteError.
    """
    place = cache / SET_ASIDE / path.name
    try:
        place.parent.mkdir(exist_ok=True)
        if place.parent.is_symlink():
            raise NotADirectoryError(None, "set-aside is a link")
        names = (place.with_name(f"{place.stem}.{i}{place.suffix}") for i in count(2))
        while place.exists() or place.is_symlink():
            place = next(names)
        return path.rename(place)
    except OSError as e:
        raise WriteError(
            f"{path}: cannot be moved to {place.parent} ({e.strerror}); fix the cause and run again"
        ) from e


def set_compacted_aside(cache: Path) -> list[Path]:
    """Moves all compacted indexes to CACHE/set-aside. Returns: where they are. Raises: WriteError, UnreadableError."""
    return [set_aside(cache, path) for path in compact.files(cache)]


def _remade(directory: Path, name: str, identity: Identity, others: set[str]) -> ShardIndex | None:
    """The index of a whole shard, made from it; None if the shard is not whole or has a trace of ``others``.

    A shard is whole if all its traces are valid, and if they match the checksum in the shard or, in a shard of older
    versions, the checksum that can still be read in its damaged index.

    Raises: UnreadableError, FormatVersionError.
    """
    listed, provenance = _legible(directory / f"{name}.json")
    with suppress(ShardCorruptError):
        index, proven = shard.read_alone(directory, name, identity, provenance)
        if (proven or not listed or index.sha256 in listed) and others.isdisjoint(index.trace_ids):
            return index
    return None


def _legible(path: Path) -> tuple[set[str], dict[str, Any]]:
    """Checksums of the shard and the provenance, as far as they can be read in an index that may be damaged."""
    provenance: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "logitcache": logitcache.__version__,
        "source": "index made again from its shard",
    }
    try:
        with reading(path), open_regular(path) as file:
            data = file.read(MAX_JSON)
        with suppress(ShardCorruptError), reading(path):
            if FREE.holds(found := read_json(path).get("provenance")):
                provenance = cast("dict[str, Any]", found)
    except FileNotFoundError:
        return set(), provenance
    return {digest.decode() for digest in _CHECKSUM.findall(data)}, provenance
