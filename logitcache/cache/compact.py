"""Compacts the indexes of a cache: one file that says what all of them say, so that many shards are opened at once.

It is a copy: the indexes remain, and decide. CACHE/compact holds numbered pairs, never changed once they are published: the
data, and after it the head, a JSON file with its checksum.
"""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import pyarrow as pa

from logitcache.cache import compact_file, manifest, shard
from logitcache.cache.columns import has_repeats, id_bytes
from logitcache.cache.compact_file import Compacted
from logitcache.cache.manifest import FORMAT_VERSION
from logitcache.cache.options import CachePath
from logitcache.cache.shard import ShardIndex
from logitcache.cache.validate import COMPACT, check, reading
from logitcache.cache.workers import Worker
from logitcache.errors import CacheBusyError, CacheError, FormatVersionError, InputError, ShardCorruptError
from logitcache.runtime.files import json_bytes, publish, publish_json, read_json, remove_parts
from logitcache.runtime.regular_files import open_regular
from logitcache.storage.location import Location, Url, locate
from logitcache.storage.store import Store

DIRECTORY = "compact"
_FILE = re.compile(r"(indexes-[0-9]{6,18})\.(json|arrow)", re.ASCII)


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What compacting a cache wrote."""

    cache: Location
    path: str  # path or URL of the head
    shards: int
    traces: int
    bytes: int  # of the data
    removed: list[str]  # files of older compacted indexes

    def to_json(self) -> dict[str, Any]:
        """What ``logitcache compact --json`` prints."""
        return {
            "path": self.path,
            "shards": self.shards,
            "traces": self.traces,
            "bytes": self.bytes,
            "removed": self.removed,
        }


def compact(cache: CachePath) -> CompactReport:
    """Writes the compacted index of a cache, and removes older ones. No process may write to a cache at a URL meanwhile.

    Raises: CacheBusyError while another process writes to the cache; InputError for a cache without shards; WriteError;
        ShardCorruptError, FormatVersionError and UnreadableError for a damaged index.
    """
    location = locate(cache)
    if isinstance(location, Url):
        return _compact_stored(location)
    manifest.read(location)
    with Worker().alone(location):
        old = files(location)
        head, data = _compacted(location, location, max(map(_number, old), default=0) + 1)
        path = location / DIRECTORY / f"{head['name']}.json"
        publish(path.with_suffix(".arrow"), data)
        publish_json(path, head)
        remove_parts(path.parent)
        for each in old:
            each.unlink(missing_ok=True)
    return _report(location, head, list(map(str, old)))


def _compact_stored(url: Url) -> CompactReport:
    """Compacts a cache in an object store."""
    from logitcache.cache.mirror import Streaming  # which imports this module

    mirror = Streaming(url)
    with mirror.naming():
        path = mirror.refresh()  # all indexes are here now
        manifest.read(path)
        old = in_store(mirror.store)
        head, data = _compacted(url, path, max(map(_number, old), default=0) + 1)
        for suffix, content in ((".arrow", data), (".json", json_bytes(head))):
            name = f"{DIRECTORY}/{head['name']}{suffix}"
            if not mirror.store.create(name, content):
                raise CacheBusyError(f"{url}/{name}: another process made it meanwhile; run again")
        for each in old:
            mirror.store.delete(str(each))
    return _report(url, head, [f"{url}/{each}" for each in old])


def _compacted(location: Location, cache: Path, number: int) -> tuple[dict[str, Any], memoryview]:
    """Head and data of the compacted index of a cache.

    Args:
        cache: the directory with its indexes.
    """
    directory = cache / shard.DIRECTORY
    paths = [directory / f"{name}.json" for name in shard.indexed(directory)]
    if not paths:
        raise InputError(f"{location} has no shards; `logitcache generate` makes some")
    indexes = [shard.read_index(path) for path in paths]
    if has_repeats(id_bytes(index.trace_ids for index in indexes)):
        raise ShardCorruptError(
            f"{location}: a trace is in two shards; `logitcache verify --repair {location}` finds it"
        )
    data = compact_file.to_bytes(indexes, list(map(_sha256_of, paths)))
    head = {
        "format": FORMAT_VERSION,
        "name": f"indexes-{number:06d}",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "shards": len(indexes),
        "traces": sum(index.trace_count for index in indexes),
        "highest": max(index.number for index in indexes),
    }
    return head, data


def _report(location: Location, head: dict[str, Any], removed: list[str]) -> CompactReport:
    path = f"{location}/{DIRECTORY}/{head['name']}.json"
    return CompactReport(location, path, head["shards"], head["traces"], head["bytes"], removed)


def download(store: Store, mirror: Path) -> str | None:
    """Downloads the newest compacted index of a cache in an object store that is not here. Returns: its name; None if there
    is none that can be used, which is said in a warning.

    Raises: WriteError; as ``Store.get``.
    """
    names = [path.stem for path in reversed(in_store(store)) if path.suffix == ".json"]
    for path in files(mirror):
        if path.stem not in names:
            path.unlink(missing_ok=True)
    for name in names:
        for attempt in range(2):  # what is here may be damaged
            try:
                for suffix in (".arrow", ".json"):
                    path = mirror / DIRECTORY / f"{name}{suffix}"
                    if not path.exists():
                        publish(path, store.get(f"{DIRECTORY}/{path.name}"))
                read_one(mirror, name)
                return name
            except FileNotFoundError:  # a newer one has taken its place meanwhile
                break
            except CacheError as e:
                for suffix in (".json", ".arrow"):
                    (mirror / DIRECTORY / f"{name}{suffix}").unlink(missing_ok=True)
                if attempt:
                    _say_unused(type(e)(str(e).replace(str(mirror), str(store.url))), store.url)
    return None


def download_all(store: Store, mirror: Path) -> None:
    """Downloads all compacted indexes of a cache in an object store, whatever is in them, in the place of those here.

    Raises: as ``download``.
    """
    for path in files(mirror):
        path.unlink(missing_ok=True)
    for name in in_store(store):
        with suppress(FileNotFoundError):  # removed since
            publish(mirror / name, store.get(str(name)))


def is_whole(cache: Path, name: str) -> bool:
    """Whether a compacted index can be used."""
    try:
        read_one(cache, name)
    except (CacheError, FileNotFoundError):
        return False
    return True


def in_store(store: Store) -> list[PurePosixPath]:
    """The files of all compacted indexes in an object store, heads first, the newest last."""
    paths = [PurePosixPath(entry.name) for entry in store.list(DIRECTORY)]
    return sorted((path for path in paths if _FILE.fullmatch(path.name)), key=_heads_first)


def names_above(mirror: Path, name: str) -> str:
    """The name in an object store after which all newer indexes stand; empty if they may stand anywhere."""
    highest = _read_head(mirror / DIRECTORY / f"{name}.json")["highest"]
    # Sorted as text, unit-1000000 stands before unit-200000.
    return f"{shard.DIRECTORY}/unit-{highest:06d}.json" if highest < 100_000 else ""


def read(cache: Path) -> Compacted | None:
    """The newest compacted index; None if there is none. One that cannot be used is left out with a warning: the indexes say
    all that it says."""
    refused = set[str]()
    while (name := _newest(cache, refused)) is not None:
        refused.add(name)
        try:
            return read_one(cache, name)
        except FileNotFoundError:  # a newer one has taken its place meanwhile
            continue
        except CacheError as e:
            _say_unused(e, cache)
    return None


def _say_unused(error: CacheError, location: Location) -> None:
    warnings.warn(
        f"{error}; the indexes of the shards are read instead. `logitcache verify --repair {location}` sets it aside",
        stacklevel=3,
    )


def read_one(cache: Path, name: str) -> Compacted:
    """Reads and checks a compacted index.

    Raises: ShardCorruptError, FormatVersionError and UnreadableError, naming the file; FileNotFoundError if it was removed.
    """
    path = cache / DIRECTORY / f"{name}.arrow"
    head = _read_head(path.with_suffix(".json"))
    try:
        with reading(path), open_regular(path) as file:
            data = file.read(head["bytes"] + 1)  # not mapped: most of it is used long after it was checked
    except FileNotFoundError:
        if path.with_suffix(".json").exists():
            raise ShardCorruptError(f"{path} is missing, but {name}.json exists") from None
        raise
    try:
        if len(data) != head["bytes"] or hashlib.sha256(data).hexdigest() != head["sha256"]:
            raise ShardCorruptError("its bytes do not match the checksum in its head")
        with reading(path):
            found = compact_file.from_bytes(pa.py_buffer(data))
        said = {name: head[name] for name in ("shards", "traces", "highest")}
        if said != {"shards": len(found.names), "traces": int(found.counts_S.sum()), "highest": found.highest}:
            raise ShardCorruptError("its head says other counts")
    except ShardCorruptError as e:
        raise ShardCorruptError(f"{path}: {e}") from e
    return found


def highest(cache: Path) -> int:
    """The highest number of a shard that a compacted index covers, -1 if there is none. New shards get higher numbers, also
    if that shard is gone."""
    found = [-1]
    for path in _heads(cache):
        with suppress(CacheError, FileNotFoundError):
            found.append(_read_head(path)["highest"])
    return max(found)


def faults(cache: Path) -> Iterator[tuple[str, CacheError | str]]:
    """What is wrong with the compacted indexes of a cache: the name of one, and what contradicts the indexes that it covers."""
    for path in _heads(cache):
        try:
            compacted = read_one(cache, path.stem)
        except CacheError as e:
            yield path.stem, e
            continue
        for index, sha256 in zip(compacted.indexes(), compacted.hashes, strict=True):
            if what := _fault(cache / shard.DIRECTORY / f"{index.name}.json", index, sha256):
                yield path.stem, what


def _fault(path: Path, covered: ShardIndex, sha256: str) -> str | None:
    """What a compacted index has wrong of the index in ``path``; None also for an index that is damaged itself."""
    try:
        found = shard.read_index(path)
    except FileNotFoundError:
        return f"covers {covered.name}, which has no index"
    except CacheError:  # verify names the shard
        return None
    if _sha256_of(path) != sha256:
        return f"covers another index of {covered.name}"
    try:
        said, own = covered.to_json(), found.to_json()
    except ShardCorruptError as e:
        return str(e)
    differing = [name for name in own if said[name] != own[name]]
    return f"{', '.join(differing)} of {covered.name} are not those of its index" if differing else None


def files(cache: Path) -> list[Path]:
    """The files of all compacted indexes, heads first: data without a head is not used.

    Raises: UnreadableError.
    """
    directory = cache / DIRECTORY
    try:
        with reading(directory):
            names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [directory / name for name in names if _FILE.fullmatch(name)]
    return sorted(paths, key=_heads_first)


def _heads(cache: Path) -> list[Path]:
    return [path for path in files(cache) if path.suffix == ".json"]


def _newest(cache: Path, refused: set[str]) -> str | None:
    """The newest compacted index that is not among ``refused``."""
    return max((path for path in _heads(cache) if path.stem not in refused), key=_number, default=Path()).stem or None


def _heads_first(path: PurePath) -> tuple[bool, int]:
    return path.suffix == ".arrow", _number(path)


def _number(path: PurePath) -> int:
    return int(path.stem.removeprefix("indexes-"))


def _read_head(path: Path) -> dict[str, Any]:
    """Raises: ShardCorruptError, FormatVersionError, UnreadableError, FileNotFoundError."""
    with reading(path):
        found = read_json(path)
    if type(version := found.get("format")) is not int or version > FORMAT_VERSION:
        raise FormatVersionError(f"{path}: written by a newer logitcache; upgrade with `pip install -U logitcache`")
    try:
        check(found, COMPACT, "the head")
        if found["name"] != path.stem:
            raise ShardCorruptError(f"it is the head of {found['name']}")
    except CacheError as e:
        raise type(e)(f"{path}: {e}") from None
    return found


def _sha256_of(path: Path) -> str:
    with reading(path), open_regular(path) as file:
        return hashlib.sha256(file.read()).hexdigest()
