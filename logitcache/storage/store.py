"""What an object store does for a cache."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from logitcache.storage.location import Url


@dataclass(frozen=True, slots=True)
class Entry:
    """An object in a listing."""

    name: str  # below the cache, such as shards/unit-000003.arrow
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Tag:
    """One version of an object, as the store names it."""

    e_tag: str | None
    version: str | None = None


class Store(Protocol):
    """The objects of one cache, under names below its URL. Can be pickled; safe in threads.

    Every method retries for up to three minutes, then raises: InputError for what the user can correct (no such bucket, no
    permission, a misspelt endpoint), UnreadableError while reading and WriteError while writing for what may pass. One line
    each, with the URL and the way out.
    """

    @property
    def url(self) -> Url: ...

    def list(self, folder: str, after: str = "") -> list[Entry]:
        """The objects below ``folder`` whose names sort after ``after``, by name."""
        ...

    def get(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""
        ...

    def get_tagged(self, name: str) -> tuple[bytes, Tag]:
        """An object and its version. Raises: FileNotFoundError."""
        ...

    def get_each(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Several objects, fetched in parallel, in any order. Raises: FileNotFoundError."""
        ...

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Makes an object that is not there. False if one with other bytes is there; True if one with the same bytes is: it
        is ours, and the reply to its creation was lost."""
        ...

    def replace(self, name: str, data: bytes, tag: Tag) -> Tag | None:
        """Replaces the version ``tag`` of an object. Returns the new version; None if another one is there, or nothing."""
        ...

    def delete(self, name: str) -> None:
        """Deletes an object; no error if there is none."""
        ...
