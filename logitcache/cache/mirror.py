"""A bounded copy, on this disk, of a cache in an object store."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from logitcache.cache import compact, manifest
from logitcache.cache.options import CACHE_BYTES, CACHE_DIR
from logitcache.cache.shard import OTHER_BYTES, ShardIndex, place_of, read_index, way_out
from logitcache.cache.shard_files import DIRECTORY, place, renamed
from logitcache.errors import CacheError, LogitcacheError, NotACacheError, ShardCorruptError, WriteError
from logitcache.runtime.files import scratch_directory
from logitcache.runtime.regular_files import open_regular
from logitcache.runtime.units import parse_bytes
from logitcache.storage.location import Url
from logitcache.storage.store import Store

_MOST = 100 * 10**9  # bytes of shards, unless the user says otherwise; and at most half of the disk
_AHEAD = 4  # downloads at once in the background
_STRIPES = 64  # locks of downloads, by the shard's number
_FULL = (errno.ENOSPC, errno.EDQUOT)
INDEX = re.compile(rf"{DIRECTORY}/unit-\d{{6,}}\.json")
_ARROW = re.compile(rf"{DIRECTORY}/(unit-\d{{6,}})\.arrow")
_TRIES = 5  # of a download whose file another process removes at once


def cache_directory() -> Path:
    """The directory of all mirrors of this user."""
    if given := os.environ.get(CACHE_DIR):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "logitcache"


class Mirror:
    """A local directory that looks like the cache: its manifest, its indexes, and the shards that were read last.

    Several processes may use one mirror at once: a shard is downloaded by one of them. What is mapped into memory stays
    readable when its file is removed. Can be pickled.

    Args:
        directory: of all mirrors; None: LOGITCACHE_CACHE_DIR, else ``logitcache`` in the user's cache directory.
        most: bytes of shards in ``directory``, of all mirrors together; one shard is always kept. None:
            LOGITCACHE_CACHE_BYTES, else 100 GB or half of what the disk has free, whichever is less.
    """

    def __init__(self, url: Url, directory: Path | None = None, most: int | None = None) -> None:
        self.location = url
        self.directory = directory or cache_directory()
        self.path = self.directory / hashlib.blake2b(str(url).encode(), digest_size=12).hexdigest()
        self.room = _Room(self.directory, most)
        self.compacted: str | None = None  # the compacted index that stands for the indexes of its shards
        self.downloads = self.downloaded_bytes = 0  # of shards, by this process
        self._forget_process()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.downloads = self.downloaded_bytes = 0
        self._forget_process()

    def _forget_process(self) -> None:
        self._pid = os.getpid()
        self._store: Store | None = None
        self._ahead = _Background(self.fetch)

    def _in_this_process(self) -> None:
        if self._pid != os.getpid():  # a fork has neither the threads nor the connections
            self._forget_process()

    @property
    def store(self) -> Store:
        """The connection of this process. Raises: InputError."""
        self._in_this_process()
        if self._store is None:
            from logitcache.storage.connect import connect

            self._store = connect(self.location)
        return self._store

    @property
    def most_mapped(self) -> int:
        return self.room.most // 4

    def naming(self) -> AbstractContextManager[None]:
        return renamed(self.path, self.location)

    def refresh(self) -> Path:
        """Downloads the manifest and the missing indexes, and removes those that the store does not have any more.

        A mirror of another cache, which was at this URL before, is emptied.

        Returns: the mirror's directory.
        Raises: NotACacheError, WriteError; as ``Store.get``.
        """
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # what was listed, or the mirror itself, was removed since
                self._refresh(self._manifest())
                return self.path
        raise WriteError(f"{self.directory}: other processes remove the mirror of {self.location} while it is made")

    def _refresh(self, found: bytes) -> None:
        with self._writing(), _locked(self.path / ".lock"):
            if _read(self.path / manifest.FILE_NAME) != found:
                self._empty()
                (self.path / "url").write_text(f"{self.location}\n")
                _replace(self.path / manifest.FILE_NAME, found)
            (self.path / DIRECTORY).mkdir(exist_ok=True)
            covered, after = self._refresh_compacted()
            sizes = {e.name: e.size for e in self.store.list(DIRECTORY, after) if INDEX.fullmatch(e.name)}
            for path in (self.path / DIRECTORY).glob("unit-*.json"):
                if path.stem in covered:
                    continue
                if sizes.get(f"{DIRECTORY}/{path.name}") != path.stat().st_size:
                    path.unlink(missing_ok=True)
                    path.with_suffix(".arrow").unlink(missing_ok=True)
            wanted = [name for name in sizes if Path(name).stem not in covered]
            for name, data in self.store.get_each([name for name in wanted if not (self.path / name).exists()]):
                _replace(self.path / name, data)

    def _refresh_compacted(self) -> tuple[frozenset[str], str]:
        """Downloads the newest compacted index. Returns: the shards it covers, and the name after which others stand."""
        self.compacted = compact.download(self.store, self.path)
        if self.compacted is None:
            return frozenset(), ""
        covered = compact.read_one(self.path, self.compacted).names
        return frozenset(covered), compact.names_above(self.path, self.compacted)

    def _manifest(self) -> bytes:
        try:
            return self.store.get(manifest.FILE_NAME)
        except FileNotFoundError:
            raise NotACacheError(self._without_manifest()) from None

    def _without_manifest(self) -> str:
        if any(e.name == manifest.BACKUP for e in self.store.list("")):
            return (
                f"{self.location} is not a cache: no {manifest.FILE_NAME} in it; `logitcache verify --repair "
                f"{self.location}` restores it from {manifest.BACKUP}"
            )
        return (
            f"{self.location} is not a cache: no {manifest.FILE_NAME} in it; create one with `logitcache generate ... "
            f"--out {self.location}`"
        )

    def unindexed(self) -> list[str]:
        """Names of shards in the store without an index."""
        names = {e.name for e in self.store.list(DIRECTORY)}
        return sorted(n for n in map(_shard_of, names) if n and f"{DIRECTORY}/{n}.json" not in names)

    def renew_indexes(self) -> bool:
        """Downloads the indexes again whose copies are damaged. Returns: whether there were any."""
        damaged = 0
        if self.compacted is not None:
            damaged += not compact.is_whole(self.path, self.compacted)
        for path in (self.path / DIRECTORY).glob("unit-*.json"):
            try:
                read_index(path)
            except CacheError:
                path.unlink(missing_ok=True)
                damaged += 1
        if damaged:
            self.refresh()
        return damaged > 0

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()

    def open(self, index: ShardIndex) -> BinaryIO:
        """The Arrow file of a shard, downloaded if it is not here.

        Raises: as ``fetch``.
        """
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):  # removed by another process since
                return open_regular(self.fetch(index))
        raise WriteError(
            f"{self.directory}: other processes remove shards as soon as they are downloaded; give them more bytes with "
            "`cache_bytes`"
        )

    def fetch(self, index: ShardIndex) -> Path:
        """Downloads a shard if it is not here, and marks it as the one that was used last.

        Returns: its file, which another process may remove at any time; ``open`` waits for none.
        Raises: ShardCorruptError where the store has other bytes than the index says; WriteError where this disk is full;
            as ``Store.get``.
        """
        path = self._file(index)
        for _ in range(_TRIES):
            if _touch(path):
                return path
            with suppress(FileNotFoundError):  # the mirror was removed since
                self._place(index, path)
                return path
        raise WriteError(f"{self.directory}: other processes remove the mirror of {self.location} while it is used")

    def _place(self, index: ShardIndex, path: Path) -> None:
        stripe = index.number % _STRIPES
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent / f".lock-{stripe}"):
                if not _touch(path):  # another process downloaded it
                    # Under the lock: what a killed process left is overwritten.
                    self.room.place(path, path.parent / f".part-{stripe}", self._download(index))

    def _download(self, index: ShardIndex) -> bytes:
        name, place = f"{DIRECTORY}/{index.name}.arrow", place_of(self.location, index.name)
        try:
            data = self.store.get(name)
        except FileNotFoundError:
            raise ShardCorruptError(f"{place} is missing, but its index exists; {way_out(self.location)}") from None
        fault = OTHER_BYTES if hashlib.sha256(data).hexdigest() != index.sha256 else None
        if len(data) != index.bytes:
            fault = f"{len(data):,} bytes, its index says {index.bytes:,}"
        if fault:
            # The index may be the wrong one of the two: the next call of ``refresh`` reads it anew.
            (self.path / DIRECTORY / f"{index.name}.json").unlink(missing_ok=True)
            raise ShardCorruptError(f"{place}: {fault}; {way_out(self.location)}")
        self.downloads += 1
        self.downloaded_bytes += len(data)
        return data

    @contextmanager
    def copied(self, indexes: Iterable[ShardIndex]) -> Iterator[Path]:
        """A directory with the manifest and all files of these shards, for the time of the block.

        Raises: as ``fetch``.
        """
        copy = self.path.with_name(f"{self.path.name}-copy")
        with scratch_directory(copy, f"a copy of {self.location}") as directory:
            (directory / DIRECTORY).mkdir()
            (directory / manifest.FILE_NAME).write_bytes(self._manifest())
            names = []
            for index in indexes:
                with self.open(index) as file:
                    place(file, directory / DIRECTORY / f"{index.name}.arrow")
                names.append(f"{DIRECTORY}/{index.name}.json")
            for name, data in self.store.get_each(names):
                (directory / name).write_bytes(data)
            yield directory

    def renew(self, index: ShardIndex) -> bool:
        """Downloads a shard again whose copy is damaged. Returns: whether it was. Raises: as ``fetch``."""
        path = self._file(index)
        data = _read(path)
        if data is None or hashlib.sha256(data).hexdigest() == index.sha256:
            return False
        path.unlink(missing_ok=True)
        self.fetch(index)
        return True

    def fetch_ahead(self, indexes: Iterable[ShardIndex]) -> None:
        """Downloads these shards in the background, the first ones first, instead of those asked for before.

        Stops at half of the mirror's bytes. Says nothing about errors: a later ``fetch`` raises them.
        """
        self._in_this_process()
        wanted, size = list[ShardIndex](), 0
        for index in indexes:
            size += index.bytes
            if size > self.room.most // 2:
                break
            if not self._file(index).exists():
                wanted.append(index)
        self._ahead.replace(wanted)

    def _file(self, index: ShardIndex) -> Path:
        return self.path / DIRECTORY / f"{index.name}.arrow"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises: WriteError for what keeps the mirror from being written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            yield
        except FileNotFoundError:
            raise
        except OSError as e:
            raise WriteError(
                f"{self.directory}: {e.strerror or e} while mirroring {self.location}; give `cache_dir` a writable directory"
            ) from e


class Streaming(Mirror):
    """Reads every index and every shard from the store, and leaves the shards in the mirror as they are."""

    def _refresh_compacted(self) -> tuple[frozenset[str], str]:
        """Downloads the compacted indexes beside all indexes, to be compared with them."""
        compact.download_all(self.store, self.path)
        return frozenset(), ""

    def refresh(self) -> Path:
        """Downloads the second copy of the manifest too."""
        path = super().refresh()
        with self._writing(), _locked(path / ".lock"):
            try:
                _replace(path / manifest.BACKUP, self.store.get(manifest.BACKUP))
            except FileNotFoundError:
                (path / manifest.BACKUP).unlink(missing_ok=True)
        return path

    def open(self, index: ShardIndex) -> BinaryIO:
        """Raises: FileNotFoundError; WriteError; as ``Store.get``."""
        data = self.store.get(f"{DIRECTORY}/{index.name}.arrow")
        with self._writing():
            file = TemporaryFile(dir=self.path)  # noqa: SIM115 - the caller closes it
            file.write(data)
            file.flush()
        return file

    def renew(self, index: ShardIndex) -> bool:
        return False


class _Room:
    """The bytes of shards in a directory of mirrors. The shards that were used least recently make room for others.

    A count in a file, which may be too high but never too low, saves looking at all files for each download.
    """

    def __init__(self, directory: Path, most: int | None) -> None:
        self.directory, self._most = directory, most

    @property
    def most(self) -> int:
        """Bytes of shards that may stay."""
        if self._most is None:
            given = os.environ.get(CACHE_BYTES)
            self._most = parse_bytes(given, "cache_bytes") if given else min(_MOST, self._half())
        return self._most

    def _half(self) -> int:
        """Half of what the disk would have free without the mirrors."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return (shutil.disk_usage(self.directory).free + sum(size for _, size, _ in self._files())) // 2

    def place(self, path: Path, part: Path, data: bytes) -> None:
        """Writes a file, as ``part`` until it is complete, after removing others until it fits.

        Raises: WriteError if the disk has no room for this file alone; OSError.
        """
        with _locked(self.directory / ".room"):
            count = self._count() + len(data)
            if count > self.most:  # and 5% more, so that not every download looks at all files
                count = self._evict(self.most * 19 // 20 - len(data)) + len(data)
            _replace(self.directory / "bytes", str(count).encode())
        while True:
            try:
                part.write_bytes(data)  # its hash is checked when it is read: no fsync
                part.rename(path)
                return
            except OSError as e:
                part.unlink(missing_ok=True)
                if e.errno not in _FULL:
                    raise
                if not self._free(len(data)):
                    raise WriteError(
                        f"{self.directory}: {e.strerror} while storing a shard of {len(data):,} bytes; free some space, or "
                        "give `cache_dir` a directory on another disk"
                    ) from e

    def _free(self, size: int) -> bool:
        """Removes files of at least so many bytes. Returns: whether there was any."""
        with _locked(self.directory / ".room"):
            used = self._used()
            self._evict(used - size)
        return used > 0

    def _count(self) -> int:
        text = _read(self.directory / "bytes")
        return int(text) if text and text.isdigit() else self._used()

    def _used(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _evict(self, most: int) -> int:
        """Removes the files that were used least recently, until at most so many bytes are left. Returns: bytes left."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= most:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    def _files(self) -> list[tuple[int, int, Path]]:
        """When each shard was used last, its bytes, its file."""
        found = []
        for path in self.directory.glob(f"*/{DIRECTORY}/unit-*.arrow"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        return found


class _Background:
    """Threads that fetch shards while others work; they end when nothing is left to fetch."""

    def __init__(self, fetch: Callable[[ShardIndex], Any]) -> None:
        self._fetch = fetch
        self._waiting: deque[ShardIndex] = deque()
        self._running: set[str] = set()  # names of shards
        self._lock = threading.Lock()
        self._threads = 0

    def replace(self, wanted: list[ShardIndex]) -> None:
        with self._lock:
            self._waiting = deque(index for index in wanted if index.name not in self._running)
            more = min(len(self._waiting), _AHEAD - self._threads)
            self._threads += more
        for _ in range(more):
            threading.Thread(target=self._work, daemon=True, name="logitcache-fetch").start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                index = self._waiting.popleft()
                self._running.add(index.name)
            with suppress(LogitcacheError, OSError):
                self._fetch(index)
            with self._lock:
                self._running.discard(index.name)


def _shard_of(name: str) -> str | None:
    """The name of the shard whose Arrow file an object is; None for another object."""
    found = _ARROW.fullmatch(name)
    return found and found[1]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for other processes and threads that hold the lock on ``path``. Raises: OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _touch(path: Path) -> bool:
    """Marks a file as used now. Returns: whether it is there."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _read(path: Path) -> bytes | None:
    """The bytes of a file; None if there is no regular file."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError:
        return None


def _replace(path: Path, data: bytes) -> None:
    """Writes a small file atomically. The caller holds the lock of its directory."""
    part = path.with_name(f".{path.name}-part")
    part.write_bytes(data)
    part.rename(path)
