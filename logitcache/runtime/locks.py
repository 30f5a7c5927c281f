"""Advisory file locks that tell other processes who holds them."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from logitcache.errors import CacheBusyError, WriteError
from logitcache.runtime.regular_files import descriptor_of, open_regular

_HOLDER = re.compile(
    rb"(pid \d+ on [^\n]*)?"
)  # what a lock contains; an empty one was made by a process killed at once
_LONGEST = 400  # bytes; the name of a host has at most 255


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds an advisory lock on ``path`` during the block; creates its directory.

    Args:
        what: the name of what is locked, for the message of CacheBusyError.
        wait: wait for the process that holds the lock.
    Raises: CacheBusyError if another process holds it, WriteError if no file can be locked there, or if the file there is no
        lock: then it is not touched.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(os.fdopen(descriptor_of(path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0))
            except OSError as e:
                if e.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR):
                    raise WriteError(f"{path} {e.strerror}, so it is no lock of logitcache; move it away") from e
                raise WriteError(f"{path.parent}: {e.strerror}; give `out` a writable directory") from e
            if not _is_ours(file):
                raise WriteError(f"{path} is not a lock of logitcache; move it away, or give `out` another directory")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise CacheBusyError(
                    f"{what} is being written by another process ({_holder(file)}); wait for it or stop it"
                ) from None
            except OSError as e:
                raise WriteError(
                    f"{path}: cannot be locked ({e.strerror}); give `out` a directory on a file system with locks"
                ) from e
            if _is_at(file, path):
                break  # otherwise its holder removed it, and another process may lock a new file at the path
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            file.truncate(0)
            file.seek(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}".encode())
        yield


def holder(path: Path) -> str | None:
    """The process that holds the lock on ``path``, None for none. Does not change the file."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once both succeed
        except BlockingIOError:
            return _holder(file)
    return None


def is_lock(path: Path) -> bool:
    """Whether a lock of ours stands at ``path``, held or not."""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return _is_ours(file)
    return False


def _is_ours(file: BinaryIO) -> bool:
    file.seek(0)
    return _HOLDER.fullmatch(file.read(_LONGEST)) is not None


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(_LONGEST).decode(errors="replace").strip()


def _is_at(file: BinaryIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    return False
