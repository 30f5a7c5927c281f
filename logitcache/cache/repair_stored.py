"""Repairs a cache in an object store: a copy of its manifests and indexes is repaired on this disk, then the store is changed
like the copy."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path, PurePosixPath

from logitcache.cache import compact, manifest
from logitcache.cache.mirror import INDEX, Streaming
from logitcache.cache.repair import SET_ASIDE, repaired
from logitcache.cache.shard_files import DIRECTORY
from logitcache.cache.verify import VerifyReport
from logitcache.cache.workers import Worker
from logitcache.runtime.files import scratch_directory
from logitcache.storage.location import Url
from logitcache.storage.store import Store


def repair_stored(url: Url, workers: int | None = None) -> VerifyReport:
    """As ``repair.repair``. What is damaged is copied to set-aside/ in the store before it is deleted.

    Raises: as ``repair.repair`` and ``Store``.
    """
    files = Streaming(url)
    store, place = files.store, files.path.with_name(f"{files.path.name}-repair")
    if not _there(store, (manifest.FILE_NAME, manifest.BACKUP)):
        files.refresh()  # says what is missing
    with Worker().alone_in(store) as held, scratch_directory(place, str(url)) as copy:
        files.path = copy
        before = dict(_download(store, copy, _small(store)))

        def bring(names: Iterable[str]) -> None:
            wanted = [f"{DIRECTORY}/{name}.arrow" for name in names]
            before.update(_download(store, copy, [name for name in wanted if name not in before]))

        bring(files.unindexed())
        with files.naming():
            report = repaired(files, bring, workers)
        held.check()
        after = {name: _sha256((copy / name).read_bytes()) for name in _names(copy)}
        gone = sorted((name for name in before if after.get(name) != before[name]), key=_order)
        moved = [_set_aside(store, name) for name in gone]
        new = [name for name in sorted(after) if before.get(name) != after[name]]
        for name in new:
            store.create(name, (copy / name).read_bytes())
    at = [[Url(f"{url}/{name}") for name in names] for names in (moved, new)]
    return replace(report, cache=url, moved=at[0], restored=at[1])


def _there(store: Store, names: Iterable[str]) -> bool:
    return any(entry.name in names for entry in store.list(""))


def _small(store: Store) -> list[str]:
    """The objects of a cache but its shards' data."""
    names = [e.name for e in store.list(DIRECTORY) if INDEX.fullmatch(e.name)]
    return [manifest.FILE_NAME, manifest.BACKUP, *names, *map(str, compact.in_store(store))]


def _download(store: Store, copy: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Downloads objects that are there. Yields their names and checksums."""
    for name in names:
        with suppress(FileNotFoundError):
            data = store.get(name)
            (copy / name).parent.mkdir(exist_ok=True)
            (copy / name).write_bytes(data)
            yield name, _sha256(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _names(copy: Path) -> list[str]:
    """The files of a cache in a directory, without those set aside."""
    paths = (path for path in copy.rglob("*") if path.is_file())
    names = (str(path.relative_to(copy)) for path in paths if not path.name.startswith("."))
    return [name for name in names if not name.startswith(f"{SET_ASIDE}/")]


def _order(name: str) -> tuple[bool, bool, str]:
    """Compacted indexes first, then indexes: what is interrupted leaves shards that readers ignore."""
    return not name.startswith(f"{DIRECTORY}/indexes-"), name.endswith(".arrow"), name


def _set_aside(store: Store, name: str) -> str:
    """Copies an object to set-aside/, under its name or the first that is free, and deletes it. Returns: where it is."""
    data, path = store.get(name), PurePosixPath(name)
    names = (f"{path.stem}.{i}{path.suffix}" if i > 1 else path.name for i in count(1))
    place = next(f"{SET_ASIDE}/{each}" for each in names if store.create(f"{SET_ASIDE}/{each}", data))
    store.delete(name)
    return place
