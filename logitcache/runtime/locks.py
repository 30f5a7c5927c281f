"""Advisory locks: one process writes, the others are told which."""

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
    """Holds an advisory lock on ``path`` for the block; makes the directory it lies in.

    Args:
        what: is written by another process, a message says.
        wait: for the process that holds it.
    Raises: CacheBusyError if another process holds it, WriteError where no file can be locked there.
    """
    with contextlib.ExitStack() as stack:
        while True:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("a+"))
            except OSError as e:
                raise WriteError(f"{path.parent}: {e.strerror}; give `out` a directory that can be written to") from e
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise CacheBusyError(
                    f"{what} is written by another process ({_holder(file)}); let it finish or stop it"
                ) from None
            except OSError as e:
                raise WriteError(
                    f"{path}: cannot be locked ({e.strerror}); give `out` a file system that has locks"
                ) from e
            if _is_at(file, path):
                break  # else its holder removed it meanwhile, and another may lock its successor
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """Who holds the lock on ``path``; None where nobody does. Leaves the file as it is."""
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not see each other
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
