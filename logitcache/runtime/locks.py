"""Advisory file locks that tell other processes who holds them."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from logitcache.errors import CacheBusyError, WriteError


@contextlib.contextmanager
def exclusive(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds an advisory lock on ``path`` during the block; creates its directory.

    Args:
        what: the name of what is locked, for the message of CacheBusyError.
        wait: wait for the process that holds the lock.
    Raises: CacheBusyError if another process holds it, WriteError if no file can be locked there.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("a+"))
            except OSError as e:
                raise WriteError(f"{path.parent}: {e.strerror}; give `out` a writable directory") from e
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
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """The process that holds the lock on ``path``, None for none. Does not change the file."""
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once both succeed
        except BlockingIOError:
            return _holder(file)
    return None


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip()


def _is_at(file: TextIO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False
