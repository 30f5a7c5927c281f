"""A new cache made of traces that exist: built beside its place, moved there whole."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import logitcache
from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.cache.shard import EncodedTrace, ShardIndex
from logitcache.identity import Identity
from logitcache.runtime.files import publish, whole_directory
from logitcache.trace import Trace


class CacheWriter:
    """Takes traces, and whole shards of other caches; made by ``new_cache``."""

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
        """One trace more; every ``traces_per_shard`` of them become a shard."""
        self._waiting.append(EncodedTrace.of(trace, self.identity))
        if len(self._waiting) >= self.traces_per_shard:
            self.flush()

    def flush(self) -> None:
        """What was added becomes a shard, be it a small one."""
        if self._waiting:
            shard.write(self.directory, self.shards, self._waiting, self.identity, self.provenance)
            self._count(len(self._waiting))
            self._waiting = []

    def take(self, cache: Cache, index: ShardIndex) -> None:
        """A shard of ``cache`` as it stands, byte for byte, under the next number: linked where one disk holds both."""
        self.flush()
        name = f"unit-{self.shards:06d}"
        self.directory.mkdir(exist_ok=True)
        source, target = cache.path / shard.DIRECTORY / f"{index.name}.arrow", self.directory / f"{name}.arrow"
        try:
            os.link(source.resolve(), target)  # a link to a link would dangle
        except OSError:  # another file system, or one without links
            publish(target, source.read_bytes())
        shard.publish_index(self.directory, replace(index, name=name))
        self._count(index.trace_count)

    def _count(self, traces: int) -> None:
        self.shards += 1
        self.traces += traces


@contextlib.contextmanager
def new_cache(out: Path, identity: Identity, source: str, traces_per_shard: int = 64) -> Iterator[CacheWriter]:
    """A writer of the cache ``out``, which appears when the block ends without an error, and not before.

    Args:
        source: where the traces come from, for people; stands in each index.
    Raises: NotACacheError where ``out`` holds something already; CacheBusyError where another process makes it.
    """
    with whole_directory(out) as part:
        manifest.write(part, identity)
        writer = CacheWriter(part / shard.DIRECTORY, identity, source, traces_per_shard)
        yield writer
        writer.flush()
        writer.directory.mkdir(exist_ok=True)
