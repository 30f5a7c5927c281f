"""Caches in a test's object store."""

from pathlib import Path
from typing import Any

from logitcache.cache import manifest
from logitcache.cache.reader import Cache
from logitcache.storage.connect import connect
from logitcache.storage.location import Url
from logitcache.storage.store import Store


def upload(cache: Path, url: str) -> Store:
    """Puts the files of a cache into a store."""
    store = connect(Url(url))
    files = [p for p in cache.rglob("*") if p.is_file() and not p.name.startswith(".")]
    for path in sorted(files, key=lambda p: p.name == manifest.FILE_NAME):
        assert store.create(str(path.relative_to(cache)), path.read_bytes())
    return store


def swap(store: Store, name: str, data: bytes) -> None:
    """Puts other bytes in the place of an object."""
    store.delete(name)
    assert store.create(name, data)


def flipped(data: bytes) -> bytes:
    """The same bytes but one in the middle."""
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    return bytes(changed)


def read_all(url: str, results: Any) -> None:
    """Reads every trace, as a process of its own. Puts how many shards it downloaded, and the trace ids."""
    cache = Cache.open(url)
    found = [trace.trace_id for trace in cache]
    assert cache.mirror
    results.put((cache.mirror.downloads, found))
