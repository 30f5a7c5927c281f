"""Opens a cache on disk: indexes, random access to traces, columns."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from logitcache.cache import manifest, schema, shard
from logitcache.cache.columns import has_repeats
from logitcache.cache.indexes import Indexes, read_indexes
from logitcache.cache.info import CacheInfo
from logitcache.cache.options import CachePath
from logitcache.cache.shard import Shard, ShardIndex
from logitcache.cache.shard_files import LocalFiles, ShardFiles
from logitcache.errors import ShardCorruptError, WriteError
from logitcache.identity import Identity
from logitcache.sections import Sections
from logitcache.storage.location import Location, locate
from logitcache.trace import Trace

if TYPE_CHECKING:
    from logitcache.cache.mirror import Mirror

_MAPPED = 256  # shards mapped at once


class Cache:
    """Traces in shard order, read-only; can be pickled into worker processes.

    A shard's checksum and structure are verified when this process first reads it, a trace when it first decodes it: both
    raise ShardCorruptError for what ``verify`` would report.
    """

    def __init__(self, files: ShardFiles, identity: Identity, shards: Sequence[ShardIndex]) -> None:
        self.files, self.identity = files, identity
        self.shards = shards if isinstance(shards, Indexes) else Indexes(shards)
        self._starts = np.cumsum([0, *self.shards.trace_counts])
        self._mapped: OrderedDict[int, Shard] = OrderedDict()
        self._valid: dict[int, bytearray] = {}  # of shards that were checked: `Shard.valid`

    @classmethod
    def open(cls, location: str | Location) -> "Cache":
        """Opens the cache in a directory, or the one at a URL such as s3://bucket/cache through a mirror on this disk.

        Reads only its manifest and indexes.

        Raises: NotACacheError, FormatVersionError, ShardCorruptError, UnreadableError; for a URL also InputError for what the
            user can correct, and WriteError where the mirror cannot be written.
        """
        place = locate(location)
        if isinstance(place, Path):
            return cls._read(LocalFiles(place))
        from logitcache.cache.mirror import Mirror

        mirror = Mirror(place)
        mirror.refresh()
        try:
            return cls._read(mirror)
        except ShardCorruptError:
            if not mirror.renew_indexes():
                raise
        return cls._read(mirror)

    @classmethod
    def _read(cls, files: ShardFiles) -> "Cache":
        with files.naming():
            identity = manifest.read(files.path)
            shards = read_indexes(files.path / shard.DIRECTORY, files.compacted)
        _refuse_repeats(files.location, shards)
        return cls(files, identity, shards)

    @property
    def location(self) -> Location:
        """The directory or the URL of the cache."""
        return self.files.location

    @property
    def path(self) -> Path:
        """The directory of the manifest and the indexes; for a URL, the mirror's."""
        return self.files.path

    @property
    def mirror(self) -> "Mirror | None":
        """The mirror of a cache in an object store."""
        from logitcache.cache.mirror import Mirror

        return self.files if isinstance(self.files, Mirror) else None

    def __len__(self) -> int:
        """Number of traces."""
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Trace:
        """Decodes trace ``i``, and no other.

        Raises: IndexError, ShardCorruptError.
        """
        number, row = self._place(i)
        return self.shard(number).trace(row)

    def _place(self, i: int) -> tuple[int, int]:
        """The shard that holds trace ``i``, and its row there."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"trace {i} of a cache of {len(self)}")
        i %= len(self)
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return number, i - int(self._starts[number])

    def tokens(self, i: int) -> tuple[np.ndarray, Sections]:
        """Token ids, int32 [L], and sections of trace ``i``, without decoding its rows."""
        number, row = self._place(i)
        return self.shard(number).tokens(row)

    def __iter__(self) -> Iterator[Trace]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [len(self)], tokens of each trace, prompt included."""
        return np.concatenate(
            [np.zeros(0, np.int32), *(np.array(part, np.int32) for part in self.shards.column("token_lengths"))]
        )

    @cached_property
    def shard_numbers(self) -> np.ndarray:
        """int64 [len(self)], the place in ``shards`` of the shard that holds each trace."""
        return np.repeat(np.arange(len(self.shards)), np.diff(self._starts))

    @cached_property
    def trace_ids(self) -> list[str]:
        return [t for part in self.shards.column("trace_ids") for t in part]

    @cached_property
    def prompt_ids(self) -> list[str]:
        return [p for part in self.shards.column("prompt_ids") for p in part]

    @cached_property
    def traces_digest(self) -> str:
        """Hash of the set of traces, whatever their order and shards."""
        return hashlib.blake2b("\n".join(sorted(self.trace_ids)).encode(), digest_size=16).hexdigest()

    def column(self, name: str) -> pa.ChunkedArray:
        """A plain column of all traces, in order, without decoding rows. Null where a shard lacks an optional column."""
        kind = schema.ALL.field(name).type
        batches = [self.shard(i).batch for i in range(len(self.shards))]
        columns = [b.column(name) if name in b.schema.names else pa.nulls(b.num_rows, kind) for b in batches]
        return pa.chunked_array(columns, type=kind)

    def shard(self, number: int) -> Shard:
        """Shard ``number`` of ``shards``, mapped into memory; its checksum is verified the first time.

        A mapped shard takes 0.3 MB with its frequency table; at most 256 stay mapped. Of a cache in an object store the shard
        is downloaded, if the mirror does not have it.
        """
        if number not in self._mapped:
            self._mapped[number] = self._read_shard(number)
            self._valid[number] = self._mapped[number].valid
            while len(self._mapped) > 1 and not self._may_map():
                self._mapped.popitem(last=False)
        self._mapped.move_to_end(number)
        return self._mapped[number]

    def _read_shard(self, number: int) -> Shard:
        wanted = (self.files, self.shards[number], self.identity, self._valid.get(number))
        try:
            return shard.read(*wanted)
        except (
            WriteError
        ):  # the mirror's disk is full, and shards that it removed take space as long as they are mapped
            if not self._mapped:
                raise
            self._mapped.clear()
        return shard.read(*wanted)

    def _may_map(self) -> bool:
        """Whether no more shards are mapped than may be."""
        most = self.files.most_mapped
        return len(self._mapped) <= _MAPPED and (
            most is None or sum(self.shards[n].bytes for n in self._mapped) <= most
        )

    def __getstate__(self) -> dict[str, Any]:
        # Mappings cannot be pickled; they are made again when needed.
        return self.__dict__ | {"_mapped": OrderedDict(), "_valid": {}}

    def info(self) -> CacheInfo:
        """Identity, counts and sizes, from the indexes alone."""
        return CacheInfo.of(self.location, self.identity, self.shards)


def _refuse_repeats(location: Location, shards: Indexes) -> None:
    """Raises: ShardCorruptError for a trace in two shards."""
    if not has_repeats(shards.id_bytes):
        return
    owners: dict[str, str] = {}
    for index in shards:
        for trace_id in index.trace_ids:
            if (owner := owners.setdefault(trace_id, index.name)) != index.name:
                raise ShardCorruptError(
                    f"{location}: trace {trace_id} is in {owner} and in {index.name}; `logitcache verify --repair {location}` "
                    "sets the second aside"
                )
    raise ShardCorruptError(f"{location}: a shard has a trace twice; `logitcache verify --repair {location}` finds it")


def info(cache: CachePath) -> CacheInfo:
    """What a cache contains.

    Raises: as ``Cache.open``.
    """
    return Cache.open(cache).info()
