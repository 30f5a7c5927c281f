"""The files of a cache, wherever it is: in a directory, or in an object store with a mirror on this disk."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from logitcache.cache.validate import UNIT
from logitcache.errors import LogitcacheError
from logitcache.runtime.files import publish
from logitcache.runtime.regular_files import open_regular
from logitcache.storage.location import Location

if TYPE_CHECKING:
    from logitcache.cache.shard import ShardIndex

DIRECTORY = "shards"


class ShardFiles(Protocol):
    """The files of a cache. Can be pickled; safe in several processes at once."""

    @property
    def location(self) -> Location:
        """What the user calls the cache; messages name it."""
        ...

    @property
    def path(self) -> Path:
        """The directory with the manifest and the indexes; of a cache in an object store, a copy of them."""
        ...

    @property
    def most_mapped(self) -> int | None:
        """Bytes of shards that a process may keep mapped: they take space when the mirror has removed them. None: any."""
        ...

    @property
    def compacted(self) -> str | None:
        """The compacted index whose shards all exist, although their own indexes are not in ``path``."""
        ...

    def open(self, index: "ShardIndex") -> BinaryIO:
        """The Arrow file of a shard, from this disk or downloaded first. Its bytes are checked by whoever reads them.

        Raises: FileNotFoundError, OSError; ShardCorruptError for a download that its index contradicts.
        """
        ...

    def renew(self, index: "ShardIndex") -> bool:
        """Whether what ``open`` gave was a damaged copy, which is now replaced. Raises: as ``open``."""
        ...

    def unindexed(self) -> list[str]:
        """Names of shards without an index."""
        ...

    def naming(self) -> AbstractContextManager[None]:
        """Errors that leave the block name the location where they would name ``path``."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of a cache in a directory."""

    path: Path

    @property
    def location(self) -> Path:
        return self.path

    @property
    def most_mapped(self) -> None:
        return None

    @property
    def compacted(self) -> None:
        return None

    def open(self, index: "ShardIndex") -> BinaryIO:
        return open_regular(self.path / DIRECTORY / f"{index.name}.arrow")

    def renew(self, index: "ShardIndex") -> bool:
        return False

    def unindexed(self) -> list[str]:
        return unindexed(self.path / DIRECTORY)

    def naming(self) -> AbstractContextManager[None]:
        return nullcontext()


def place(file: BinaryIO, target: Path) -> None:
    """Puts an open file at ``target``: a hard link where both are on one file system, else a copy.

    Raises: WriteError.
    """
    try:
        # The open file itself, since a mirror may have removed its name. A descriptor makes Python follow the link.
        os.link(f"/proc/self/fd/{file.fileno()}", target, src_dir_fd=file.fileno(), follow_symlinks=True)
    except OSError:  # another file system, or one without links
        publish(target, file.read())


def unindexed(directory: Path) -> list[str]:
    """Names of shards without an index, which a kill between the two files leaves. Readers ignore them."""
    names = sorted(path.stem for path in directory.glob("unit-*.arrow") if UNIT.holds(path.stem))
    return [name for name in names if not (directory / f"{name}.json").exists()]


@contextmanager
def renamed(path: Path, location: Location) -> Iterator[None]:
    """Errors that leave the block name ``location`` where they would name ``path``."""
    try:
        yield
    except LogitcacheError as e:
        raise type(e)(str(e).replace(str(path), str(location))) from e
