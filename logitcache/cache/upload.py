"""A new cache in an object store: written to this disk, then uploaded, its manifest last.

What is uploaded before the manifest is not a cache yet. An object with the name of MARK stands beside it until the manifest
does: what an interrupted upload left is known by it, and the next one removes it and begins anew.
"""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from logitcache.cache import manifest
from logitcache.cache.mirror import cache_directory
from logitcache.cache.workers import Worker
from logitcache.errors import CacheBusyError, InputError, NotACacheError
from logitcache.runtime.files import MARK, scratch_directory
from logitcache.runtime.regular_files import open_regular
from logitcache.storage.connect import connect
from logitcache.storage.lease import FOLDER as LOCKS
from logitcache.storage.lease import Lease
from logitcache.storage.location import Url
from logitcache.storage.store import Store

_AT_ONCE = 8  # uploads


@contextmanager
def new_objects(url: Url) -> Iterator[Path]:
    """Yields a directory for the files of a new cache, which are uploaded when the block ends without an error.

    Raises: NotACacheError if there is anything at ``url``; CacheBusyError if another process is writing there; InputError
        for a URL that cannot be written; WriteError.
    """
    if url.scheme == "hf":
        raise InputError(f"`out` {url}: give a directory, then `logitcache push` uploads it to the hub")
    store, place = (
        connect(url),
        cache_directory() / "out" / hashlib.blake2b(str(url).encode(), digest_size=12).hexdigest(),
    )
    _refuse_occupied(store)
    with Worker().alone_in(store) as held, scratch_directory(place, str(url)) as directory:
        for name in _refuse_occupied(store):  # left from an interrupted upload
            store.delete(name)
        yield directory
        _upload(store, directory, held)


def _refuse_occupied(store: Store) -> list[str]:
    """The objects of an interrupted upload, its mark last. Raises: NotACacheError for others."""
    names = [e.name for e in store.list("") if not e.name.startswith(f"{LOCKS}/")]
    if names and (MARK not in names or manifest.FILE_NAME in names):
        what = "a cache" if manifest.FILE_NAME in names else f"something else ({names[0]})"
        raise NotACacheError(f"{store.url}: there is {what} already; give `out` a new URL")
    return sorted(names, key=lambda name: name == MARK)


def _upload(store: Store, directory: Path, held: Lease) -> None:
    """Uploads data first, then indexes, then the second copy of the manifest, and the manifest last."""
    _create(store, MARK, b"an upload that has not ended\n")
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    order = {".arrow": 0, ".json": 1}
    manifests = [directory / manifest.BACKUP, directory / manifest.FILE_NAME]
    for step in (0, 1):
        files = [path for path in paths if path not in manifests and order.get(path.suffix) == step]
        _create_each(store, directory, files)
    held.check()
    for path in manifests:
        _create(store, path.name, path.read_bytes())
    store.delete(MARK)


def _create_each(store: Store, directory: Path, files: Sequence[Path]) -> None:
    def create(path: Path) -> None:
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            memoryview(data) as view,
        ):
            _create(store, str(path.relative_to(directory)), view)

    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload")
    try:
        for _ in pool.map(create, files):
            pass
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _create(store: Store, name: str, data: bytes | memoryview) -> None:
    if not store.create(name, data):
        raise CacheBusyError(f"{store.url}/{name}: another process made it meanwhile; give `out` a new URL")
