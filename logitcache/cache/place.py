"""Where a cache is written while traces are captured: a directory, or an object store.

A shard is two objects that are created once and never replaced: the Arrow file first, then its index, which makes it part
of the cache.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from logitcache.cache import compact, manifest, shard
from logitcache.cache.claim import claim
from logitcache.cache.mirror import Mirror
from logitcache.cache.reader import Cache
from logitcache.cache.repair import adopt, set_aside
from logitcache.cache.shard import ShardIndex
from logitcache.cache.workers import Worker
from logitcache.errors import NotACacheError, ShardCorruptError, WriteError
from logitcache.identity import Identity
from logitcache.runtime.console import say
from logitcache.runtime.files import LOGS, create, parse_json, read_json, remove_parts
from logitcache.storage.lease import FOLDER as LOCKS
from logitcache.storage.lease import refuse_overwriting
from logitcache.storage.location import Location, Url, locate
from logitcache.storage.store import Store


@dataclass(frozen=True, slots=True)
class Existing:
    """What a cache has when a writer begins."""

    shards: list[ShardIndex] = field(default_factory=list)
    completed: int = 0  # traces of shards whose missing index was made
    set_aside: list[str] = field(default_factory=list)  # damaged shards without an index, where they are now
    ignored: list[str] = field(default_factory=list)  # shards without an index that stay where they are
    highest: int = -1  # number of a shard, whether it is part of the cache or not


class Place(Protocol):
    """A cache that is being written. Can be pickled."""

    @property
    def location(self) -> Location: ...

    @property
    def directory(self) -> Path:
        """On this machine, for logs."""
        ...

    def alone(self, worker: Worker, writers: int) -> AbstractContextManager[Callable[[], None]]:
        """Locks the cache for a worker during the block. Yields a function that raises CacheBusyError once the lock was lost.

        Args:
            writers: processes that write shards.
        Raises: CacheBusyError if this worker is running, or one of another count.
        """
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
    return Directory(location) if isinstance(location, Path) else Bucket(Mirror(location))


@dataclass(frozen=True, slots=True)
class Directory:
    """A cache in a directory, which several machines may share."""

    location: Path

    @property
    def directory(self) -> Path:
        return self.location

    @contextmanager
    def alone(self, worker: Worker, writers: int) -> Iterator[Callable[[], None]]:
        with worker.alone(self.location):
            yield lambda: None

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
        shards = [*shards, *adopted]
        highest = max(compact.highest(cache), *(s.number for s in shards), -1)
        return Existing(shards, sum(s.trace_count for s in adopted), list(map(str, damaged)), highest=highest)

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


@dataclass(frozen=True, slots=True)
class Bucket:
    """A cache in an object store."""

    mirror: Mirror

    @property
    def location(self) -> Url:
        return self.mirror.location

    @property
    def store(self) -> Store:
        return self.mirror.store

    @property
    def directory(self) -> Path:
        return self.mirror.path.with_name(f"{self.mirror.path.name}-writing")

    @contextmanager
    def alone(self, worker: Worker, writers: int) -> Iterator[Callable[[], None]]:
        refuse_overwriting(self.store, writers, lambda line: say(line, sys.stderr))
        with worker.alone_in(self.store) as held:
            yield held.check

    def claim(self, worker: Worker, identity: Identity) -> AbstractContextManager[None]:
        return nullcontext()  # who comes second finds the other's manifest before the first shard

    def match(self, identity: Identity) -> bool:
        try:
            found = self._manifest()
        except FileNotFoundError:
            names = [entry.name for entry in self.store.list("")]
            if foreign := [name for name in names if not name.startswith((f"{LOGS}/", f"{LOCKS}/"))]:
                raise NotACacheError(
                    f"{self.location} has objects, such as {foreign[0]}, and no {manifest.FILE_NAME}; give `out` an empty place, "
                    f"or restore it with `logitcache verify --repair {self.location}`"
                ) from None
            return False
        manifest.refuse_difference(str(self.location), found, identity)
        return True

    def _manifest(self) -> Identity:
        """Raises: FileNotFoundError if there is none; as ``manifest.read``."""
        data = self.store.get(manifest.FILE_NAME)
        return manifest.parse(data, f"{self.location}/{manifest.FILE_NAME}")

    def create_manifest(self, identity: Identity) -> None:
        with suppress(FileNotFoundError):
            manifest.refuse_difference(str(self.location), self._manifest(), identity)
            return
        data = manifest.content(identity)
        if self.store.create(manifest.FILE_NAME, data):
            self.store.create(manifest.BACKUP, data)
        else:
            manifest.refuse_difference(str(self.location), self._manifest(), identity)

    def existing(self, identity: Identity, worker: Worker) -> Existing:
        cache = Cache.open(self.location)
        unindexed = self.mirror.unindexed()
        numbers = [shard.number_of(name) for name in unindexed] + [index.number for index in cache.shards]
        mine = [name for name in unindexed if shard.number_of(name) % worker.count == worker.index]
        return Existing(list(cache.shards), ignored=mine, highest=max(compact.highest(cache.path), *numbers, -1))

    def create_data(self, name: str, data: memoryview) -> bool:
        return self.store.create(f"{shard.DIRECTORY}/{name}.arrow", data)

    def create_index(self, index: ShardIndex) -> None:
        name = f"{shard.DIRECTORY}/{index.name}.json"
        if not self.store.create(name, shard.index_bytes(index)):
            raise WriteError(
                f"{self.location}/{name}: another process made it meanwhile; make sure that it has ended, then run the same "
                "command to resume"
            )

    def records(self) -> Iterator[dict[str, Any]]:
        found = [e.name for e in self.store.list(LOGS) if fnmatchcase(e.name, f"{LOGS}/generate-*.json")]
        for name, data in self.store.get_each(found):
            with suppress(ShardCorruptError):
                yield parse_json(data, f"{self.location}/{name}")

    def keep(self, log: Path) -> None:
        self.store.create(f"{LOGS}/{log.name}", log.read_bytes())
