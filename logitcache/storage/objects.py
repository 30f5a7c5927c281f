"""Objects in S3, Google Cloud Storage, Azure and this process's memory, through obstore.

Requests are repeated here and not by obstore: its time limit counts from the first request of a long download, it does not
repeat an upload whose connection was cut, and it cannot be more patient with a store that has answered before.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from logitcache.errors import InputError, LogitcacheError, UnreadableError, WriteError
from logitcache.storage.faults import fault_of
from logitcache.storage.location import Url
from logitcache.storage.parallel import in_parallel
from logitcache.storage.patience import FIRST_PATIENCE, PATIENCE, Passing, persist
from logitcache.storage.store import Entry, Tag

_STALL = 30  # seconds without a byte, after which a connection is given up; Ctrl-C waits for that too
_UPLOADED_IN_A_STALL = 16 << 20  # bytes, at least; what uploads slower is given up
_CHUNK = 4 << 20  # bytes; a cut download goes on after the last whole chunk

T = TypeVar("T")

_memory: dict[str, Any] = {}  # by name: what memory:// holds in this process
_memory_lock = threading.Lock()
_used = _forked = False  # obstore's threads do not survive a fork: a request in the child would never end


def _after_fork() -> None:
    global _forked
    _forked = _used


os.register_at_fork(after_in_child=_after_fork)


class ObjectStore:
    """The objects below a URL. See `Store`.

    Args:
        patience: seconds for which a request that failed is repeated, counted from the last progress.
        first_patience: the same before the store has ever answered.
        stall: seconds without a byte, after which a connection is given up.
    Raises: InputError if obstore is missing or the URL is wrong.
    """

    def __init__(
        self, url: Url, *, patience: float = PATIENCE, first_patience: float = FIRST_PATIENCE, stall: float = _STALL
    ) -> None:
        self.url, self.patience, self.first_patience, self.stall = url, patience, min(patience, first_patience), stall
        _refuse_without_obstore(url)
        bucket, _, prefix = url.text.partition("://")[2].partition("/")
        self._root, self._prefix = f"{url.scheme}://{bucket}", f"{prefix}/" if prefix else ""
        self._clients: dict[int | None, Any] = {}
        self._answered = False
        self._unquoted = False  # Ceph's gateway wants e_tags without quotes in the condition of a PUT
        self._client()  # a wrong URL is refused here

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.url, self.patience, self.first_patience, self.stall, os.getpid())

    def __repr__(self) -> str:
        return f"ObjectStore({self.url})"

    def list(self, folder: str, after: str = "") -> list[Entry]:
        found: dict[str, Entry] = {}

        def attempt() -> None:
            last = max(found, default=after)
            for page in _obstore().list(self._client(), self._key(folder), offset=self._key(last) if last else None):
                for each in page:
                    name = each["path"].removeprefix(self._prefix)
                    found[name] = Entry(name, each["size"])

        self._persist(attempt, folder, UnreadableError, progress=found.__len__)
        return [found[name] for name in sorted(found)]

    def get(self, name: str) -> bytes:
        return self.get_tagged(name)[0]

    def get_tagged(self, name: str) -> tuple[bytes, Tag]:
        chunks: list[bytes] = []
        tag = Tag(None)

        def attempt() -> None:
            nonlocal tag
            done = sum(map(len, chunks))
            options = {"range": {"offset": done}, "if_match": tag.e_tag} if done else None
            try:
                result = _obstore().get(self._client(), self._key(name), options=options)
            except _exceptions().PreconditionError:
                chunks.clear()  # another object stands there now
                raise
            tag = _tag(result.meta)
            for chunk in result.stream(min_chunk_size=_CHUNK):
                chunks.append(bytes(chunk))
            if sum(map(len, chunks)) != result.meta["size"]:
                raise OSError("HTTP error: the reply ended early")

        self._persist(attempt, name, UnreadableError, progress=chunks.__len__)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks), tag

    def get_each(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        return in_parallel(self.get, names)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        # One request, not several parts: only that is create-only everywhere. S3 takes up to 5 GB in one.
        client = self._client(uploads=len(data))

        def attempt() -> bool:
            try:
                _obstore().put(client, self._key(name), data, mode="create", use_multipart=False)
            except _exceptions().AlreadyExistsError:
                return self.get(name) == data
            return True

        return self._persist(attempt, name, WriteError, missing_passes=True)

    def replace(self, name: str, data: bytes, tag: Tag) -> Tag | None:
        client = self._client(uploads=len(data))

        def attempt() -> Tag | None:
            try:
                mode = self._condition(tag)
                return _tag(_obstore().put(client, self._key(name), data, mode=mode, use_multipart=False))
            except (_exceptions().PreconditionError, _exceptions().AlreadyExistsError, FileNotFoundError):
                try:
                    found, now = self.get_tagged(name)
                except FileNotFoundError:
                    return None
                if found == data:
                    return now  # ours, where the reply was lost
                if now != tag:
                    return None
            self._unquoted = not self._unquoted
            raise OSError("Server returned non-2xx status code: 409 Conflict")

        return self._persist(attempt, name, WriteError)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._persist(lambda: _obstore().delete(self._client(), self._key(name)), name, WriteError)

    def _condition(self, tag: Tag) -> dict[str, str]:
        e_tag = tag.e_tag and (tag.e_tag.strip('"') if self._unquoted else tag.e_tag)
        return {k: v for k, v in (("e_tag", e_tag), ("version", tag.version)) if v}

    def _key(self, name: str) -> str:
        return (self._prefix + name).rstrip("/")

    def _client(self, *, uploads: int | None = None) -> Any:
        """A client that gives up when nothing arrives any more; one that ``uploads`` so many bytes, when that takes too long."""
        if _forked:
            raise InputError(
                f"{self.url}: this process was forked from one that uses an object store; start it with spawn, not fork"
            )
        if self.url.scheme == "memory":
            return _memory_of(self._root)
        stalls = None if uploads is None else 1 + uploads // _UPLOADED_IN_A_STALL
        if (client := self._clients.get(stalls)) is None:
            client = self._clients[stalls] = _open(self.url, self._root, self.stall, stalls)
        return client

    def _persist(
        self,
        request: Callable[[], T],
        name: str,
        kind: type[LogitcacheError],
        *,
        progress: Callable[[], int] = lambda: 0,
        missing_passes: bool = False,
    ) -> T:
        """Repeats a request for as long as its fault may pass and there is patience.

        Args:
            kind: raised when there is none left.
            missing_passes: an object that another process deletes in the middle is no error.
        """
        global _used
        _used = True

        def attempt() -> T:
            try:
                result = request()
            except (OSError, _exceptions().BaseError) as error:
                self._judge(error, name, missing_passes)
            self._answered = True
            return result

        try:
            return persist(attempt, lambda: self.patience if self._answered else self.first_patience, progress)
        except Passing as fault:
            if not self._answered:
                raise InputError(f"{self.url}: {fault}") from None
            way_out = "run the same command " + ("to resume" if kind is WriteError else "again")
            raise kind(
                f"{self.url}/{name}: {fault}, for {self.patience:.0f} s without progress; wait until it works, then {way_out}"
            ) from None

    def _judge(self, error: Exception, name: str, missing_passes: bool) -> NoReturn:
        """Raises: Passing, FileNotFoundError or InputError."""
        fault = fault_of(error, self.url)
        self._answered |= fault.answered
        if isinstance(error, _exceptions().PreconditionError):  # while reading: it was replaced meanwhile
            raise Passing("it is replaced all the time")
        if isinstance(error, FileNotFoundError) and not fault.bucket:
            if missing_passes:
                raise Passing("it comes and goes")
            raise FileNotFoundError(f"{self.url}/{name}: no such object") from None
        if fault.passes:
            raise Passing(fault.text)
        raise InputError(f"{self.url}: {fault.text}") from None


def _again(url: Url, patience: float, first_patience: float, stall: float, process: int) -> ObjectStore:
    if url.scheme == "memory" and process != os.getpid():
        raise InputError(f"{url}: memory:// is there in one process only; give a directory or an object store")
    return ObjectStore(url, patience=patience, first_patience=first_patience, stall=stall)


def _refuse_without_obstore(url: Url) -> None:
    try:
        _exceptions()
    except ImportError:
        raise InputError(f"{url}: needs obstore; `pip install 'logitcache[remote]'`") from None


def _tag(meta: Any) -> Tag:
    return Tag(meta["e_tag"], meta["version"])


def _obstore() -> Any:
    import obstore

    return obstore


def _exceptions() -> Any:
    import obstore.exceptions

    return obstore.exceptions


def _memory_of(root: str) -> Any:
    from obstore.store import MemoryStore

    with _memory_lock:
        return _memory.setdefault(root, MemoryStore())


def _open(url: Url, root: str, stall: float, stalls: int | None) -> Any:
    from obstore.store import from_url

    options: Any = {"connect_timeout": timedelta(seconds=min(10, stall))}
    if stalls is None:
        options |= {"timeout": timedelta(days=1), "read_timeout": timedelta(seconds=stall)}
    else:
        options |= {"timeout": timedelta(seconds=stall * stalls)}
    if _plain_http():
        options["allow_http"] = True
    try:
        return from_url(root, client_options=options, retry_config={"max_retries": 0})
    except (ValueError, _exceptions().BaseError) as e:
        raise InputError(f"{url}: {fault_of(e, url).text}") from None


def _plain_http() -> bool:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http://") for name in names)
