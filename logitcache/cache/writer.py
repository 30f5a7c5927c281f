"""Writes a new cache from existing traces, atomically."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import logitcache
from logitcache.cache import manifest, shard
from logitcache.cache.shard import EncodedTrace, ShardIndex
from logitcache.cache.shard_files import ShardFiles, place
from logitcache.identity import Identity
from logitcache.runtime.files import atomic_directory
from logitcache.storage.location import Location, locate
from logitcache.trace import Trace


class CacheWriter:
    """Adds traces, and whole shards of other caches, to a new cache. ``new_cache`` makes one."""

    def __init__(self, directory: Path, identity: Identity, source: str, traces_per_shard: int) -> None:
        self.directory, self.identity, self.traces_per_shard = directory, identity, traces_per_shard
        self.provenance: dict[str, Any] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "logitcache": logitcache.__version__,
            "source": source,
        }
        self.shards = self.traces = 0
        self._waiting: list[EncodedTrace] = []

    def add(self, trace: Trace) -> None:
        """Adds a trace; every ``traces_per_shard`` traces become a shard."""
        self._waiting.append(EncodedTrace.of(trace, self.identity))
        if len(self._waiting) >= self.traces_per_shard:
            self.flush()

    def flush(self) -> None:
        """Writes the traces added since the last shard as a shard."""
        if self._waiting:
            shard.write(self.directory, self.shards, self._waiting, self.identity, self.provenance)
            self._count(len(self._waiting))
            self._waiting = []

    def copy_shard(self, files: ShardFiles, index: ShardIndex) -> None:
        """Adds a shard of another cache byte for byte, under the next number; a hard link if both are on one file system."""
        self.flush()
        name = f"unit-{self.shards:06d}"
        self.directory.mkdir(exist_ok=True)
        with files.open(index) as file:
            place(file, self.directory / f"{name}.arrow")
        shard.publish_index(self.directory, replace(index, name=name))
        self._count(index.trace_count)

    def _count(self, traces: int) -> None:
        self.shards += 1
        self.traces += traces


@contextlib.contextmanager
def new_cache(
    out: str | Location, identity: Identity, source: str, traces_per_shard: int = 64
) -> Iterator[CacheWriter]:
    """A writer of the new cache ``out``, which is written atomically when the block ends without an error: at a URL, its
    manifest is uploaded last.

    Args:
        source: where the traces come from, in words, for the provenance in each index.
    Raises: NotACacheError if ``out`` is not an empty directory, or a URL with nothing behind it; CacheBusyError if another
        process is writing it; WriteError.
    """
    with _new(locate(out)) as part:
        manifest.write(part, identity)
        writer = CacheWriter(part / shard.DIRECTORY, identity, source, traces_per_shard)
        yield writer
        writer.flush()
        writer.directory.mkdir(exist_ok=True)


def _new(location: Location) -> contextlib.AbstractContextManager[Path]:
    if isinstance(location, Path):
        return atomic_directory(location)
    from logitcache.cache.upload import new_objects

    return new_objects(location)
