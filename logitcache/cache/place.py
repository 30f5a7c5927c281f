"""Where a cache is written while traces are captured: a directory, or an object store.

A shard is two objects that are created once and never replaced: the Arrow file first, then its index, which makes it part
of the cache.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from logitcache.cache import manifest, shard
from logitcache.cache.claim import claim
from logitcache.cache.reader import Cache
from logitcache.cache.repair import adopt, set_aside
from logitcache.cache.shard import ShardIndex
from logitcache.cache.workers import Worker
from logitcache.errors import ShardCorruptError
from logitcache.identity import Identity
from logitcache.runtime.files import LOGS, create, read_json, remove_parts
from logitcache.storage.location import Location, locate


@dataclass(frozen=True, slots=True)
class Existing:
    """What a cache has when a writer begins."""

    shards: list[ShardIndex] = field(default_factory=list)
    completed: int = 0  # traces of shards whose missing index was made
    set_aside: list[str] = field(default_factory=list)  # damaged shards without an index, where they are now
    ignored: list[str] = field(default_factory=list)  # shards without an index that stay where they are

    @property
    def highest(self) -> int:
        """The highest number of a shard, -1 for none."""
        return max((index.number for index in self.shards), default=-1)


class Place(Protocol):
    """A cache that is being written. Can be pickled."""

    @property
    def location(self) -> Location: ...

    @property
    def directory(self) -> Path:
        """On this machine, for logs."""
        ...

    def alone(self, worker: Worker) -> AbstractContextManager[None]:
        """Raises: CacheBusyError if this worker is running, or one of another count."""
        ...

    def claim(self, worker: Worker, identity: Identity) -> AbstractContextManager[None]:
        """During the block, workers that make traces of another identity are refused.

        Raises: IdentityError naming the first field that differs from the manifest or from what another worker makes.
        """
        ...

    def match(self, identity: Identity) -> bool:
        """Whether there is a manifest. Raises: as ``manifest.match``."""
        ...

    def create_manifest(self, identity: Identity) -> None:
        """Writes the manifest if there is none. Raises: IdentityError for a manifest of another identity."""
        ...

    def existing(self, identity: Identity, worker: Worker) -> Existing:
        """Reads the indexes, and makes those of this worker's whole shards that a kill left without one."""
        ...

    def create_data(self, name: str, data: memoryview) -> bool:
        """Writes the Arrow file of shard ``name``. False if there is another one."""
        ...

    def create_index(self, index: ShardIndex) -> None: ...

    def records(self) -> Iterable[dict[str, Any]]:
        """What earlier calls recorded of themselves."""
        ...

    def keep(self, log: Path) -> None:
        """Keeps a file of ``directory``'s logs with the cache."""
        ...


def place_of(out: str | Location) -> Place:
    """Raises: InputError for a URL that cannot be written."""
    location = locate(out)
    assert isinstance(location, Path)
    return Directory(location)


@dataclass(frozen=True, slots=True)
class Directory:
    """A cache in a directory, which several machines may share."""

    location: Path

    @property
    def directory(self) -> Path:
        return self.location

    def alone(self, worker: Worker) -> AbstractContextManager[None]:
        return worker.alone(self.location)

    @contextmanager
    def claim(self, worker: Worker, identity: Identity) -> Iterator[None]:
        with claim(self.location, worker, identity):
            yield

    def match(self, identity: Identity) -> bool:
        return manifest.match(self.location, identity) is not None

    def create_manifest(self, identity: Identity) -> None:
        manifest.create_or_match(self.location, identity)

    def existing(self, identity: Identity, worker: Worker) -> Existing:
        # No other process can be writing this worker's shards.
        def mine(name: str) -> bool:
            number = name.removeprefix("unit-").partition(".")[0]
            return number.isdecimal() and int(number) % worker.count == worker.index

        cache = self.location
        folder, shards = cache / shard.DIRECTORY, Cache.open(cache).shards
        remove_parts(folder, mine)
        adopted = adopt(cache, identity, (t for s in shards for t in s.trace_ids), mine)
        damaged = [set_aside(cache, folder / f"{name}.arrow") for name in filter(mine, shard.unindexed(folder))]
        return Existing([*shards, *adopted], sum(s.trace_count for s in adopted), list(map(str, damaged)))

    def create_data(self, name: str, data: memoryview) -> bool:
        return create(self.location / shard.DIRECTORY / f"{name}.arrow", data)

    def create_index(self, index: ShardIndex) -> None:
        shard.publish_index(self.location / shard.DIRECTORY, index)

    def records(self) -> Iterator[dict[str, Any]]:
        for path in (self.location / LOGS).glob("generate-*.json"):
            with suppress(ShardCorruptError):  # then what it says is found out again
                yield read_json(path)

    def keep(self, log: Path) -> None:
        pass
