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
from pathlib import Path
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
from logitcache.errors import CacheError, FormatVersionError, InputError, ShardCorruptError
from logitcache.runtime.files import publish, publish_json, read_json, remove_parts
from logitcache.runtime.regular_files import open_regular

DIRECTORY = "compact"
_FILE = re.compile(r"(indexes-[0-9]{6,18})\.(json|arrow)", re.ASCII)


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What compacting a cache wrote."""

    cache: Path
    path: Path  # the head
    shards: int
    traces: int
    bytes: int  # of the data
    removed: list[Path]  # older compacted indexes

    def to_json(self) -> dict[str, Any]:
        """What ``logitcache compact --json`` prints."""
        return {
            "path": str(self.path),
            "shards": self.shards,
            "traces": self.traces,
            "bytes": self.bytes,
            "removed": [str(path) for path in self.removed],
        }


def compact(cache: CachePath) -> CompactReport:
    """Writes the compacted index of a cache, and removes older ones.

    Raises: CacheBusyError while another process writes to the cache; InputError for a cache without shards; WriteError;
        ShardCorruptError, FormatVersionError and UnreadableError for a damaged index.
    """
    cache = Path(cache)
    manifest.read(cache)
    with Worker().alone(cache):
        directory = cache / shard.DIRECTORY
        paths = [directory / f"{name}.json" for name in shard.indexed(directory)]
        if not paths:
            raise InputError(f"{cache} has no shards; `logitcache generate` makes some")
        indexes = [shard.read_index(path) for path in paths]
        if has_repeats(id_bytes(index.trace_ids for index in indexes)):
            raise ShardCorruptError(f"{cache}: a trace is in two shards; `logitcache verify --repair {cache}` finds it")
        old = files(cache)
        data = compact_file.to_bytes(indexes, list(map(_sha256_of, paths)))
        head = {
            "format": FORMAT_VERSION,
            "name": f"indexes-{max(map(_number, old), default=0) + 1:06d}",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "shards": len(indexes),
            "traces": sum(index.trace_count for index in indexes),
            "highest": max(index.number for index in indexes),
        }
        path = cache / DIRECTORY / f"{head['name']}.json"
        publish(path.with_suffix(".arrow"), data)
        publish_json(path, head)
        remove_parts(path.parent)
        for each in old:
            each.unlink(missing_ok=True)
    return CompactReport(cache, path, head["shards"], head["traces"], len(data), old)


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
            warnings.warn(
                f"{e}; the indexes of the shards are read instead. `logitcache verify --repair {cache}` sets it aside",
                stacklevel=2,
            )
    return None


def read_one(cache: Path, name: str) -> Compacted:
    """Reads and checks a compacted index.

    Raises: ShardCorruptError, FormatVersionError and UnreadableError, naming the file; FileNotFoundError if it was removed.
    """
    path = cache / DIRECTORY / f"{name}.arrow"
    head = _read_head(path.with_suffix(".json"))
    try:
        with reading(path), open_regular(path) as file, pa.memory_map(f"/dev/fd/{file.fileno()}") as source:
            data = source.read_buffer()  # stays valid after the file is closed
    except FileNotFoundError:
        if path.with_suffix(".json").exists():
            raise ShardCorruptError(f"{path} is missing, but {name}.json exists") from None
        raise
    try:
        if data.size != head["bytes"] or hashlib.sha256(data).hexdigest() != head["sha256"]:
            raise ShardCorruptError("its bytes do not match the checksum in its head")
        with reading(path):
            found = compact_file.from_bytes(data)
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
    return sorted(paths, key=lambda path: (path.suffix == ".arrow", _number(path)))


def _heads(cache: Path) -> list[Path]:
    return [path for path in files(cache) if path.suffix == ".json"]


def _newest(cache: Path, refused: set[str]) -> str | None:
    """The newest compacted index that is not among ``refused``."""
    return max((path for path in _heads(cache) if path.stem not in refused), key=_number, default=Path()).stem or None


def _number(path: Path) -> int:
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
