"""Locks in an object store, whatever the clocks of the machines say.

A lock is an object that is created only where none is. Its holder replaces it again and again with another counter, on the
condition that it is still the holder's own. Who finds one watches it: a lock that changes is held; one that stays the same
for longer than a holder needs is taken over, on the condition that it did not change in between. No time of day is compared,
and only time in which the store answers counts, so a store that is away costs nobody a lock.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from logitcache.errors import CacheBusyError, InputError, LogitcacheError
from logitcache.storage.store import Store, Tag

FOLDER = ".locks"


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds."""

    renew: float = 10.0  # between two renewals
    poll: float = 2.5  # between two looks at another's lock
    silence: float = 35.0  # without a change, after which a lock is taken over


@dataclass(frozen=True, slots=True)
class _Process:
    """A process, so that others of its machine can see that it has ended. Empty where there is no /proc."""

    machine: str
    pid: int
    started: str  # in ticks after the machine's start: another process may get the same pid

    @classmethod
    def this(cls) -> "_Process":
        return cls(_machine(), os.getpid(), _start_of(os.getpid()))

    def has_ended(self) -> bool:
        """Whether it certainly has: it was of this machine and this container, and is not there any more."""
        if not self.started or not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass  # another user's
        return _start_of(self.pid) not in ("", self.started)


@dataclass(frozen=True, slots=True)
class _Content:
    """What a lock says."""

    holder: str = field(default_factory=lambda: f"pid {os.getpid()} on {socket.gethostname()}")
    nonce: str = field(default_factory=lambda: uuid4().hex)
    counter: int = 0
    process: _Process = field(default_factory=_Process.this)

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def next(self) -> "_Content":
        return replace(self, counter=self.counter + 1)


class Lease:
    """A lock that this process holds and renews in a thread."""

    def __init__(self, store: Store, name: str, what: str, content: _Content, tag: Tag, times: Times) -> None:
        self.store, self.name, self.what = store, name, what
        self._content, self._tag, self._times = content, tag, times
        self._lost_to: str | None = None
        self._works = True  # the last renewal succeeded
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_the_end, name=f"lease {name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: CacheBusyError once another process has taken the lock over."""
        if self._lost_to is not None:
            raise CacheBusyError(
                f"{self.what} was taken over by another process ({self._lost_to}), because this one could not renew its lock "
                f"for {self._times.silence:.0f} s; what it published is safe"
            )

    def release(self) -> None:
        """Ends the renewals and deletes the lock, if it is still this process's."""
        self._ending.set()
        self._thread.join(self._times.renew)
        if self._thread.is_alive():
            return  # the store is away; the next process takes the lock over
        with suppress(LogitcacheError):
            if self._works:
                self._renew()  # nobody takes over what has just changed
            if self._works and self._lost_to is None:
                self.store.delete(self.name)

    def _renew_until_the_end(self) -> None:
        while self._lost_to is None and not self._ending.wait(self._times.renew):
            try:
                self._renew()
            except LogitcacheError:  # a store that is away is no loss: it is tried again
                self._works = False

    def _renew(self) -> None:
        following = self._content.next()
        tag = self.store.replace(self.name, following.encode(), self._tag)
        if tag is None:
            tag = self._again(following)
        self._works = tag is not None
        if tag is not None:
            self._content, self._tag = following, tag

    def _again(self, following: _Content) -> Tag | None:
        """The lock is not what this process left there: takes it again if it was deleted or is an earlier renewal of its own,
        whose reply was lost; else it is lost."""
        try:
            data, tag = self.store.get_tagged(self.name)
        except FileNotFoundError:
            if self.store.create(self.name, following.encode()):
                return self.store.get_tagged(self.name)[1]
            return None  # somebody else did: seen at the next renewal
        found = _decode(data)
        if found and found.nonce == self._content.nonce:
            return self.store.replace(self.name, following.encode(), tag)
        self._lost_to = found.holder if found else "unknown"
        return None


@contextmanager
def lease(
    store: Store, name: str, what: str, *, say: Callable[[str], None] = lambda _: None, times: Times | None = None
) -> Iterator[Lease]:
    """Holds a lock during the block.

    Args:
        name: of the lock in its folder, such as ``0-of-1``.
        what: what is locked, for messages.
        say: is called with a line before another's lock is watched.
    Raises: CacheBusyError if another process holds it; what the store raises.
    """
    times = times or Times()
    name = f"{FOLDER}/{name}"
    content = _Content()
    held = Lease(store, name, what, content, _take(store, name, what, content, say, times), times)
    try:
        yield held
    finally:
        held.release()


def holders(
    store: Store,
    among: Callable[[str], bool] = lambda _: True,
    *,
    say: Callable[[str], None] = lambda _: None,
    times: Times | None = None,
) -> dict[str, str]:
    """The locks that are held, by name, with their holders. Takes up to `Times.silence` if there are any.

    Args:
        among: says of a lock's name whether it is wanted.
    """
    times = times or Times()
    names = [e.name for e in store.list(FOLDER) if among(e.name.removeprefix(f"{FOLDER}/"))]
    if not names:
        return {}
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(lambda name: _watch(store, name, say, times), names))
    return {
        name.removeprefix(f"{FOLDER}/"): seen.holder for name, seen in zip(names, found, strict=True) if seen.is_held
    }


@dataclass(frozen=True, slots=True)
class _Seen:
    """What watching a lock showed."""

    is_held: bool
    holder: str = ""
    tag: Tag | None = None  # of a lock that nobody holds; None if there is none


def _take(store: Store, name: str, what: str, content: _Content, say: Callable[[str], None], times: Times) -> Tag:
    while True:
        if store.create(name, content.encode()):
            with suppress(FileNotFoundError):  # deleted by hand at this moment
                return store.get_tagged(name)[1]
            continue
        seen = _watch(store, name, lambda line: say(f"{what}: {line}"), times)
        if seen.is_held:
            raise CacheBusyError(f"{what} is being written by another process ({seen.holder}); wait for it or stop it")
        if seen.tag and (tag := store.replace(name, content.encode(), seen.tag)):
            return tag


def _watch(store: Store, name: str, say: Callable[[str], None], times: Times) -> _Seen:
    """Looks at a lock until it changes, or has been the same for `Times.silence` in which the store answered."""
    first: tuple[bytes, Tag] | None = None
    holder, unchanged, looked = "unknown", 0.0, 0.0
    while True:
        try:
            found = store.get_tagged(name)
        except FileNotFoundError:
            return _Seen(False)
        now = time.monotonic()
        content = _decode(found[0])
        holder = content.holder if content else holder
        if content and content.process.has_ended():
            return _Seen(False, holder, found[1])
        if first is None:
            say(f"waiting up to {times.silence:.0f} s to see whether {holder} still writes")
            first = found
        elif found[1] != first[1]:
            return _Seen(True, holder)
        elif now - looked > times.poll + times.renew:  # the store was away, and its holder could not renew it either
            unchanged = 0.0
        else:
            unchanged += now - looked
        if unchanged >= times.silence:
            return _Seen(False, holder, found[1])
        looked = now
        time.sleep(times.poll)


def overwrites(store: Store) -> bool:
    """Whether a store lets a create-only write replace an object, or a conditional one another version: some servers do."""
    name = f"{FOLDER}/probe-{uuid4().hex}"
    try:
        if not store.create(name, b"1"):
            return True
        _, tag = store.get_tagged(name)
        if store.create(name, b"2"):
            return True
        store.replace(name, b"3", tag)
        return store.replace(name, b"4", tag) is not None
    finally:
        with suppress(LogitcacheError):
            store.delete(name)


def refuse_overwriting(store: Store, writers: int = 2, say: Callable[[str], None] = lambda _: None) -> None:
    """Refuses a store on which several writers would overwrite one another's objects. One may write to it: ``say`` gets a
    line.

    Raises: InputError.
    """
    if not overwrites(store):
        return
    text = (
        f"{store.url}: the store overwrites objects that it was asked to create (it ignores If-None-Match or If-Match)"
    )
    if writers > 1:
        raise InputError(f"{text}, so only one process may write to it; use one, or another store")
    say(f"{text}; do not let a second process write there")


def _decode(data: bytes) -> _Content | None:
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        fields = json.loads(data)
        content = _Content(**fields | {"process": _Process(**fields["process"])})
        if isinstance(content.holder, str) and 0 < content.process.pid < 1 << 31:
            return replace(content, holder="".join(filter(str.isprintable, content.holder))[:300])
    return None


def _machine() -> str:
    """This start of this machine, and this container; empty where that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
