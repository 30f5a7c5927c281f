"""Opens regular files only: no link is followed, and a FIFO or a device is refused without waiting for it.

Directories that others made are read through this: what stands in place of a file there may be anything.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading; follows no link and waits for nothing.

    Raises: OSError; ELOOP for a link, and EINVAL for what is no file, such as a directory or a FIFO.
    """
    return os.fdopen(descriptor_of(path, os.O_RDONLY), "rb")


def descriptor_of(path: Path, flags: int) -> int:
    """A descriptor of a regular file, opened with ``flags``, which may create it. Do not give O_TRUNC: it may be another's.

    Raises: as ``open_regular``.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as e:
        reason = {errno.ELOOP: "is a link", errno.ENXIO: "is not a regular file", errno.EISDIR: "is a directory"}.get(
            e.errno or 0
        )
        raise OSError(e.errno, reason, str(path)) if reason else e from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def is_regular(path: Path) -> bool:
    """Whether a regular file stands at ``path``; a link to one does not count."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
